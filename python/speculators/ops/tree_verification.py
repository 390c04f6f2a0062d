"""Tree verification: build a tree of drafted tokens, and find what the verifier accepts of it.

:func:`build_tree` keeps the best nodes of a drafted tree; :func:`verify_greedy` and
:func:`verify_sampling` go from the verifier's logits to the accepted path and the bonus token, and
nothing waits for the device. :mod:`speculators.ops.draft_tree` says how nodes are numbered. A chain
is the tree ``chain_tree(tokens)``, and a root alone is what plain decoding verifies.

Sampling is lossless only if the rule fits the way in which siblings came about, so the mode is
always named:

=========================  ==========================  =============================================
mode                       siblings                    rule
=========================  ==========================  =============================================
``POINT_MASS``             chosen: top-k, beams,       accept child x with probability r(x), else
                           n-grams, re-ranked trees,   r(x) <- 0. The same: draw y from p, go to the
                           greedy chains               child that is y. q does not matter
``WITH_REPLACEMENT``       i.i.d. from q, duplicates   accept with min(1, r / q), else
                           kept; sampled chains        r <- norm((r - q)+)
``WITHOUT_REPLACEMENT``    drawn from q one after the  q_i: q without the seen tokens, normalised;
                           other, in this order        accept with min(1, r / q_i), else
                                                       r <- norm((r - q_i)+)
=========================  ==========================  =============================================

What is biased is refused where it can be seen: a q rule on a tree that was selected by score, q
with point masses, a token that its q cannot have drawn (a duplicate without replacement is one).
What cannot be seen is up to the caller: q must be the very distribution that was drawn from, and
no duplicate may be left out with replacement (the children that then remain were drawn without).
"""

import dataclasses
import enum
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from speculators.ops import backend
from speculators.ops import tree_verification_reference as reference
from speculators.ops.backend import Backend
from speculators.ops.draft_tree import WORD_BITS, DraftTree, SelectedTree

_DTYPES = (torch.bfloat16, torch.float32)
LEAST_TEMPERATURE = 1e-6


class SamplingMode(enum.IntEnum):
    """How the siblings of a tree came about."""

    POINT_MASS = reference.POINT_MASS
    WITH_REPLACEMENT = reference.WITH_REPLACEMENT
    WITHOUT_REPLACEMENT = reference.WITHOUT_REPLACEMENT


@dataclasses.dataclass(frozen=True)
class TreeVerdict:
    """What became of the drafted nodes.

    Attributes:
        path: int64 ``[B, N - 1]``, the accepted nodes from the root's child on, then -1.
        accepted: int64 ``[B]``, how many nodes are accepted.
        next_tokens: int64 ``[B]``, the bonus: the verifier's token after the accepted ones.
    """

    path: Tensor
    accepted: Tensor
    next_tokens: Tensor

    def emitted(self, tree: DraftTree) -> Tensor:
        """The new tokens of each sequence, int64 ``[B, N]``: accepted ones, the bonus, then -1."""
        tokens = tree.tokens.gather(1, self.path.clamp(min=0)).masked_fill(self.path < 0, -1)
        tokens = torch.cat([tokens, tokens.new_full((len(tokens), 1), -1)], 1)
        return tokens.scatter(1, self.accepted[:, None], self.next_tokens[:, None])


def build_tree(
    tokens: Tensor,
    parents: Tensor,
    scores: Tensor,
    root_tokens: Tensor,
    root_positions: Tensor,
    size: int,
) -> SelectedTree:
    """Keeps the best nodes of drafted trees (EAGLE-2, section 4.2: re-ranking).

    The best are connected, because a child's cumulative log-probability is never above its
    parent's. A score that is above it all the same (by rounding) counts as the parent's. Of equal
    scores the lower index wins, so a parent before its child. The result does not depend on the
    device.

    Args:
        tokens: int64 ``[B, M]``, the candidates, M >= 0.
        parents: int64 ``[B, M]``, the candidate before, always one of a lower index; -1: the root.
        scores: float32 ``[B, M]``, sums of log-probabilities from the root on; -inf (or NaN) where
            a sequence has fewer candidates.
        root_tokens: int64 ``[B]``, the last accepted tokens.
        root_positions: int64 ``[B]``, their positions.
        size: n, how many nodes to keep at most, the root not counted.

    Returns:
        Trees of N = n + 1 nodes. Missing nodes see themselves alone, and have the root's token and
        position, so that the verifier can read them.

    Raises:
        TypeError: a dtype is another.
        ValueError: a shape or device differs, or size is negative.
        IndexError: a parent is out of range (on CPU; on CUDA it stops the kernel).

    Example:
        >>> t = torch.tensor
        >>> tree = build_tree(
        ...     t([[7, 8, 9]]), t([[-1, -1, 1]]), t([[-2.0, -0.1, -0.3]]), t([5]), t([40]), size=2
        ... )
        >>> tree.tokens, tree.parents, tree.positions
        (tensor([[5, 8, 9]]), tensor([[-1,  0,  1]]), tensor([[40, 41, 42]]))
    """
    shape = tokens.shape
    _expect(tokens, "tokens", torch.int64, None, tokens.device, "[B, M]", 2)
    _expect(parents, "parents", torch.int64, shape, tokens.device, "[B, M]")
    _expect(scores, "scores", torch.float32, shape, tokens.device, "[B, M]")
    _expect(root_tokens, "root_tokens", torch.int64, shape[:1], tokens.device, "[B]")
    _expect(root_positions, "root_positions", torch.int64, shape[:1], tokens.device, "[B]")
    if size < 0:
        raise ValueError(f"size is {size}, expected how many nodes to keep, 0 or more")
    arguments = (tokens, parents, scores, root_tokens, root_positions, size)
    result = _run("build_tree", lambda: _check_parents(parents, 0), *arguments)
    new_tokens, new_parents, depths, positions, ancestors, first, after, candidates = result
    return SelectedTree(
        new_tokens,
        new_parents,
        selected=True,
        depths=depths,
        positions=positions,
        ancestors=ancestors,
        first_children=first,
        next_siblings=after,
        candidates=candidates,
    )


def verify_greedy(logits: Tensor, tree: DraftTree) -> TreeVerdict:
    """Accepts the path on which each token is the verifier's most likely one.

    Args:
        logits: bfloat16 or float32 ``[B, N, V]``, compared in their own dtype, the lowest id on
            ties. A NaN counts as -inf. Rows may lie apart.
        tree: the drafted trees, on the same device.

    Returns:
        The path, of several children with one token the first; how long it is; the bonus token.

    Raises:
        TypeError: a dtype is another.
        ValueError: a shape or device differs.
        IndexError: a parent or token is out of range (on CPU; on CUDA it stops the kernel).
    """
    _check_tree(logits, tree)
    arguments = (logits, tree.tokens, tree.parents)
    return TreeVerdict(*_run("verify_greedy", lambda: _check_values(logits, tree), *arguments))


def verify_sampling(
    logits: Tensor,
    tree: DraftTree,
    uniforms: Tensor,
    *,
    mode: SamplingMode,
    draft_probabilities: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> TreeVerdict:
    """Accepts at random, such that what is emitted has the verifier's distribution p.

    p is what ``decoding.sampling.Sampling`` makes of the logits: temperature, then top-k with all
    that tie with the k-th, then top-p. (Where the mass at top-p's boundary differs by rounding
    alone, a kernel may keep another token there.)

    Leviathan et al. 2023 and Chen et al. 2023 for chains; Miao et al., SpecInfer, 2024, algorithm 2
    for ``WITH_REPLACEMENT``; Jeon et al. 2024 and Yang et al. 2024 for ``WITHOUT_REPLACEMENT``.

    Args:
        logits: bfloat16 or float32 ``[B, N, V]``, the verifier's, raw. A NaN counts as -inf.
        tree: the drafted trees, on the same device.
        uniforms: float64 ``[B, N]`` in [0, 1), drawn independently of the tree. ``POINT_MASS``
            draws the token after node i with number i; the others test node i with number i, and
            draw the last token with number 0.
        mode: how the siblings came about.
        draft_probabilities: q, float32 ``[B, R, V]``: row i is what the children of node i were
            drawn from, with the draft's own temperature, top-k and top-p; R is larger than every
            parent (a chain of K tokens has K rows). None with ``POINT_MASS``, which ignores it.
        temperature: divides the logits; 0 is greedy, whatever the mode.
        top_k: keep the k most likely tokens; 0: all.
        top_p: keep the fewest tokens whose probabilities add up to at least this; 1: all.

    Returns:
        The path, how long it is, and the bonus token.

    Raises:
        TypeError: a dtype is another.
        ValueError: a shape or device differs, a setting is out of range, or the mode would be
            biased: a q rule on a selected tree, q missing or not wanted, or (on CPU; on CUDA it
            stops the kernel) a token that cannot have been drawn.
        IndexError: a parent or token is out of range (on CPU; on CUDA it stops the kernel).
    """
    _check_settings(temperature, top_k, top_p)
    _check_mode(tree, SamplingMode(mode), draft_probabilities)
    _check_tree(logits, tree)
    _expect(uniforms, "uniforms", torch.float64, tree.tokens.shape, logits.device, "[B, N]")
    if draft_probabilities is not None:
        _check_draft(logits, draft_probabilities)

    def check() -> None:
        _check_values(logits, tree, draft_probabilities, uniforms)

    if temperature == 0:
        if _can_look(logits):
            check()
        return verify_greedy(logits, tree)
    arguments = (logits, tree.tokens, tree.parents, draft_probabilities, uniforms)
    settings = (int(mode), float(temperature), top_k, float(top_p))
    try:
        return TreeVerdict(*_run("verify_sampling", check, *arguments, *settings))
    except (RuntimeError, reference.ImpossibleTokenError) as error:
        if "cannot have been drawn" in str(error):
            raise ValueError(str(error).splitlines()[0]) from None
        if isinstance(error, reference.ImpossibleTokenError):
            raise ValueError(
                f"{error} cannot have been drawn: draft_probabilities is 0 there, or an earlier "
                "sibling has the token. Pass what it was drawn from, or use the mode that it was "
                "drawn in"
            ) from None
        raise


def _run(name: str, check: Callable[[], None], *arguments: Any) -> Any:
    """The operator, or its reference.

    Operators refuse numbers that are out of range. ``check`` says it better, but takes longer than
    they do: so it runs once they have refused, and before the reference, which looks at nothing.
    """
    if backend.choose(arguments[0].device.type).backend is Backend.REFERENCE:
        if _can_look(arguments[0]):
            check()
        return getattr(reference, f"{name}_reference")(*arguments)
    try:
        return getattr(torch.ops.speculators, name)(*arguments)
    except RuntimeError:
        if _can_look(arguments[0]):
            check()
        raise


def _can_look(tensor: Tensor) -> bool:
    """Whether values may be read: not where that waits for a device, nor while tracing."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _expect(
    tensor: Tensor,
    name: str,
    dtype: torch.dtype,
    shape: torch.Size | None,
    device: torch.device,
    meaning: str,
    dimensions: int = 0,
) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name} is {tensor.dtype}, expected {dtype}")
    if tensor.shape != shape if shape is not None else tensor.dim() != dimensions:
        wanted = meaning if shape is None else f"{meaning} = {list(shape)}"
        raise ValueError(f"{name} has the shape {list(tensor.shape)}, expected {wanted}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device} as the others; move it")


def _check_tree(logits: Tensor, tree: DraftTree) -> None:
    if logits.dtype not in _DTYPES:
        names = " or ".join(str(dtype) for dtype in _DTYPES)
        raise TypeError(f"logits is {logits.dtype}, expected {names}")
    if logits.dim() != 3 or 0 in logits.shape[1:]:
        raise ValueError(
            f"logits has the shape {list(logits.shape)}, expected [B, N, V] with the root's row, "
            "and at least one token"
        )
    _expect(tree.tokens, "tree.tokens", torch.int64, logits.shape[:2], logits.device, "[B, N]")
    _expect(tree.parents, "tree.parents", torch.int64, logits.shape[:2], logits.device, "[B, N]")


def _check_values(
    logits: Tensor, tree: DraftTree, q: Tensor | None = None, uniforms: Tensor | None = None
) -> None:
    """Says which numbers are out of range."""
    _check_parents(tree.parents, 1)
    drafted, width = tree.parents >= 0, logits.shape[2]
    outside = (drafted & ((tree.tokens < 0) | (tree.tokens >= width))).nonzero()
    if outside.numel():
        row, node = outside[0].tolist()
        raise IndexError(
            f"tree.tokens[{row}, {node}] is {int(tree.tokens[row, node])}, expected 0 <= token < "
            f"{width} (V)"
        )
    if q is not None and tree.parents.numel() and int(tree.parents.max()) >= q.shape[1]:
        raise ValueError(
            f"draft_probabilities has {q.shape[1]} rows, expected more than "
            f"{int(tree.parents.max())}, the last node that has children"
        )
    if uniforms is not None and not bool(((uniforms >= 0) & (uniforms < 1)).all()):
        raise ValueError("uniforms has a number outside of [0, 1)")


def _check_parents(parents: Tensor, root: int) -> None:
    """Parents come before their children; ``root`` says whether the first node is the root."""
    limits = torch.arange(parents.shape[1], device=parents.device)
    outside = ((parents < -1) | (parents >= limits)).nonzero()
    if outside.numel():
        row, node = outside[0].tolist()
        name = "tree.parents" if root else "parents"
        raise IndexError(
            f"{name}[{row}, {node}] is {int(parents[row, node])}, expected -1 <= parent < {node}: "
            "number parents before their children"
        )


def _check_draft(logits: Tensor, q: Tensor) -> None:
    batch, _, width = logits.shape
    rows = q.shape[1] if q.dim() == 3 else 0
    shape = torch.Size((batch, rows, width))
    _expect(q, "draft_probabilities", torch.float32, shape, logits.device, "[B, R, V]")


def _check_mode(tree: DraftTree, mode: SamplingMode, q: Tensor | None) -> None:
    if mode is SamplingMode.POINT_MASS:
        if q is not None:
            raise ValueError(
                "draft_probabilities is given with POINT_MASS, which ignores it: leave it out, or "
                "name the mode in which the tokens were drawn from it"
            )
        return
    if q is None:
        raise ValueError(
            f"{mode.name} needs draft_probabilities, what the tokens were drawn from; tokens that "
            "were not drawn but chosen want POINT_MASS"
        )
    if tree.selected:
        raise ValueError(
            f"{mode.name} on a tree that was selected by score is biased: expected POINT_MASS"
        )


def _check_settings(temperature: float, top_k: int, top_p: float) -> None:
    if temperature != 0 and not LEAST_TEMPERATURE <= temperature < math.inf:
        raise ValueError(
            f"temperature is {temperature}, expected 0 (greedy) or at least {LEAST_TEMPERATURE}"
        )
    if top_k < 0:
        raise ValueError(f"top_k is {top_k}, expected 0 (all tokens) or at least 1")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p is {top_p}, expected more than 0 and at most 1")
    if temperature == 0 and (top_k or top_p < 1.0):
        raise ValueError(
            f"top_k is {top_k} and top_p {top_p} with temperature 0, which is greedy: expected a "
            "positive temperature, or neither of the two"
        )


def _build_tree_fake(
    tokens: Tensor,
    parents: Tensor,
    scores: Tensor,
    root_tokens: Tensor,
    root_positions: Tensor,
    size: int,
) -> tuple[Tensor, ...]:
    del parents, scores, root_tokens, root_positions
    shape = (tokens.shape[0], size + 1)
    words = -(-shape[1] // WORD_BITS)
    columns = [tokens.new_empty(shape) for _ in range(7)]
    return (*columns[:4], tokens.new_empty((*shape, words)), *columns[4:])


def _verify_greedy_fake(
    logits: Tensor, tokens: Tensor, parents: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    del parents
    batch, nodes, _ = logits.shape
    return (
        tokens.new_empty((batch, nodes - 1)),
        tokens.new_empty((batch,)),
        tokens.new_empty((batch,)),
    )


def _verify_sampling_fake(
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
    del draft_probabilities, uniforms, mode, temperature, top_k, top_p
    return _verify_greedy_fake(logits, tokens, parents)


if backend.LIBRARIES[Backend.CPU].loaded:
    torch.library.register_fake("speculators::build_tree", _build_tree_fake)
    torch.library.register_fake("speculators::verify_greedy", _verify_greedy_fake)
    torch.library.register_fake("speculators::verify_sampling", _verify_sampling_fake)
