"""What the tree operators compute, in torch and plain Python: one sequence, one node at a time.

This is the definition that the kernels are tested against, and what serves where no library is
loaded. It is slow, and waits for the device. Each rule is written as in the textbook, with residual
distributions that are really made and normalised; the kernels reach the same by fewer passes
(csrc/tree_verification/verification.h).
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from speculators.ops.draft_tree import WORD_BITS

POINT_MASS, WITH_REPLACEMENT, WITHOUT_REPLACEMENT = range(3)


class ImpossibleTokenError(ValueError):
    """A drafted token has a draft probability of 0, or was drawn twice without replacement."""


def build_tree_reference(
    tokens: Tensor,
    parents: Tensor,
    scores: Tensor,
    root_tokens: Tensor,
    root_positions: Tensor,
    size: int,
) -> tuple[Tensor, ...]:
    """As the operator ``build_tree``; see ``tree_verification.build_tree``."""
    batch, nodes = tokens.shape[0], size + 1
    columns = [torch.empty(batch, nodes, dtype=torch.int64) for _ in range(7)]
    words = torch.empty(batch, nodes, -(-nodes // WORD_BITS), dtype=torch.int64)
    for row in range(batch):
        chosen = _choose(parents[row].tolist(), scores[row].tolist(), size)
        root = int(root_tokens[row]), int(root_positions[row])
        table, sets = _lay_out(chosen, tokens[row].tolist(), parents[row].tolist(), *root, nodes)
        for column, values in zip(columns, table, strict=True):
            column[row] = torch.tensor(values)
        for node, seen in enumerate(sets):
            words[row, node] = torch.tensor(_to_words(seen, words.shape[2]))
    new_tokens, new_parents, depths, positions, *links = columns
    result = (new_tokens, new_parents, depths, positions, words, *links)
    return tuple(column.to(tokens.device) for column in result)


def _choose(parents: list[int], scores: list[float], size: int) -> list[tuple[int, int]]:
    """The best candidates as (depth, candidate), in the order of the nodes."""
    bounded: list[float] = []
    depths: list[int] = []
    for parent, score in zip(parents, scores, strict=True):
        own = -math.inf if math.isnan(score) else score
        bounded.append(own if parent < 0 else min(own, bounded[parent]))
        depths.append(1 if parent < 0 else depths[parent] + 1)
    order = sorted(range(len(parents)), key=lambda i: (-bounded[i], i))
    best = [i for i in order if bounded[i] > -math.inf][:size]
    return sorted(((depths[i], i) for i in best), key=lambda pair: pair[0])  # a stable sort


def _lay_out(
    chosen: list[tuple[int, int]],
    tokens: list[int],
    parents: list[int],
    root_token: int,
    root_position: int,
    nodes: int,
) -> tuple[list[list[int]], list[set[int]]]:
    """The seven columns of a tree, and what each node sees."""
    node_of = {-1: 0} | {candidate: 1 + n for n, (_, candidate) in enumerate(chosen)}
    missing = nodes - 1 - len(chosen)
    padded = [(0, -1), *chosen, *[(-1, -1)] * missing]
    above = [-1, *(node_of[parents[candidate]] for _, candidate in chosen), *[-1] * missing]
    sets: list[set[int]] = []
    for node, parent in enumerate(above):
        sets.append({node} | (sets[parent] if parent >= 0 else set()))
    children = {n: [c for c in range(nodes) if above[c] == n] for n in range(nodes)}
    siblings = [-1] * nodes
    for family in children.values():
        for node, after in itertools.pairwise(family):
            siblings[node] = after
    table = [
        [tokens[candidate] if candidate >= 0 else root_token for _, candidate in padded],
        above,
        [depth for depth, _ in padded],
        [root_position + max(depth, 0) for depth, _ in padded],
        [children[n][0] if children[n] else -1 for n in range(nodes)],
        siblings,
        [candidate for _, candidate in padded],
    ]
    return table, sets


def _to_words(bits: set[int], count: int) -> list[int]:
    values = [sum(1 << (b % WORD_BITS) for b in bits if b // WORD_BITS == w) for w in range(count)]
    return [value - (1 << WORD_BITS) if value >> (WORD_BITS - 1) else value for value in values]


def target_distribution(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """p: temperature, then top-k, then top-p, as ``decoding.sampling.Sampling`` defines them.

    Of equally likely tokens at top-p's boundary those with higher ids stay.

    Args:
        logits: ``[..., V]``; a NaN counts as -inf.
        temperature: positive.
        top_k: keep the k largest and what ties with the last of them; 0: all.
        top_p: keep the fewest tokens that add up to at least this.

    Returns:
        float32 ``[..., V]``; NaN where a row has no finite logit.
    """
    scores = logits.float().masked_fill(logits.isnan(), -torch.inf) / temperature
    if 0 < top_k < scores.shape[-1]:
        kth = scores.topk(top_k, dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < kth, -torch.inf)
    probabilities = scores.softmax(-1)
    if top_p < 1.0:
        ascending, order = probabilities.sort(dim=-1, stable=True)
        cut = ascending.cumsum(-1) <= 1.0 - top_p
        cut[..., -1] = False
        cut = torch.zeros_like(cut).scatter(-1, order, cut)
        probabilities = probabilities.masked_fill(cut, 0.0)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities


def verify_greedy_reference(
    logits: Tensor, tokens: Tensor, parents: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As the operator ``verify_greedy``; see ``tree_verification.verify_greedy``."""
    best = logits.masked_fill(logits.isnan(), -torch.inf).argmax(-1).tolist()
    rows = zip(best, tokens.tolist(), parents.tolist(), strict=True)
    walks = [_walk_by_token(_Tree(*tree), choices.__getitem__) for choices, *tree in rows]
    return _results(walks, logits)


def verify_sampling_reference(
    logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    draft_probabilities: Tensor | None,
    uniforms: Tensor,
    mode: int,
    temperature: float,
    top_k: int,
    top_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the operator ``verify_sampling``; see ``tree_verification.verify_sampling``.

    Raises:
        ImpossibleTokenError: a token cannot have been drawn from ``draft_probabilities``.
    """
    walks = []
    for row in range(logits.shape[0]):
        p = target_distribution(logits[row], temperature, top_k, top_p).double()
        fallback = logits[row].masked_fill(logits[row].isnan(), -torch.inf).argmax(-1)
        p = torch.where(p.isnan(), torch.nn.functional.one_hot(fallback, p.shape[-1]), p)
        tree = _Tree(tokens[row].tolist(), parents[row].tolist())
        numbers: list[float] = uniforms[row].tolist()
        if mode == POINT_MASS:
            drawn = [_draw(p[node], numbers[node]) for node in range(len(p))]
            walks.append(_walk_by_token(tree, drawn.__getitem__))
        else:
            assert draft_probabilities is not None  # noqa: S101 - for the type checker
            q = draft_probabilities[row].double()
            try:
                walks.append(_walk_by_siblings(tree, p, q, numbers, mode == WITHOUT_REPLACEMENT))
            except ImpossibleTokenError as error:
                raise ImpossibleTokenError(f"tokens[{row}, {error}") from None
    return _results(walks, logits)


class _Tree:
    def __init__(self, tokens: list[int], parents: list[int]) -> None:
        self.tokens = tokens
        self._parents = parents

    def children(self, node: int) -> list[int]:
        return [c for c in range(node + 1, len(self.tokens)) if self._parents[c] == node]


def _walk_by_token(tree: _Tree, choice: Callable[[int], int]) -> tuple[list[int], int]:
    """Goes to the child that is the one token chosen after a node; the path and the bonus."""
    path: list[int] = []
    node = 0
    while True:
        token = choice(node)
        child = next((c for c in tree.children(node) if tree.tokens[c] == token), None)
        if child is None:
            return path, token
        path.append(child)
        node = child


def _walk_by_siblings(
    tree: _Tree, p: Tensor, q: Tensor, uniforms: list[float], without_replacement: bool
) -> tuple[list[int], int]:
    """Tests children one after the other against what q drew them from; the path and the bonus."""
    path: list[int] = []
    node = 0
    while True:
        r, rest = p[node], q[min(node, len(q) - 1)]  # a leaf's q is not read
        accepted = None
        for child in tree.children(node):
            token = tree.tokens[child]
            if not float(rest[token]) > 0:
                raise ImpossibleTokenError(f"{child}]")
            if uniforms[child] * float(rest[token]) < float(r[token]):
                accepted = child
                break
            residual = (r - rest).clamp(min=0)
            if not float(residual.sum()) > 0:
                break  # r is q but for rounding; then the rejection was rounding, too
            r = residual / residual.sum()
            if without_replacement:
                rest = rest.index_fill(0, torch.tensor([token], device=rest.device), 0.0)
                rest = rest / rest.sum().clamp(min=torch.finfo(rest.dtype).tiny)
        if accepted is None:
            return path, _draw(r, uniforms[0])
        path.append(accepted)
        node = accepted


def _draw(weights: Tensor, uniform: float) -> int:
    """One token, by inversion of the cumulative sum; never one of weight zero."""
    cumulative = weights.double().cumsum(-1)
    target = min(uniform * float(cumulative[-1]), math.nextafter(float(cumulative[-1]), 0.0))
    return int(torch.searchsorted(cumulative, target, right=True))


def _results(walks: Sequence[tuple[list[int], int]], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    width = like.shape[1] - 1
    path = torch.full((len(walks), width), -1, dtype=torch.int64)
    for row, (nodes, _) in enumerate(walks):
        path[row, : len(nodes)] = torch.tensor(nodes, dtype=torch.int64)
    accepted = torch.tensor([len(nodes) for nodes, _ in walks], dtype=torch.int64)
    bonus = torch.tensor([token for _, token in walks], dtype=torch.int64)
    return path.to(like.device), accepted.to(like.device), bonus.to(like.device)
