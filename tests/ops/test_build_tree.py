"""build_tree: every back end against the definition, and the definition against brute force."""

import dataclasses
import itertools
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies
from tests.ops.tree_cases import COMPILED, DEVICES, on_reference
from torch import Tensor

from speculators.ops import backend, tree_verification
from speculators.ops.backend import Backend
from speculators.ops.draft_tree import SelectedTree, chain_tree, mask_of


def candidates(seed: int, batch: int, count: int, levels: int = 12) -> dict[str, Any]:
    """Candidates with few different scores, so that many are equal; some are none."""
    generator = torch.Generator().manual_seed(seed)
    parents = (torch.rand(batch, count, generator=generator) * torch.arange(count)).long()
    parents = parents.masked_fill(torch.rand(batch, count, generator=generator) < 0.2, -1)
    parents[:, :1] = -1
    scores = -torch.randint(levels, (batch, count), generator=generator).float() / 4
    scores[torch.rand(batch, count, generator=generator) < 0.1] = -torch.inf
    scores[torch.rand(batch, count, generator=generator) < 0.05] = torch.nan
    return {
        "tokens": torch.randint(1000, (batch, count), generator=generator),
        "parents": parents,
        "scores": scores,
        "root_tokens": torch.randint(1000, (batch,), generator=generator),
        "root_positions": torch.randint(1000, (batch,), generator=generator),
    }


def columns(tree: SelectedTree) -> dict[str, Tensor]:
    return {
        field.name: getattr(tree, field.name)
        for field in dataclasses.fields(tree)
        if field.name != "selected"
    }


def expect_equal(found: SelectedTree, expected: SelectedTree) -> None:
    for name, column in columns(expected).items():
        assert torch.equal(columns(found)[name].cpu(), column.cpu()), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("batch", "count", "size"),
    [
        (3, 90, 63),
        (2, 200, 130),
        (1, 5, 9),
        (4, 1, 1),
        (2, 7, 0),
        (3, 0, 4),
        (0, 5, 2),
        (2, 600, 64),
    ],
)
def test_equals_the_definition(batch: int, count: int, size: int, device: str) -> None:
    for seed in range(5):
        arguments = {k: v.to(device) for k, v in candidates(seed, batch, count).items()}
        with backend.forced(COMPILED[device]):
            found = tree_verification.build_tree(**arguments, size=size)
            again = tree_verification.build_tree(**arguments, size=size)
        with on_reference():
            expected = tree_verification.build_tree(**arguments, size=size)
        expect_equal(found, expected)
        expect_equal(again, found)
        assert found.selected


def best_connected(parents: list[int], scores: list[float], size: int) -> float:
    """The largest total score that a connected set of so many candidates can have."""
    best = -float("inf")
    for chosen in itertools.combinations(range(len(parents)), size):
        if all(parents[i] < 0 or parents[i] in chosen for i in chosen):
            best = max(best, sum(scores[i] for i in chosen))
    return best


@hypothesis.given(
    steps=strategies.lists(
        strategies.tuples(strategies.integers(0, 10**6), strategies.integers(0, 5)), max_size=9
    ),
    size=strategies.integers(0, 6),
)
def test_no_connected_set_is_better(steps: list[tuple[int, int]], size: int) -> None:
    parents = [number % (i + 1) - 1 for i, (number, _) in enumerate(steps)]
    scores: list[float] = []
    for parent, (_, loss) in zip(parents, steps, strict=True):
        scores.append((scores[parent] if parent >= 0 else 0.0) - loss)
    tree = tree_verification.build_tree(
        torch.arange(len(steps))[None],
        torch.tensor([parents], dtype=torch.int64),
        torch.tensor([scores]),
        torch.tensor([7]),
        torch.tensor([0]),
        size,
    )
    chosen = [c for c in tree.candidates[0].tolist() if c >= 0]
    assert len(chosen) == min(size, len(steps))
    assert all(parents[c] < 0 or parents[c] in chosen for c in chosen)
    assert sum(scores[c] for c in chosen) == best_connected(parents, scores, len(chosen))


def test_the_parts_of_a_tree_agree() -> None:
    arguments = candidates(1, 4, 150)
    tree = tree_verification.build_tree(**arguments, size=100)
    seen = mask_of(tree.ancestors)
    for row, parents in enumerate(tree.parents.tolist()):
        for node, parent in enumerate(parents):
            expected = {node}
            above = parent
            while above >= 0:
                expected.add(above)
                above = parents[above]
            assert set(seen[row, node].nonzero()[:, 0].tolist()) == expected
            depth = int(tree.depths[row, node])
            assert depth == (len(expected) - 1 if node == 0 or parent >= 0 else -1)
            position = int(arguments["root_positions"][row]) + max(depth, 0)
            assert int(tree.positions[row, node]) == position
            children = []
            child = int(tree.first_children[row, node])
            while child >= 0:
                children.append(child)
                child = int(tree.next_siblings[row, child])
            assert children == [c for c, p in enumerate(parents) if p == node]
        order = [(int(d), i) for i, d in enumerate(tree.depths[row]) if d >= 0]
        assert order == sorted(order)
        best = [float(arguments["scores"][row, c]) for c in tree.candidates[row] if c >= 0]
        assert len(best) == len(order) - 1


def test_equal_scores_go_to_the_parent_then_to_the_lower_index() -> None:
    zero = torch.zeros(1, 4)
    parents = torch.tensor([[-1, 0, -1, 1]])
    arguments = (torch.tensor([[5, 6, 7, 8]]), parents, zero, torch.tensor([9]), torch.tensor([0]))
    kept = [tree_verification.build_tree(*arguments, n).candidates[0].tolist() for n in range(5)]
    assert kept == [[-1], [-1, 0], [-1, 0, 1], [-1, 0, 2, 1], [-1, 0, 2, 1, 3]]


def test_a_score_above_the_parents_counts_as_the_parents() -> None:
    tree = tree_verification.build_tree(
        torch.tensor([[5, 6, 7]]),
        torch.tensor([[-1, 0, -1]]),
        torch.tensor([[-2.0, -0.1, -1.0]]),
        torch.tensor([9]),
        torch.tensor([0]),
        2,
    )
    assert tree.candidates[0].tolist() == [-1, 2, 0]


def test_strided_arguments() -> None:
    arguments = candidates(2, 3, 40)
    wide = {k: torch.stack([v, v], -1)[..., 0] for k, v in arguments.items()}
    assert not wide["tokens"].is_contiguous()
    expect_equal(
        tree_verification.build_tree(**wide, size=20),
        tree_verification.build_tree(**arguments, size=20),
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [0, 30])
def test_opcheck(device: str, count: int) -> None:
    arguments = [v.to(device) for v in candidates(0, 2, count).values()]
    torch.library.opcheck(torch.ops.speculators.build_tree.default, (*arguments, 7))


def _ints(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokens": _ints(2, 3).int()}, TypeError, "tokens is torch.int32, expected torch.int64"),
        ({"tokens": _ints(2)}, ValueError, r"tokens has the shape \[2\], expected \[B, M\]"),
        ({"parents": _ints(2, 4)}, ValueError, r"parents has the shape \[2, 4\], .* = \[2, 3\]"),
        ({"scores": torch.zeros(2, 3).double()}, TypeError, "scores is torch.float64"),
        ({"scores": torch.zeros(2, 3).to("meta")}, ValueError, "scores is on meta"),
        ({"root_tokens": _ints(3)}, ValueError, r"root_tokens has the shape \[3\]"),
        ({"root_positions": _ints(2, 1)}, ValueError, "root_positions has the shape"),
        ({"size": -1}, ValueError, "size is -1"),
        ({"parents": _ints(2, 3)}, IndexError, r"parents\[0, 0\] is 0, expected -1 <= parent < 0"),
        ({"parents": _ints(2, 3) - 2}, IndexError, r"parents\[0, 0\] is -2"),
    ],
)
@pytest.mark.parametrize("name", [Backend.CPU, Backend.REFERENCE])
def test_wrong_arguments_are_named(
    change: dict[str, Any], error: type[Exception], message: str, name: Backend
) -> None:
    arguments = {**candidates(0, 2, 3), "size": 2} | change
    with backend.forced(name), pytest.raises(error, match=message):
        tree_verification.build_tree(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": _ints(2)}, r"tokens must have the shape \[batch, candidates\]"),
        ({"parents": _ints(2, 4)}, r"parents must have the shape \[2, 3\]"),
        ({"scores": torch.zeros(2, 3).double()}, "scores must be float32"),
        ({"root_tokens": _ints(3)}, r"root_tokens must have the shape \[2\]"),
        ({"root_positions": _ints(2).int()}, "root_positions must be int64"),
        ({"size": -1}, "size must not be negative"),
        ({"parents": _ints(2, 3) + 1}, r"parents\[0, 0\] is 1, expected -1 <= parent < 0"),
    ],
)
def test_the_bare_operator_protects_memory(change: dict[str, Any], message: str) -> None:
    arguments = {**candidates(0, 2, 3), "size": 2} | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.speculators.build_tree(**arguments)


def test_chain_tree() -> None:
    tokens = _ints(2, 4)
    assert chain_tree(tokens).parents.tolist() == [[-1, 0, 1, 2]] * 2
    some = chain_tree(tokens, torch.tensor([0, 2]))
    assert some.parents.tolist() == [[-1, -1, -1, -1], [-1, 0, 1, -1]]
    assert not some.selected
    with pytest.raises(ValueError, match="the last accepted token, and K drafted ones"):
        chain_tree(_ints(2, 0))
    with pytest.raises(ValueError, match=r"counts has the shape \[3\]"):
        chain_tree(tokens, _ints(3))
