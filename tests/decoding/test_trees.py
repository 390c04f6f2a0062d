"""Trees in the loop: the tokens and the distribution of the verifier alone, and more of them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.decoding.chi_square import ChiSquare, chi_square
from tests.decoding.drafts import make_draft
from tests.models import verifier_models
from tests.models.verifier_models import LAYERS, VOCABULARY, WINDOW
from torch import Tensor
from torch.overrides import TorchFunctionMode

from speculators.decoding.drafters import Proposal, TreeProposal
from speculators.decoding.generation import generate
from speculators.decoding.sampling import Sampling
from speculators.decoding.settings import GenerationSettings, pad_prompts
from speculators.decoding.suffix_drafter import SuffixDrafter, suffix_corpus
from speculators.decoding.tree_drafter import TreeDrafter
from speculators.decoding.trees import DynamicTree, StaticTree, Tree, layout, parse_tree
from speculators.models.verifier.tree import TokenTree
from speculators.models.verifier.verifier import Verifier
from speculators.ops.draft_tree import DraftTree
from speculators.ops.tree_verification import SamplingMode

PROMPTS = [verifier_models.tokens(n, seed=n).tolist() for n in (5, 2 * WINDOW, 1, 12)]
NEW = 2 * WINDOW
UNEVEN = StaticTree(((0,), (1,), (2,), (0, 0), (0, 1), (2, 0), (0, 0, 0), (0, 1, 0), (0, 1, 1)))
SHAPES: dict[str, Tree] = {
    "dynamic": DynamicTree(nodes=9, depth=4, children=3),
    "wide": DynamicTree(nodes=70, depth=3, children=8),  # two words of ancestors
    "uneven": UNEVEN,
    "chain": StaticTree.of_widths((1, 1, 1, 1)),
}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "eagle": {},
    "hass": {},
    "eagle3": {"draft_vocab_size": 32},
}
MODELS = ["llama", "mistral", "gemma3", "gpt_oss"]


@pytest.fixture(params=MODELS, scope="module")
def verifier(request: pytest.FixtureRequest) -> Verifier:
    return Verifier(verifier_models.make(request.param))


def expected(verifier: Verifier, **options: Any) -> list[list[int]]:
    """What transformers' generate says, up to the end of each text."""
    input_ids, mask = pad_prompts(PROMPTS)
    assert mask is not None
    model: Any = verifier.model
    rows: Any = model.generate(
        input_ids=input_ids, attention_mask=mask.long(), do_sample=False,
        **{"max_new_tokens": NEW, **options},
    )  # fmt: skip
    eos = verifier_models.BASE["eos_token_id"]
    new = [row[input_ids.shape[1] :] for row in rows.tolist()]
    return [row[: row.index(eos) + 1] if eos in row else row for row in new]


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
def test_greedy_tokens_are_those_of_transformers(
    verifier: Verifier, algorithm: str, shape: str
) -> None:
    draft = make_draft(algorithm, verifier, **ALGORITHMS[algorithm])
    settings = GenerationSettings(max_new_tokens=NEW, tree=SHAPES[shape])
    output = generate(verifier, draft, PROMPTS, settings)
    assert output.sequences == expected(verifier)
    assert output.acceptance.accepted == sum(map(sum, output.traces))
    assert len(output.acceptance.drafted_by_position) <= SHAPES[shape].depth


@pytest.mark.parametrize("shape", [SHAPES["chain"], DynamicTree(4, 4, 1)])
@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
def test_a_tree_that_never_branches_is_the_chain(algorithm: str, shape: Tree) -> None:
    verifier = Verifier(verifier_models.make("llama"))
    draft = make_draft(algorithm, verifier, **ALGORITHMS[algorithm])
    drafter = TreeDrafter(draft, verifier, shape)
    input_ids, mask = pad_prompts(PROMPTS)
    output = verifier.prefill(input_ids, mask, capture=drafter.capture)
    roots = torch.tensor([7, 8, 9, 10])
    drafter.prefill(input_ids, list(map(len, PROMPTS)), roots, output.captured)
    for _ in range(2):  # one proposal leaves nothing behind for the next
        tree = drafter.propose_tree(roots, None).tree
        assert tree.tokens[:, 1:].tolist() == drafter.propose(4, None).tokens.tolist()
        assert tree.tokens[:, 0].tolist() == roots.tolist()
        assert tree.parents.tolist() == [[-1, 0, 1, 2, 3]] * 4


@pytest.mark.parametrize("shape", [SHAPES["dynamic"], SHAPES["uneven"]])
def test_ended_sequences_cost_nothing(shape: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    verifier = Verifier(verifier_models.make("llama"))
    draft = make_draft("eagle3", verifier, draft_vocab_size=32)
    drafter = TreeDrafter(draft, verifier, shape)
    input_ids, mask = pad_prompts(PROMPTS)
    output = verifier.prefill(input_ids, mask, capture=drafter.capture)
    roots = torch.tensor([7, 8, 9, 10])
    drafter.prefill(input_ids, list(map(len, PROMPTS)), roots, output.captured)
    before = drafter.propose_tree(roots, None)
    rows: set[int] = set()
    forward = draft.forward

    def counted(input_ids: Tensor, *rest: Any) -> Any:
        rows.add(input_ids.shape[0])
        return forward(input_ids, *rest)

    monkeypatch.setattr(draft, "forward", counted)
    left = [3, 0]
    drafter.select(left)
    after = drafter.propose_tree(roots[left], None)
    assert rows == {2}
    assert after.tree.tokens.tolist() == before.tree.tokens[left].tolist()
    assert after.tree.parents.tolist() == before.tree.parents[left].tolist()


def test_matches_draft_trees(verifier: Verifier) -> None:
    corpus = suffix_corpus([*PROMPTS, *expected(verifier), [1, 2, 3, 4, 5], [1, 2, 6, 7]])
    drafter = SuffixDrafter(corpus, tree_nodes=12)
    output = generate(verifier, drafter, PROMPTS, GenerationSettings(max_new_tokens=NEW))
    assert output.sequences == expected(verifier)
    assert output.acceptance.tau > 3  # the corpus has the texts
    drafter.prefill(torch.tensor([[9, 1]]), [2], torch.tensor([2]), {})
    tree = drafter.propose_tree(torch.tensor([2]), None).tree
    after_root = tree.tokens[0][tree.parents[0] == 0].tolist()
    assert {3, 6} <= set(after_root)  # both ways in which the corpus goes on


class ScriptedTrees:
    """Two branches of two nodes after each root; the script says what each token is.

    Args:
        script: from a sequence's number and the tokens told so far to the tokens of the nodes: the
            two children, and a child of each.
    """

    capture: tuple[int, ...] = (LAYERS,)
    tree_nodes = 4
    tree_depth = 2

    def __init__(self, script: Callable[[int, int], list[int]]) -> None:
        self._script = script
        self.told: list[list[int]] = []
        self.shown: list[list[Tensor]] = []
        self._rows: list[int] = []

    def prefill(
        self,
        input_ids: Tensor,
        lengths: Sequence[int],
        next_tokens: Tensor,
        streams: Mapping[int, Tensor],
    ) -> None:
        """Begins a batch; all of its sequences must go on."""
        self._rows = list(range(len(lengths)))
        prompts = [row[len(row) - n :] for row, n in zip(input_ids.tolist(), lengths, strict=True)]
        self.told = [[*p, int(token)] for p, token in zip(prompts, next_tokens, strict=True)]
        self.shown = [
            [stream[len(stream) - n :]] for stream, n in zip(streams[LAYERS], lengths, strict=True)
        ]

    def propose(self, count: int, uniforms: Tensor | None) -> Proposal:
        """No chain."""
        del count, uniforms
        return Proposal(torch.zeros(len(self._rows), 0, dtype=torch.int64))

    def propose_tree(self, roots: Tensor, uniforms: Tensor | None) -> TreeProposal:
        """The script's tokens. The second sequence's tree lacks the second branch."""
        del uniforms
        assert roots.tolist() == [self.told[row][-1] for row in self._rows]
        tokens = [self._script(row, len(self.told[row])) for row in self._rows]
        parents = [[-1, 0, 0 if row != 1 else -1, 1, 2 if row != 1 else -1] for row in self._rows]
        sees = torch.eye(5, dtype=torch.bool)
        sees[1:, 0] = sees[3, 1] = sees[4, 2] = True
        batch = len(self._rows)
        return TreeProposal(
            DraftTree(torch.cat([roots[:, None], torch.tensor(tokens)], 1), torch.tensor(parents)),
            TokenTree(torch.tensor([[0, 1, 1, 2, 2]] * batch), sees.expand(batch, -1, -1)),
        )

    def update(self, tokens: Tensor, counts: Sequence[int], streams: Mapping[int, Tensor]) -> None:
        """Keeps what it is told."""
        for place, row in enumerate(self._rows):
            self.told[row] += tokens[place, : counts[place]].tolist()
            self.shown[row].append(streams[LAYERS][place, : counts[place]])

    def select(self, rows: Sequence[int]) -> None:
        """Keeps some sequences."""
        self._rows = [self._rows[row] for row in rows]


@pytest.mark.parametrize("right", ["first", "second", "child only", "none"])
def test_a_path_through_the_tree(verifier: Verifier, right: str) -> None:
    """Also: the drafter is told the tokens, and shown the states of the path's own nodes."""
    truth = expected(verifier)

    def script(row: int, known: int) -> list[int]:
        place = known - len(PROMPTS[row])
        one, two = [*truth[row][place : place + 2], 0, 0][:2]
        wrong = (one + 1) % VOCABULARY
        other = (two + 1) % VOCABULARY
        return {
            "first": [one, wrong, two, two],
            "second": [wrong, one, two, two],
            "child only": [wrong, one, one, other],
            "none": [wrong, wrong, one, two],
        }[right]

    drafter = ScriptedTrees(script)
    output = generate(verifier, drafter, PROMPTS, GenerationSettings(max_new_tokens=NEW))
    assert output.sequences == truth
    if right == "none":
        assert output.acceptance.accepted == 0
    elif right == "first":
        assert output.acceptance.rates_by_position[0] > 0.8  # all but at the ends of texts
    for row, prompt in enumerate(PROMPTS):
        told = drafter.told[row]
        assert told[: len(prompt) + len(truth[row])] == (prompt + truth[row])[: len(told)]
        shown = torch.cat(drafter.shown[row])
        streams = verifier.prefill(torch.tensor([told]), capture=[LAYERS]).captured[LAYERS][0]
        torch.testing.assert_close(shown, streams[: len(shown)], rtol=1e-4, atol=1e-4)
        assert len(shown) == len(told) - 1


def test_trees_of_a_verifier_in_float16() -> None:
    """The operators have no float16; its logits are exact in float32."""
    verifier = Verifier(verifier_models.make("llama").half())
    for sampling in (Sampling(), Sampling(temperature=0.5)):
        settings = GenerationSettings(NEW, sampling=sampling, eos_token_ids=())
        output = generate(verifier, SuffixDrafter(tree_nodes=6), PROMPTS, settings)
        assert [len(row) for row in output.sequences] == [NEW] * len(PROMPTS)
        assert output.acceptance.drafts > 0


def test_trees_stop_where_positions_end() -> None:
    verifier = Verifier(verifier_models.make("llama"))
    draft = make_draft("eagle", verifier)
    longest = max(map(len, PROMPTS)) + 9
    settings = GenerationSettings(max_length=longest, tree=DynamicTree(12, 5, 3), eos_token_ids=())
    output = generate(verifier, draft, PROMPTS, settings)
    plain = generate(
        verifier, None, PROMPTS, GenerationSettings(max_length=longest, eos_token_ids=())
    )
    assert output.sequences == plain.sequences
    assert [len(p) + len(s) for p, s in zip(PROMPTS, output.sequences, strict=True)] == [
        longest
    ] * 4


V, SAMPLES, PROMPT = 8, 20_000, [1, 3, 5, 1, 3]


@pytest.fixture(scope="module")
def eight() -> Verifier:
    """A verifier with 8 tokens: all 512 continuations by three can be enumerated."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model: Any = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return Verifier(model)


@dataclasses.dataclass(frozen=True)
class Sampled:
    """Tests of 20,000 texts at a false-alarm rate of 1e-4: of three tokens, and of the first two.

    The first token is the prompt's pass's, the others come out of a tree. Two have fewer cells, so
    their test is the stronger one for what goes wrong in one verification.
    """

    three: ChiSquare
    two: ChiSquare
    tau: float


def sampled(verifier: Verifier, drafter: Any, sampling: Sampling) -> Sampled:
    settings = GenerationSettings(max_new_tokens=3, sampling=sampling)
    output = generate(
        verifier, drafter, [PROMPT] * SAMPLES, settings, generator=torch.Generator().manual_seed(0)
    )
    tokens = torch.tensor(output.sequences)
    pairs = torch.cartesian_prod(torch.arange(V), torch.arange(V))
    rows = torch.cat([torch.tensor([PROMPT]).expand(len(pairs), -1), pairs], 1)
    logits = verifier.prefill(rows, logits="all").logits
    assert logits is not None
    p = sampling.distribution(logits[:, -3:]).double()
    pair = p[:, 0].gather(1, pairs[:, :1]) * p[:, 1].gather(1, pairs[:, 1:])
    return Sampled(
        chi_square(tokens @ torch.tensor([V * V, V, 1]), (pair * p[:, 2]).flatten()),
        chi_square(tokens @ torch.tensor([V, 1, 0]), pair[:, 0]),
        output.acceptance.tau,
    )


PLAIN, CUT = Sampling(0.9), Sampling(1.2, top_k=6, top_p=0.9)
STATIC = StaticTree.of_widths((3, 2))
SAMPLED: dict[str, Tree] = {
    "dynamic": DynamicTree(nodes=7, depth=2, children=4),
    "without replacement": STATIC,
    "with replacement": StaticTree(STATIC.paths, replacement=True),
    "more children than tokens": StaticTree.of_widths((9, 1)),
}


@pytest.mark.parametrize("shape", list(SAMPLED))
@pytest.mark.parametrize(("algorithm", "sampling"), [("eagle", PLAIN), ("eagle3", CUT)])
def test_sampling_is_lossless(
    eight: Verifier, algorithm: str, shape: str, sampling: Sampling
) -> None:
    options: dict[str, Any] = {}
    if algorithm == "eagle3":
        options = {"draft_vocab_size": 5, "aux_layer_ids": [0, 1, 2]}
    draft = make_draft(algorithm, eight, **options)
    found = sampled(eight, TreeDrafter(draft, eight, SAMPLED[shape], sampling), sampling)
    assert not found.three.rejected
    assert not found.two.rejected
    assert found.tau > 1.15


@pytest.mark.parametrize("sampling", [PLAIN, CUT], ids=["plain", "cut"])
def test_chosen_children_are_point_masses(eight: Verifier, sampling: Sampling) -> None:
    drafter = TreeDrafter(make_draft("eagle", eight), eight, STATIC)  # a greedy draft
    found = sampled(eight, drafter, sampling)
    assert not found.three.rejected
    assert not found.two.rejected
    assert found.tau > 1.15


class Biased(TreeDrafter):
    """Says that its children came about in another way than they did."""

    says: SamplingMode

    def propose_tree(self, roots: Tensor, uniforms: Tensor | None) -> TreeProposal:
        """The tree, with a wrong mode."""
        proposal = super().propose_tree(roots, uniforms)
        return TreeProposal(proposal.tree, proposal.layout, self.says, proposal.probabilities)


def test_unchanged_q_without_replacement_is_noticed(eight: Verifier) -> None:
    drafter = Biased(make_draft("eagle", eight), eight, STATIC, PLAIN)
    drafter.says = SamplingMode.WITH_REPLACEMENT
    found = sampled(eight, drafter, PLAIN)
    assert found.two.rejected
    assert found.two.power > 0.999


class ChosenWithQ(TreeDrafter):
    """Chooses the likeliest children, and says that they were drawn."""

    def propose_tree(self, roots: Tensor, uniforms: Tensor | None) -> TreeProposal:
        """Chosen children, with the q of drawn ones."""
        drawn = super().propose_tree(roots, uniforms)
        self._sampling = Sampling()
        chosen = super().propose_tree(roots, uniforms)
        self._sampling = PLAIN
        assert drawn.probabilities is not None
        assert chosen.layout is not None
        # Of the root's children the q is right either way; those below have other parents now.
        return TreeProposal(
            DraftTree(chosen.tree.tokens[:, :4], chosen.tree.parents[:, :4]),
            TokenTree(chosen.layout.depths[:, :4], chosen.layout.sees[:, :4, :4]),
            SamplingMode.WITHOUT_REPLACEMENT,
            drawn.probabilities[:, :1].contiguous(),
        )


def test_a_q_rule_on_the_likeliest_children_is_noticed(eight: Verifier) -> None:
    found = sampled(eight, ChosenWithQ(make_draft("eagle", eight), eight, STATIC, PLAIN), PLAIN)
    assert found.two.rejected
    assert found.two.power > 0.999


class WithoutDuplicates(TreeDrafter):
    """Draws with replacement, and leaves out a child that is the same as one before it."""

    def propose_tree(self, roots: Tensor, uniforms: Tensor | None) -> TreeProposal:
        """The tree less its duplicates."""
        proposal = super().propose_tree(roots, uniforms)
        tokens, parents = proposal.tree.tokens, proposal.tree.parents.clone()
        for node in range(2, tokens.shape[1]):
            same = (tokens[:, 1:node] == tokens[:, node, None]) & (
                parents[:, 1:node] == parents[:, node, None]
            )
            parents[same.any(1), node] = -1
        return TreeProposal(
            DraftTree(tokens, parents), proposal.layout, proposal.mode, proposal.probabilities
        )


def test_skipped_duplicates_are_noticed(eight: Verifier) -> None:
    shape = StaticTree.of_widths((4,), replacement=True)
    found = sampled(
        eight, WithoutDuplicates(make_draft("eagle", eight), eight, shape, PLAIN), PLAIN
    )
    assert found.two.rejected
    assert found.two.power > 0.999


class HostReads(TorchFunctionMode):
    """Refuses what makes the host wait for a device: to read from it, or to send lists to it."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs everything else."""
        name = getattr(func, "__name__", "")
        waits = {"item", "tolist", "nonzero", "unique", "tensor"}
        assert name not in waits | {"__bool__", "__int__", "__float__", "__index__", "__iter__"}
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("sampling", [Sampling(), PLAIN], ids=["greedy", "sampling"])
def test_a_draft_does_not_wait_for_the_device(eight: Verifier, sampling: Sampling) -> None:
    drafter = TreeDrafter(make_draft("eagle", eight), eight, STATIC, sampling)
    prompts = torch.tensor([PROMPT] * 3)
    output = eight.prefill(prompts, capture=drafter.capture)
    roots = torch.tensor([1, 2, 3])
    drafter.prefill(prompts, [5, 3, 4], roots, output.captured)
    uniforms = torch.rand(3, STATIC.nodes, dtype=torch.float64)
    with HostReads():
        proposal = drafter.propose_tree(roots, uniforms)
        assert drafter.propose(4, uniforms).tokens.shape == (3, 4)
    assert (proposal.probabilities is None) == sampling.greedy
    assert proposal.tree.tokens.shape == (3, 1 + STATIC.nodes)


def test_layout_of_a_static_tree() -> None:
    plan = layout(UNEVEN, torch.device("cpu"))
    # By depth, then by path: 0, 1, 2 | 00, 01, 20 | 000, 010, 011.
    assert plan.parents.tolist() == [-1, 0, 0, 0, 1, 1, 3, 4, 5, 5]
    assert plan.depths.tolist() == [0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    for node, parent in enumerate(plan.parents.tolist()):
        above = plan.sees[parent].clone() if parent >= 0 else torch.zeros(10, dtype=torch.bool)
        above[node] = True
        assert plan.sees[node].tolist() == above.tolist()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DynamicTree(0, 1, 1), "at least 1 of each"),
        (lambda: DynamicTree(3, 4, 1), "at least one for each depth"),
        (lambda: StaticTree(()), "at least one"),
        (lambda: StaticTree(((0,), (0,))), "each once"),
        (lambda: StaticTree(((0, 0),)), r"\(0, 0\) is in the tree without \[\(0,\)\]"),
        (lambda: StaticTree(((0,), (2,))), r"without \[\(1,\)\]"),
        (lambda: StaticTree.of_widths(()), "one or more"),
        (lambda: parse_tree("4,2,0", 1, 1, 1), "each 1 or more"),
        (lambda: parse_tree("wide", 1, 1, 1), "the tree is 'wide'; expected dynamic"),
    ],
)
def test_what_is_no_tree(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_trees_by_name(tmp_path: Path) -> None:
    assert parse_tree("dynamic", 9, 3, 2) == DynamicTree(9, 3, 2)
    assert parse_tree("2, 1", 9, 3, 2) == StaticTree(((0,), (1,), (0, 0), (1, 0)))
    file = tmp_path / "tree.json"
    file.write_text("[[0], [1], [0, 0]]")
    assert parse_tree(str(file), 9, 3, 2) == StaticTree(((0,), (1,), (0, 0)))
    for text, message in (
        ("[[0], [0, 1]]", r"without \[\(0, 0\)\]"),
        ("[[0.5]]", "no tree .* expected a list of paths"),
        ("3", "no tree"),
        ("[[", "no tree"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            parse_tree(str(file), 9, 3, 2)
