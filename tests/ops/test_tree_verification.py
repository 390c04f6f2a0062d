"""verify_greedy and verify_sampling: every back end against the definition, and wrong arguments.

That the rules are lossless is tested in test_tree_sampling.py.
"""

import subprocess
import sys
from typing import Any

import pytest
import torch
from tests.ops.tree_cases import COMPILED, DEVICES, Case, distinct_siblings, make_case, on_reference
from torch import Tensor

from speculators.decoding.sampling import Sampling, draw
from speculators.ops import backend
from speculators.ops import tree_verification_reference as reference
from speculators.ops.backend import Backend
from speculators.ops.draft_tree import DraftTree, SelectedTree, chain_tree
from speculators.ops.tree_verification import (
    SamplingMode,
    TreeVerdict,
    verify_greedy,
    verify_sampling,
)

POINT_MASS, WITH, WITHOUT = SamplingMode
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"top_k": 5},
    {"top_p": 0.8},
    {"temperature": 1.7, "top_k": 40, "top_p": 0.9},
]
NAMES = [Backend.CPU, Backend.REFERENCE]
# Nodes and vocabulary: one chunk and many, widths that no vector divides, more nodes than a word.
SIZES = [(1, 1), (9, 33), (70, 6), (5, 9001)]


def expect_equal(found: TreeVerdict, expected: TreeVerdict) -> None:
    for name in ("path", "accepted", "next_tokens"):
        assert torch.equal(getattr(found, name).cpu(), getattr(expected, name).cpu()), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("nodes", "width"), SIZES)
def test_greedy_equals_the_definition(
    nodes: int, width: int, dtype: torch.dtype, device: str
) -> None:
    accepted = 0
    for seed in range(10):
        case = make_case(seed, 4, nodes, width, dtype, masked=0.2 * (seed % 2)).to(device)
        with backend.forced(COMPILED[device]):
            found = verify_greedy(case.logits, case.tree)
        with on_reference():
            expect_equal(found, verify_greedy(case.logits, case.tree))
        accepted += int(found.accepted.sum())
    assert nodes == 1 or accepted > 20


def sample(case: Case, mode: SamplingMode, settings: dict[str, Any]) -> TreeVerdict:
    q = None if mode is POINT_MASS else case.q
    return verify_sampling(
        case.logits, case.tree, case.uniforms, mode=mode, draft_probabilities=q, **settings
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", SamplingMode)
@pytest.mark.parametrize(("nodes", "width"), SIZES)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_sampling_equals_the_definition(
    settings: dict[str, Any], nodes: int, width: int, mode: SamplingMode, device: str
) -> None:
    accepted = 0
    for seed in range(6):
        dtype = torch.bfloat16 if seed % 2 else torch.float32
        case = make_case(seed, 3, nodes, width, dtype, masked=0.3 * (seed % 3 == 2))
        if mode is WITHOUT:
            if width < nodes:
                case = make_case(seed, 3, width, width, dtype)
            case.tree = distinct_siblings(case.tree, width)
        case = case.to(device)
        with backend.forced(COMPILED[device]):
            found = sample(case, mode, settings)
            expect_equal(sample(case, mode, settings), found)
        with on_reference():
            expect_equal(found, sample(case, mode, settings))
        accepted += int(found.accepted.sum())
    assert nodes == 1 or accepted > 2


@pytest.mark.parametrize("settings", SETTINGS[1:], ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_the_distribution_is_that_of_decoding(settings: dict[str, Any], ties: bool) -> None:
    """Temperature, top-k and top-p, bit by bit; then tokens drawn.

    With many equal logits too. Which of equal ones top-p keeps is up to torch's sort in decoding,
    so then the kept probabilities are compared, and not whose they are.
    """
    torch.manual_seed(0)
    logits = torch.randn(200, 1, 60) * 2
    if ties:
        logits = logits.round()
    expected = Sampling(**{"temperature": 1.0} | settings).distribution(logits)
    whole = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | settings
    own = reference.target_distribution(logits, **whole)
    if ties and "top_p" in settings:
        torch.testing.assert_close(own.sort(-1).values, expected.sort(-1).values)
    else:
        assert torch.equal(own, expected)
    uniforms = torch.rand(200, 1, dtype=torch.float64)
    tree = chain_tree(torch.zeros(200, 1, dtype=torch.int64))
    found = verify_sampling(logits, tree, uniforms, mode=POINT_MASS, **settings)
    assert torch.equal(found.next_tokens, draw(own[:, 0], uniforms[:, 0]))


def support(logits: Tensor, **settings: Any) -> set[int]:
    """The tokens that can be drawn after a root."""
    grid = (torch.arange(600, dtype=torch.float64) + 0.5)[:, None] / 600
    tree = chain_tree(torch.zeros(600, 1, dtype=torch.int64))
    rows = logits.expand(600, 1, -1)
    verdict = verify_sampling(rows, tree, grid, mode=POINT_MASS, **settings)
    return set(verdict.next_tokens.tolist())


@pytest.mark.parametrize("name", NAMES)
def test_ties_at_the_boundaries(name: Backend) -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0, 2.0])
    with backend.forced(name):
        assert support(logits, top_k=2) == {1, 2, 3, 5}  # all that tie with the second
        assert support(logits, top_p=0.43) == {1}
        assert support(logits, top_p=0.45) == {1, 5}  # 0.437 is not enough; of equal ones the last
        assert support(logits, top_k=2, top_p=0.7) == {1, 3, 5}
        assert support(logits, top_p=1e-9) == {1}
        # z / T rounds these two to one number, though they differ.
        close = torch.tensor([1.6, 0.0, 1.6]).double()
        pair = torch.stack([close.float()[0], torch.nextafter(close.float()[0], torch.tensor(2.0))])
        temperature = 1.1
        assert bool((pair / temperature)[0] == (pair / temperature)[1]) == (
            support(torch.cat([pair, torch.zeros(1)]), top_k=1, temperature=temperature) == {0, 1}
        )


@pytest.mark.parametrize("name", NAMES)
def test_chains_are_accepted_up_to_the_first_difference(name: Backend) -> None:
    logits = torch.nn.functional.one_hot(torch.tensor([[1, 2, 3, 4]] * 7), 5).float()
    rows = [[1, 2, 3], [1, 2, 0], [0, 2, 3], [1, 0, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3]]
    tokens = torch.nn.functional.pad(torch.tensor(rows), (1, 0))
    with backend.forced(name):
        verdict = verify_greedy(logits, chain_tree(tokens, torch.tensor([3, 3, 3, 3, 2, 1, 0])))
    assert verdict.accepted.tolist() == [3, 2, 0, 1, 2, 1, 0]
    assert verdict.next_tokens.tolist() == [4, 3, 1, 2, 3, 2, 1]


@pytest.mark.parametrize("name", NAMES)
def test_greedy_ties_go_to_the_lowest_id_in_the_logits_dtype(name: Backend) -> None:
    # In bfloat16 these two are equal, though 1.0 + 2**-9 is more in float32.
    close = torch.tensor([[[0.0, 1.0, 1.0 + 2**-9]]])
    zeros = torch.tensor([[[-1.0, -0.0, 0.0]]])
    root = chain_tree(torch.zeros(1, 1, dtype=torch.int64))
    with backend.forced(name):
        assert verify_greedy(close, root).next_tokens.tolist() == [2]
        assert verify_greedy(close.bfloat16(), root).next_tokens.tolist() == [1]
        assert verify_greedy(zeros, root).next_tokens.tolist() == [1]
        assert verify_greedy(zeros.bfloat16(), root).next_tokens.tolist() == [1]


@pytest.mark.parametrize("name", NAMES)
def test_a_token_outside_of_the_verifiers_support_is_never_accepted(name: Backend) -> None:
    logits = torch.tensor([[[0.0, 0.0, -torch.inf], [9.0, 0.0, 0.0]]])
    tree, zeros = chain_tree(torch.tensor([[0, 2]])), torch.zeros(1, 2, dtype=torch.float64)
    with backend.forced(name):
        for mode, q in ((POINT_MASS, None), (WITH, torch.tensor([[[0.0, 0.0, 1.0]]]))):
            verdict = verify_sampling(logits, tree, zeros, mode=mode, draft_probabilities=q)
            assert (verdict.accepted.tolist(), verdict.next_tokens.tolist()) == ([0], [0])


@pytest.mark.parametrize("name", NAMES)
def test_a_rejection_by_rounding_alone_draws_from_p(name: Backend) -> None:
    # q is p but for one unit in the last place, so (p - q)+ is empty where the token is rejected.
    logits = torch.tensor([[[-torch.inf, 0.0], [0.0, -torch.inf]]])
    q = torch.tensor([[[0.0, 1.0 + 2**-23]]])
    largest = torch.full((1, 2), 1 - 2**-53, dtype=torch.float64)
    with backend.forced(name):
        verdict = verify_sampling(
            logits, chain_tree(torch.tensor([[0, 1]])), largest, mode=WITH, draft_probabilities=q
        )
    assert (verdict.accepted.tolist(), verdict.next_tokens.tolist()) == ([0], [1])


@pytest.mark.parametrize("mode", SamplingMode)
def test_temperature_zero_is_greedy(mode: SamplingMode) -> None:
    case = make_case(1)
    expect_equal(sample(case, mode, {"temperature": 0.0}), verify_greedy(case.logits, case.tree))


@pytest.mark.parametrize("name", NAMES)
def test_temperature_zero_takes_no_wrong_numbers_either(name: Backend) -> None:
    case = make_case(1)
    case.uniforms[0, 0] = 1.0
    with backend.forced(name), pytest.raises(ValueError, match="uniforms has a number outside"):
        sample(case, POINT_MASS, {"temperature": 0.0})


@pytest.mark.parametrize("name", NAMES)
def test_what_is_emitted(name: Backend) -> None:
    logits = torch.nn.functional.one_hot(torch.tensor([[2, 4, 1, 3]]), 5).float() * 50
    tree = DraftTree(torch.tensor([[0, 1, 2, 4]]), torch.tensor([[-1, 0, 0, 2]]))
    with backend.forced(name):
        verdict = verify_greedy(logits, tree)
    assert verdict.path.tolist() == [[2, -1, -1]]  # node 3 is 4, and the row of node 2 says 1
    assert verdict.emitted(tree).tolist() == [[2, 1, -1, -1]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["compiled", "reference"])
def test_logits_that_are_no_numbers(device: str, name: str) -> None:
    nan, inf = float("nan"), float("inf")
    rows = [[nan, 1.0, 9.0, nan], [nan] * 4, [-inf, nan, -inf, -inf], [0.0, inf, 3.0, 1.0]]
    logits = torch.tensor(rows, device=device)[:, None]
    tree = chain_tree(torch.zeros(4, 1, dtype=torch.int64, device=device))
    uniforms = torch.full((4, 1), 0.9, dtype=torch.float64, device=device)
    with backend.forced(COMPILED[device] if name == "compiled" else Backend.REFERENCE):
        assert verify_greedy(logits, tree).next_tokens.tolist() == [2, 0, 0, 1]
        for settings in SETTINGS:
            found = verify_sampling(logits, tree, uniforms, mode=POINT_MASS, **settings)
            assert found.next_tokens.tolist() == [2, 0, 0, 1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [1, 65, 9001])
def test_any_bits_of_bfloat16_are_compared_as_numbers(width: int, device: str) -> None:
    """Both zeros, infinities, subnormal numbers and NaNs of both signs."""
    generator = torch.Generator().manual_seed(width)
    bits = torch.randint(-(2**15), 2**15, (60, 1, width), generator=generator, dtype=torch.int16)
    bits[20:40] |= -(2**15)  # all below zero
    bits[40:, :, : width // 2] = -(2**15)
    bits[40:, :, width // 2 :] = torch.tensor([-(2**15), 0, -(2**7) + 1])[
        torch.randint(3, (20, 1, width - width // 2), generator=generator)
    ].short()  # zeros of both signs, and a NaN
    logits = bits.view(torch.bfloat16).to(device)
    tree = chain_tree(torch.zeros(60, 1, dtype=torch.int64, device=device))
    with backend.forced(COMPILED[device]):
        found = verify_greedy(logits, tree)
    with on_reference():
        expect_equal(found, verify_greedy(logits, tree))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", SamplingMode)
def test_strided_arguments(mode: SamplingMode, dtype: torch.dtype, device: str) -> None:
    case = make_case(4, 3, 8, 21, dtype)
    if mode is WITHOUT:
        case.tree = distinct_siblings(case.tree, 21)
    case = case.to(device)
    expected = sample(case, mode, {})
    for transform in (
        lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],  # rows lie apart
        lambda t: torch.stack([t, t], -1)[..., 0],  # elements lie apart
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        tree = DraftTree(transform(case.tree.tokens), transform(case.tree.parents))
        parts = (transform(t) for t in (case.logits, case.uniforms, case.q))
        logits, uniforms, q = parts
        expect_equal(sample(Case(logits, tree, uniforms, q), mode, {}), expected)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch(name: Backend) -> None:
    case = make_case(0, batch=0)
    with backend.forced(name):
        for found in (verify_greedy(case.logits, case.tree), sample(case, POINT_MASS, {})):
            assert [list(t.shape) for t in (found.path, found.accepted)] == [[0, 8], [0]]


def test_a_sequence_does_not_depend_on_the_others() -> None:
    case = make_case(5, batch=6, width=5000)
    together = sample(case, WITH, {"top_p": 0.9})
    for row in range(6):
        tree = DraftTree(case.tree.tokens[row : row + 1], case.tree.parents[row : row + 1])
        parts = (t[row : row + 1] for t in (case.logits, case.uniforms, case.q))
        logits, uniforms, q = parts
        alone = sample(Case(logits, tree, uniforms, q), WITH, {"top_p": 0.9})
        assert torch.equal(alone.path[0], together.path[row])
        assert torch.equal(alone.next_tokens[0], together.next_tokens[row])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype, device: str) -> None:
    case = make_case(0, dtype=dtype).to(device)
    operators = torch.ops.speculators
    tree = (case.logits, case.tree.tokens, case.tree.parents)
    torch.library.opcheck(operators.verify_greedy.default, tree)
    for mode in (POINT_MASS, WITH):
        q = None if mode is POINT_MASS else case.q
        torch.library.opcheck(
            operators.verify_sampling.default, (*tree, q, case.uniforms, int(mode), 0.9, 7, 0.9)
        )


def test_one_graph_under_torch_compile() -> None:
    case = make_case(0)

    def both(logits: Tensor, uniforms: Tensor, tokens: Tensor, parents: Tensor) -> Tensor:
        tree = DraftTree(tokens, parents)
        greedy = verify_greedy(logits, tree)
        return greedy.path + verify_sampling(logits, tree, uniforms, mode=POINT_MASS).path

    arguments = (case.logits, case.uniforms, case.tree.tokens, case.tree.parents)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), both(*arguments))


def wrong(**changes: Any) -> dict[str, Any]:
    """The arguments of verify_sampling with a change; tokens and parents are the tree's."""
    case = make_case(0, batch=2, nodes=4, width=5)
    arguments: dict[str, Any] = {
        "logits": case.logits,
        "tokens": torch.tensor([[0, 1, 2, 3], [0, 1, 2, 3]]),
        "parents": torch.tensor([[-1, 0, 1, 2], [-1, 0, 0, -1]]),
        "uniforms": case.uniforms,
        "mode": WITH,
        "draft_probabilities": case.q,
    }
    return arguments | changes


ROOTLESS = torch.tensor([[0, 0, 1, 2], [-1, 0, 0, -1]])
LATE = torch.tensor([[-1, 0, 2, 2], [-1, 0, 0, -1]])
UNKNOWN = torch.tensor([[0, 1, 2, 3], [0, 1, 5, 99]])
DOUBLE = torch.tensor([[0, 1, 2, 3], [0, 2, 2, 3]])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(2, 4, 5).half()}, TypeError, "logits is torch.float16"),
        ({"logits": torch.zeros(4, 5)}, ValueError, r"logits has the shape \[4, 5\]"),
        ({"logits": torch.zeros(2, 4, 0)}, ValueError, "at least one token"),
        ({"logits": torch.zeros(2, 5, 5)}, ValueError, r"tree.tokens has .* = \[2, 5\]"),
        ({"tokens": UNKNOWN.int()}, TypeError, "tree.tokens is torch.int32"),
        ({"parents": LATE.to("meta")}, ValueError, "tree.parents is on meta"),
        ({"uniforms": torch.zeros(2, 4)}, TypeError, "uniforms is torch.float32"),
        ({"uniforms": torch.zeros(2, 3).double()}, ValueError, r"uniforms has the shape \[2, 3\]"),
        ({"uniforms": torch.ones(2, 4).double()}, ValueError, "outside of"),
        ({"parents": ROOTLESS}, IndexError, r"tree.parents\[0, 0\] is 0, expected -1"),
        ({"parents": LATE}, IndexError, r"tree.parents\[0, 2\] is 2, expected -1 <= parent < 2"),
        ({"tokens": UNKNOWN}, IndexError, r"tree.tokens\[1, 2\] is 5, expected 0 <= token < 5"),
        ({"draft_probabilities": None}, ValueError, "WITH_REPLACEMENT needs draft_probabilities"),
        ({"mode": POINT_MASS}, ValueError, "POINT_MASS, which ignores it"),
        ({"mode": 3}, ValueError, "3 is not a valid SamplingMode"),
        ({"selected": True}, ValueError, "selected by score is biased: expected POINT_MASS"),
        ({"draft_probabilities": torch.zeros(2, 4, 5).double()}, TypeError, "is torch.float64"),
        ({"draft_probabilities": torch.zeros(2, 4, 6)}, ValueError, r"expected \[B, R, V\]"),
        ({"draft_probabilities": torch.ones(2, 2, 5)}, ValueError, "has 2 rows, expected more"),
        ({"draft_probabilities": torch.zeros(2, 4, 5)}, ValueError, r"tokens\[\d, 1\] cannot have"),
        (
            {
                "mode": WITHOUT,
                "tokens": DOUBLE,
                "logits": torch.tensor([9.0, 0, 0, 0, 0]).expand(2, 4, 5),
                "draft_probabilities": torch.full((2, 4, 5), 0.2),
            },
            ValueError,
            r"tokens\[1, 2\] cannot have been drawn",
        ),
        ({"temperature": -1.0}, ValueError, "temperature is -1.0"),
        ({"temperature": 1e-9}, ValueError, "temperature is 1e-09"),
        ({"temperature": 0.0, "top_k": 3}, ValueError, "which is greedy"),
        ({"top_k": -1}, ValueError, "top_k is -1"),
        ({"top_p": 0.0}, ValueError, "top_p is 0.0"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_wrong_arguments_are_named(
    change: dict[str, Any], error: type[Exception], message: str, name: Backend
) -> None:
    arguments = wrong(**change)
    selected = arguments.pop("selected", False)
    tree = DraftTree(arguments.pop("tokens"), arguments.pop("parents"), selected)
    with backend.forced(name), pytest.raises(error, match=message):
        verify_sampling(arguments.pop("logits"), tree, **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 4, 5).double()}, "logits must be float32 or bfloat16"),
        ({"logits": torch.zeros(4, 5)}, "logits must have the shape"),
        ({"logits": torch.zeros(2, 0, 5)}, "logits must have the shape"),
        ({"tokens": UNKNOWN[:1]}, r"tokens must have the shape \[2, 4\]"),
        ({"tokens": UNKNOWN}, r"tokens is out of range at \[1, 2\]"),
        ({"parents": LATE}, r"parents is out of range at \[0, 2\]"),
        ({"parents": LATE.int()}, "parents must be int64"),
        ({"uniforms": torch.ones(2, 4).double()}, r"uniforms is out of range at \[0, 0\]"),
        ({"uniforms": torch.ones(2, 4)}, "uniforms must be float64"),
        ({"mode": 3}, "mode must be 0"),
        ({"mode": 0}, "draft_probabilities must be given, but not for mode 0"),
        ({"draft_probabilities": None}, "draft_probabilities must be given"),
        ({"draft_probabilities": torch.ones(2, 2, 5)}, r"draft_probabilities is out of range at"),
        ({"draft_probabilities": torch.ones(2, 2, 4)}, "must have the shape"),
        ({"temperature": 0.0}, "temperature must be at least"),
        ({"top_p": 1.5}, "top_p in"),
    ],
)
def test_the_bare_operators_protect_memory(change: dict[str, Any], message: str) -> None:
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    arguments = wrong() | settings | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.speculators.verify_sampling(**arguments | {"mode": int(arguments["mode"])})
    tree = {name: arguments[name] for name in ("logits", "tokens", "parents")}
    if set(change) & set(tree):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.speculators.verify_greedy(**tree)


def test_a_tree_that_was_built_is_marked() -> None:
    empty = torch.zeros(1, 1, dtype=torch.int64)
    names = ("depths", "positions", "ancestors", "first_children", "next_siblings", "candidates")
    tree = SelectedTree(empty, empty - 1, True, **dict.fromkeys(names, empty))
    logits, uniforms = torch.zeros(1, 1, 3), torch.zeros(1, 1).double()
    verdict = verify_sampling(logits, tree, uniforms, mode=POINT_MASS)
    assert verdict.accepted.tolist() == [0]
    with pytest.raises(ValueError, match="WITHOUT_REPLACEMENT on a tree that was selected"):
        verify_sampling(logits, tree, uniforms, mode=WITHOUT, draft_probabilities=logits)


@pytest.mark.parametrize(
    ("token", "call", "message"),
    [
        (3, "verify_greedy(logits, tree)", "a token is out of range"),
        (
            2,
            "verify_sampling(logits, tree, logits[..., 0].double() + 1, mode=POINT_MASS)",
            "a uniform number is not in",
        ),
    ],
)
@pytest.mark.parametrize("device", set(DEVICES) & {"cuda"})
def test_what_is_out_of_range_on_cuda_is_an_error(
    token: int, call: str, message: str, device: str
) -> None:
    """In a process of its own: a device-side assertion ends the CUDA context."""
    program = (
        "import torch\n"
        "from speculators.ops.draft_tree import chain_tree\n"
        "from speculators.ops.tree_verification import SamplingMode, verify_greedy\n"
        "from speculators.ops.tree_verification import verify_sampling\n"
        "POINT_MASS = SamplingMode.POINT_MASS\n"
        f"logits = torch.zeros(1, 2, 3, device={device!r})\n"
        f"tree = chain_tree(torch.tensor([[0, {token}]], device=logits.device))\n{call}\n"
        "torch.cuda.synchronize()\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert process.returncode != 0
    assert message in process.stdout + process.stderr
