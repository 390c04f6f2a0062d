"""Losslessness of verify_sampling: exact enumeration, a grid over the uniforms, and chi-square.

Three steps. The textbook's rules, enumerated over every draft, give p exactly, and the rules that
KERNELS calls biased do not. The operator follows the textbook's rule in every step: its acceptance
rates and residuals, measured on a grid of uniform numbers, are those of the enumeration to one part
in 2000. And end to end: the joint distribution of three emitted tokens is the verifier's, for
chains and trees, with and without q and with all settings fused in: chi-square with N = 100,000,
125 cells, false-alarm rate 1e-4 each; the biased combinations are each rejected at that N, with a
power above 0.999.
"""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.decoding.chi_square import ChiSquare, chi_square
from tests.ops.tree_cases import COMPILED, DEVICES
from torch import Tensor

from speculators.decoding.sampling import draw
from speculators.ops import backend
from speculators.ops.draft_tree import DraftTree
from speculators.ops.tree_verification import SamplingMode, verify_sampling
from speculators.ops.tree_verification_reference import target_distribution

POINT_MASS, WITH, WITHOUT = SamplingMode
V = 5
SAMPLES = 100_000
GRID = 2000


def tables() -> tuple[Tensor, Tensor]:
    """Two Markov chains in float32: logits of the verifier, and probabilities of the draft."""
    generator = torch.Generator().manual_seed(5)
    logits = 1.3 * torch.randn(V, V, generator=generator)
    noise = 1.2 * torch.randn(V, V, generator=generator)
    return logits, (0.6 * logits + noise).softmax(-1)


# ---- the rules, exactly


def steps(
    p: Tensor, q: Tensor, children: tuple[int, ...], mode: SamplingMode
) -> tuple[list[float], Tensor]:
    """The textbook: how probably each child is accepted when it is its turn; the residual after."""
    r, rates = p.clone(), []
    for child in children:
        if mode is POINT_MASS:
            rates.append(float(r[child]))
            rest = r.index_fill(0, torch.tensor([child]), 0.0)
        else:
            rates.append(min(1.0, float(r[child] / q[child])))
            rest = (r - q).clamp(min=0)
        r = rest / rest.sum() if rest.sum() > 1e-15 else r
        if mode is WITHOUT:
            q = q.index_fill(0, torch.tensor([child]), 0.0)
            q = q / q.sum()
    return rates, r


def outcome(p: Tensor, q: Tensor, children: tuple[int, ...], mode: SamplingMode) -> Tensor:
    """The exact distribution of the token after a node with these children."""
    rates, r = steps(p, q, children, mode)
    result, reached = torch.zeros_like(p), 1.0
    for child, rate in zip(children, rates, strict=True):
        result[child] += reached * rate
        reached *= 1 - rate
    return result + reached * r


def drafts(q: Tensor, count: int, replacement: bool) -> list[tuple[tuple[int, ...], float]]:
    """Every ordered draft of siblings, with its probability."""
    found = []
    for children in itertools.product(range(V), repeat=count):
        probability, rest = 1.0, q
        for child in children:
            probability *= float(rest[child])
            if not replacement:
                rest = rest.index_fill(0, torch.tensor([child]), 0.0)
                rest = rest / rest.sum()
        if probability > 0:
            found.append((children, probability))
    return found


def emitted_exactly(
    p: Tensor, q: Tensor, count: int, replacement: bool, mode: SamplingMode
) -> Tensor:
    weighted = [w * outcome(p, q, c, mode) for c, w in drafts(q, count, replacement)]
    return torch.stack(weighted).sum(0)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("row", range(V))
def test_the_rules_give_p_exactly(count: int, row: int) -> None:
    logits, q_VV = tables()
    p, q = logits[row].double().softmax(-1), q_VV[row].double()
    q = q / q.sum()
    near: dict[str, Any] = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(emitted_exactly(p, q, count, True, WITH), p, **near)
    torch.testing.assert_close(emitted_exactly(p, q, count, False, WITHOUT), p, **near)
    for children in itertools.product(range(V), repeat=count):  # whatever they are
        torch.testing.assert_close(outcome(p, q, children, POINT_MASS), p, **near)


@pytest.mark.parametrize("count", [2, 3])
def test_the_biased_rules_do_not(count: int) -> None:
    unchanged, best = 0.0, 0.0
    for row in range(V):
        logits, q_VV = tables()
        p, q = logits[row].double().softmax(-1), q_VV[row].double()
        off = emitted_exactly(p, q / q.sum(), count, False, WITH) - p
        unchanged = max(unchanged, float(off.abs().max()))
        children = tuple(q.topk(count).indices.tolist())
        best = max(best, float((outcome(p, q, children, WITHOUT) - p).abs().max()))
    assert unchanged > 0.01
    assert best > 0.1


# ---- the operator follows them


def ask(
    children: tuple[int, ...], row: int, uniforms: Tensor, mode: SamplingMode, device: str
) -> tuple[Tensor, Tensor]:
    """Verifies a node with these children for each row of uniform numbers: accepted, token."""
    logits, q = tables()
    count, nodes = len(uniforms), len(children) + 1
    tokens = torch.tensor([0, *children]).expand(count, nodes)
    parents = torch.tensor([-1] + [0] * len(children)).expand(count, nodes)
    # Rows of leaves say token 0, so that an accepted path ends there.
    rows = torch.zeros(nodes, V)
    rows[:, 0] = 99
    rows[0] = logits[row]
    verdict = verify_sampling(
        rows.expand(count, nodes, V).to(device),
        DraftTree(tokens.to(device), parents.to(device)),
        uniforms.to(device),
        mode=mode,
        draft_probabilities=q[row].expand(count, 1, V).to(device),
    )
    path = torch.cat([verdict.path.cpu(), torch.full((count, 1), -1)], 1)
    return path[:, 0], verdict.next_tokens.cpu()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", [WITH, WITHOUT])
@pytest.mark.parametrize("count", [1, 2])
def test_each_step_is_the_textbooks(count: int, mode: SamplingMode, device: str) -> None:
    """Acceptance rates and the last residual, on a grid of uniform numbers."""
    logits, q = tables()
    grid = (torch.arange(GRID).double() + 0.5) / GRID
    compared = 0
    for row in (0, 3):
        p = logits[row].double().softmax(-1)
        for children, _ in drafts(q[row].double(), count, mode is WITH):
            rates, residual = steps(p, q[row].double(), children, mode)
            for place, rate in enumerate(rates):  # with those before it rejected
                uniforms = torch.full((GRID, count + 1), 1 - 2**-53, dtype=torch.float64)
                uniforms[:, place + 1] = grid
                accepted, _ = ask(children, row, uniforms, mode, device)
                found = float((accepted == place + 1).double().mean())
                assert abs(found - rate) <= 1 / GRID, (children, place)
                compared += 1
                if rate > 1 - 1e-9:
                    break  # it cannot be rejected
            else:
                uniforms = torch.full((GRID, count + 1), 1 - 2**-53, dtype=torch.float64)
                uniforms[:, 0] = grid
                accepted, tokens = ask(children, row, uniforms, mode, device)
                assert bool((accepted == -1).all())
                found_r = torch.bincount(tokens, minlength=V).double() / GRID
                assert (found_r - residual).abs().max() <= 1 / GRID
    assert compared > 8


# ---- end to end

Draft = Callable[[Tensor, int, Tensor], Tensor]


def drawn_with(q: Tensor, count: int, uniforms: Tensor) -> Tensor:
    return torch.stack([draw(q, uniforms[:, i]) for i in range(count)], 1)


def drawn_without(q: Tensor, count: int, uniforms: Tensor) -> Tensor:
    tokens = []
    for i in range(count):
        tokens.append(draw(q, uniforms[:, i]))
        q = q.scatter(1, tokens[-1][:, None], 0.0)
    return torch.stack(tokens, 1)


def chosen(q: Tensor, count: int, uniforms: Tensor) -> Tensor:
    del uniforms
    return q.topk(count).indices


def pruned(q: Tensor, count: int, uniforms: Tensor) -> Tensor:
    """One more than wanted are drawn, and those with the largest q stay."""
    tokens = drawn_without(q, count + 1, uniforms)
    best = q.gather(1, tokens).topk(count).indices.sort(-1).values
    return tokens.gather(1, best)


def duplicates_skipped(q: Tensor, count: int, uniforms: Tensor) -> Tensor:
    """A child that an earlier one equals is left out: -1."""
    tokens = drawn_with(q, count, uniforms)
    for i, j in itertools.combinations(range(count), 2):
        tokens[:, j] = torch.where(tokens[:, i] == tokens[:, j], -1, tokens[:, j])
    return tokens


def emitted(
    draft: Draft, mode: SamplingMode, width: int, device: str, **settings: Any
) -> ChiSquare:
    """Tests the first three tokens after token 0; each of two levels drafts ``width`` children."""
    logits, q = tables()
    generator = torch.Generator().manual_seed(7)
    nodes = 1 + width + width * width
    numbers = torch.rand(SAMPLES, 2 * nodes + 4 + 3 * width, generator=generator).double()
    uniforms = torch.rand(SAMPLES, nodes, generator=generator, dtype=torch.float64)
    tokens = torch.zeros(SAMPLES, nodes, dtype=torch.int64)
    parents = torch.full((SAMPLES, nodes), -1)
    used = 3
    for parent in range(1 + width):
        first = 1 + parent * width
        children = draft(q[tokens[:, parent].clamp(min=0)], width, numbers[:, used:])
        used += width + 1
        there = (children >= 0) & ((parents[:, parent] >= 0) | (parent == 0))[:, None]
        tokens[:, first : first + width] = children.clamp(min=0)
        parents[:, first : first + width] = torch.where(there, parent, -1)
    with backend.forced(COMPILED[device]):
        verdict = verify_sampling(
            logits[tokens].to(device),
            DraftTree(tokens.to(device), parents.to(device)),
            uniforms.to(device),
            mode=mode,
            draft_probabilities=None
            if mode is POINT_MASS
            else q[tokens[:, : 1 + width]].to(device),
            **settings,
        )
    sequence = verdict.emitted(DraftTree(tokens.to(device), parents.to(device))).cpu()
    sequence = torch.cat([sequence, torch.full((SAMPLES, 3), -1)], 1)[:, :3]
    # What the verification did not emit, later ones would; here P itself does.
    whole = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | settings
    p = target_distribution(logits, **whole).double()
    for place in range(3):
        before = sequence[:, place - 1] if place else torch.zeros_like(sequence[:, 0])
        later = draw(p[before], numbers[:, place])
        sequence[:, place] = torch.where(sequence[:, place] < 0, later, sequence[:, place])
    joint = torch.einsum("a,ab,bc->abc", p[0], p, p).flatten()
    return chi_square(sequence @ torch.tensor([V * V, V, 1]), joint)


LOSSLESS = [
    (drawn_with, WITH),
    (drawn_without, WITHOUT),
    (drawn_with, POINT_MASS),
    (drawn_without, POINT_MASS),
    (chosen, POINT_MASS),
    (pruned, POINT_MASS),
    (duplicates_skipped, POINT_MASS),
    (duplicates_skipped, WITHOUT),  # given those before it, the next new one is a draw from q_i
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("draft", "mode"), LOSSLESS)
@pytest.mark.parametrize("width", [1, 2, 3])
def test_what_is_emitted_has_the_verifiers_distribution(
    draft: Draft, mode: SamplingMode, width: int, device: str
) -> None:
    assert not emitted(draft, mode, width, device).rejected


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("draft", "mode"), [LOSSLESS[0], LOSSLESS[1], LOSSLESS[4]])
@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0.7}, {"top_k": 3}, {"temperature": 1.5, "top_k": 4, "top_p": 0.85}],
    ids=str,
)
def test_with_the_settings_of_sampling(
    draft: Draft, mode: SamplingMode, settings: dict[str, Any], device: str
) -> None:
    assert not emitted(draft, mode, 2, device, **settings).rejected


BIASED = [
    (chosen, WITH, 1),  # as if it had been drawn
    (chosen, WITH, 2),
    (chosen, WITHOUT, 2),
    (pruned, WITH, 2),
    (pruned, WITHOUT, 2),
    (drawn_without, WITH, 2),  # q is not what it was
    (drawn_without, WITH, 3),
    (duplicates_skipped, WITH, 2),
    (duplicates_skipped, WITH, 3),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("draft", "mode", "width"), BIASED)
def test_biased_combinations_are_noticed(
    draft: Draft, mode: SamplingMode, width: int, device: str
) -> None:
    found = emitted(draft, mode, width, device)
    assert found.rejected
    assert found.power > 0.999
