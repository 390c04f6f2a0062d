"""Tree verification and building against the definition in torch, and one read of the logits.

Chains of K = 8 drafted tokens and dynamic trees of n = 60, from the verifier's logits to the
accepted path. The verifier agrees with the draft, certainly when greedy and mostly when it samples,
so that the walk is long and reads as many rows as there can be; the logits are such that the tokens
agreed upon have the probability ``AGREEMENT``. The floor is one read of the logits of all nodes.
(A walk needs no rows of nodes that it does not come to. Where an operator makes use of that, it
takes less than its floor in a tree.)

Sequences of a batch have the same logits and trees, but uniform numbers of their own.

Two implementations stand beside the operators. The reference defines what they compute; it is plain
Python around torch, one sequence after the other. For chains there is also what a decoder without
operators does, in whole tensors for the batch. ``build_tree`` reads no logits, and has no floor.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from benchmarks.measurement import MIB, Call, dtype_of
from benchmarks.ops.bench import Bench
from benchmarks.report import Row
from torch import Tensor

from speculators.decoding.sampling import Sampling, draw
from speculators.ops import tree_verification_reference as reference
from speculators.ops.draft_tree import DraftTree, chain_tree
from speculators.ops.tree_verification import (
    SamplingMode,
    TreeVerdict,
    build_tree,
    verify_greedy,
    verify_sampling,
)

VERIFICATION, BUILDING = "tree_verification", "tree_verification: build_tree"
OURS, REFERENCE, WHOLE = "operator", "reference", "whole tensors"

BATCHES, ALL_BATCHES = (1, 8, 32), (1, 2, 4, 8, 16, 32)
VOCABULARIES, ALL_VOCABULARIES = (32000, 151936), (32000, 65536, 128256, 151936)
DTYPES = ("float32", "bfloat16")
CHAIN, TREE, DEPTH, CHILDREN = 8, 60, 6, 10
AGREEMENT = 0.9

Candidates = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

SMALL = 16 * MIB
"""Logits that caches may hold; goals are stated apart for them, as overheads count there."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """How tokens are accepted.

    Attributes:
        mode: None for greedy verification.
        top_p: of the sampling.
        trees: whether trees are verified by it as well as chains.
    """

    mode: SamplingMode | None
    top_p: float = 1.0
    trees: bool = True

    @property
    def takes_q(self) -> bool:
        """Whether it must know what tokens were drawn from."""
        return self.mode not in {None, SamplingMode.POINT_MASS}


RULES = {
    "greedy": Rule(None),
    "point_mass": Rule(SamplingMode.POINT_MASS),
    "point_mass, top-p 0.95": Rule(SamplingMode.POINT_MASS, 0.95),
    "with_replacement": Rule(SamplingMode.WITH_REPLACEMENT, trees=False),
}
"""By name. A dynamic tree is cut by score, so that no rule with q would be right for it."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One size.

    Attributes:
        rule: by its name.
        nodes: drafted ones; CHAIN for a chain, else a tree.
        batch: B.
        vocabulary: V.
        dtype: of the logits.
        device: where.
    """

    rule: str
    nodes: int
    batch: int
    vocabulary: int
    dtype: str
    device: str

    def __str__(self) -> str:
        drafted = f"chain K={self.nodes}" if self.nodes == CHAIN else f"tree n={self.nodes}"
        return f"{self.rule} {drafted} {self.dtype} B={self.batch} V={self.vocabulary}"

    @property
    def series(self) -> str:
        """The same for cases that differ in the batch alone."""
        return str(dataclasses.replace(self, batch=0))

    @property
    def logit_bytes(self) -> int:
        """Of the rows of all nodes, the root's included."""
        rows = self.batch * (self.nodes + 1)
        return rows * self.vocabulary * dtype_of(self.dtype).itemsize

    @property
    def needed(self) -> int:
        """Bytes of logits and q together, and of a copy and a mask of the logits."""
        q = self.batch * CHAIN * self.vocabulary * 4
        return 5 * self.logit_bytes // 2 + q * RULES[self.rule].takes_q


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a case is called with: logits ``[B, N, V]``, q ``[B, K, V]`` or None, uniforms."""

    rule: Rule
    logits: Tensor
    tree: DraftTree
    uniforms: Tensor
    q: Tensor | None

    @classmethod
    def of(cls, case: Case) -> "Inputs":
        """Always the same; all sequences have the same logits, each a copy of its own."""
        rule, generator = RULES[case.rule], torch.Generator(case.device).manual_seed(0)
        options: dict[str, Any] = {"generator": generator, "device": case.device}
        tree = chain(case, generator) if case.nodes == CHAIN else selected(case, generator)
        nodes = case.nodes + 1
        parents, tokens = tree.parents[0].tolist(), tree.tokens[0].tolist()
        logits = torch.randn(nodes, case.vocabulary, **options)
        q = torch.randn(case.nodes, case.vocabulary, **options).mul_(2)
        # What the others of a row come to is V exp(1 / 2), their mean.
        peak = math.log(case.vocabulary * AGREEMENT / (1 - AGREEMENT)) + 0.5
        for node in reversed(range(1, nodes)):  # so that of siblings the first one counts
            logits[parents[node]].clamp_(max=peak - 1)
            logits[parents[node], tokens[node]] = peak
        for node in range(1, nodes if rule.takes_q else 0):
            q[parents[node], tokens[node]] = peak
        return cls(
            rule,
            logits.to(dtype_of(case.dtype)).repeat(case.batch, 1, 1),
            tree,
            torch.rand(case.batch, nodes, dtype=torch.float64, **options),
            q.softmax(-1).repeat(case.batch, 1, 1) if rule.takes_q else None,
        )


def chain(case: Case, generator: torch.Generator) -> DraftTree:
    """Random tokens, the same for all sequences."""
    shape = (1, case.nodes + 1)
    tokens = torch.randint(case.vocabulary, shape, generator=generator, device=case.device)
    made = chain_tree(tokens.repeat(case.batch, 1))
    return DraftTree(made.tokens, made.parents.contiguous())


def selected(case: Case, generator: torch.Generator) -> DraftTree:
    """The best nodes of what a draft has grown."""
    return build_tree(*candidates(case, generator), case.nodes)


def candidates(case: Case, generator: torch.Generator) -> Candidates:
    """A grown tree as EAGLE-2 grows it: tokens, parents, scores, root tokens, root positions.

    CHILDREN nodes, and CHILDREN of each of the best CHILDREN at each further depth. Siblings have
    random tokens, and probabilities that halve from one to the next, but for some noise.
    """
    ranks = torch.arange(CHILDREN, device=case.device)
    halves = (ranks + 1) * -math.log(2)

    def noisy(rows: int) -> Tensor:
        shape = (rows, CHILDREN)
        return halves - torch.rand(shape, generator=generator, device=case.device)

    scores, parents = [noisy(1)[0]], [torch.full_like(ranks, -1)]
    best, first = ranks, 0
    for _ in range(1, DEPTH):
        above = scores[-1][best]
        parents.append((first + best).repeat_interleave(CHILDREN))
        first += len(scores[-1])
        scores.append((above[:, None] + noisy(CHILDREN)).flatten())
        best = scores[-1].topk(CHILDREN).indices
    score, parent = torch.cat(scores), torch.cat(parents)
    token = torch.randint(case.vocabulary, score.shape, generator=generator, device=case.device)
    roots = torch.zeros(case.batch, dtype=torch.int64, device=case.device)
    token, parent, score = (column.repeat(case.batch, 1) for column in (token, parent, score))
    return token, parent, score, roots, roots


def verify(by: str, inputs: Callable[[], Inputs]) -> Call:
    """One verification, by one of the implementations."""
    made = inputs()
    if by == OURS:
        return functools.partial(_operator, made)
    return functools.partial(_whole if by == WHOLE else _reference, made)


def _operator(made: Inputs) -> TreeVerdict:
    rule = made.rule
    if rule.mode is None:
        return verify_greedy(made.logits, made.tree)
    return verify_sampling(
        made.logits, made.tree, made.uniforms, mode=rule.mode, draft_probabilities=made.q,
        top_p=rule.top_p,
    )  # fmt: skip


def _reference(made: Inputs) -> TreeVerdict:
    rule, tree = made.rule, (made.tree.tokens, made.tree.parents)
    if rule.mode is None:
        return TreeVerdict(*reference.verify_greedy_reference(made.logits, *tree))
    numbers = (int(rule.mode), 1.0, 0, rule.top_p)
    return TreeVerdict(
        *reference.verify_sampling_reference(made.logits, *tree, made.q, made.uniforms, *numbers)
    )


def _whole(made: Inputs) -> tuple[Tensor, Tensor]:
    """A chain, as decoders verify it without such operators: all rows, all tokens."""
    drafted = made.tree.tokens[:, 1:]
    if made.rule.mode is None:
        best = made.logits.argmax(-1)
        accepted = (best[:, :-1] == drafted).long().cumprod(1).sum(1)
        return accepted, best.gather(1, accepted[:, None])[:, 0]
    p = Sampling(temperature=1.0, top_p=made.rule.top_p).distribution(made.logits)
    one, last = drafted[..., None], drafted.shape[1] - 1
    q = 1.0 if made.q is None else made.q.gather(2, one)[..., 0]
    accept = made.uniforms[:, 1:] * q < p[:, :-1].gather(2, one)[..., 0]
    accepted = accept.long().cumprod(1).sum(1)
    rows, place = torch.arange(len(p), device=p.device), accepted.clamp(max=last)
    weights = p[rows, accepted]
    if made.q is None:
        rest = weights.scatter(1, drafted.gather(1, place[:, None]), 0.0)
    else:
        rest = (weights - made.q[rows, place]).clamp(min=0)
    weights = torch.where((accepted <= last)[:, None], rest, weights)
    return accepted, draw(weights, made.uniforms[:, 0])


def cases(bench: Bench) -> Iterator[Case]:
    """Rising in B."""
    batches: Sequence[int] = ALL_BATCHES if bench.full else BATCHES
    vocabularies: Sequence[int] = ALL_VOCABULARIES if bench.full else VOCABULARIES
    if bench.quick:
        batches, vocabularies = (1, 2), (512,)
    for name, rule in RULES.items():
        for nodes in (CHAIN, TREE) if rule.trees else (CHAIN,):
            for dtype in DTYPES:
                for vocabulary in vocabularies:
                    for batch in batches:
                        yield Case(name, nodes, batch, vocabulary, dtype, bench.device)


def run(bench: Bench) -> None:
    """All rules, sizes and implementations."""
    worst: dict[str, float] = {}
    for case in cases(bench):
        ratio = _measure(bench, case)
        if RULES[case.rule].top_p < 1 or bench.device != "cpu":
            continue
        size = "at most" if case.logit_bytes <= SMALL else "more than"
        drafted = "chain" if case.nodes == CHAIN else "tree"
        goal = (
            f"tree_verification, {case.rule}, {drafted}: times one read of the logits, of {size} "
            f"{SMALL // MIB} MiB, the worst"
        )
        worst[goal] = max(worst.get(goal, 0.0), ratio)
    for goal, ratio in worst.items():
        bench.report.goal(goal, ratio, most=1.5)
    batches = (1, 2) if bench.quick else ALL_BATCHES
    for batch in batches:
        _measure_building(bench, Case("", TREE, batch, 32000, "float32", bench.device))


def _measure(bench: Bench, case: Case) -> float:
    """All implementations; how many times its floor the operator takes."""
    inputs = functools.cache(functools.partial(Inputs.of, case))
    floor = bench.floors.read_seconds(case.logit_bytes)
    note, ratio = "", math.nan
    for by in (OURS, REFERENCE, *([WHOLE] if case.nodes == CHAIN else [])):
        time, problem = bench.try_seconds(
            f"{by} {case.series}", case.batch, functools.partial(verify, by, inputs), case.needed
        )
        if by == OURS and time is not None:
            ratio = time.median / floor
            if not time.extrapolated:
                note = _check(case, inputs())
        row = Row(VERIFICATION, str(case), by, time, floor, note=problem or note)
        bench.report.add(dataclasses.replace(row, moved=case.logit_bytes))
        note = ""
    return ratio


def _check(case: Case, inputs: Inputs) -> str:
    """How much is accepted; with a single sequence it is compared with the reference."""
    verdict = _operator(inputs)
    if case.batch == 1:
        expected = _reference(inputs)
        torch.testing.assert_close(verdict.path, expected.path)
        torch.testing.assert_close(verdict.next_tokens, expected.next_tokens)
    return f"{float(verdict.accepted.double().mean()):.1f} accepted"


def _measure_building(bench: Bench, case: Case) -> None:
    grown = candidates(case, torch.Generator(case.device).manual_seed(0))
    name = f"n={case.nodes} of {grown[0].shape[1]} B={case.batch}"
    functions: dict[str, Callable[..., object]] = {
        OURS: build_tree,
        REFERENCE: reference.build_tree_reference,
    }
    for by, function in functions.items():
        make = functools.partial(functools.partial, function, *grown, case.nodes)
        time, note = bench.try_seconds(f"{by} build_tree", case.batch, make)
        bench.report.add(Row(BUILDING, name, by, time, note=note))
