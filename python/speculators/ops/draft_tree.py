"""``DraftTree``: drafted tokens as a tree, and a chain as the tree that never branches.

One numbering holds wherever a tree goes. Node 0 is the root: the last accepted token, which the
verifier has not read yet. The drafted nodes follow, each after its parent. The verifier reads all N
nodes in one pass, and row i of its logits is the distribution of the token after node i. So an
accepted path is a list of rows, and the row of its last node gives one token more.

Sequences of a batch may have trees of different sizes. A node that is missing has the parent -1, as
the root has, and no walk from the root comes to it; its token must still be one that the verifier
can read.
"""

import dataclasses

import torch
from torch import Tensor

WORD_BITS = 64


@dataclasses.dataclass(frozen=True)
class DraftTree:
    """The tokens of B trees, with up to N nodes each.

    Attributes:
        tokens: int64 ``[B, N]``; ``tokens[:, 0]`` are the last accepted tokens.
        parents: int64 ``[B, N]``; the parent of node i is a node before i, or -1 for the root and
            for missing nodes. Siblings are in the order in which they were drawn.
        selected: whether nodes were kept by score, as ``build_tree`` does. Then which children a
            node has depends on what they are, and only point-mass verification is lossless.
    """

    tokens: Tensor
    parents: Tensor
    selected: bool = False


@dataclasses.dataclass(frozen=True)
class SelectedTree(DraftTree):
    """What ``build_tree`` makes: the best nodes, sorted by depth, then by score.

    Attributes:
        depths: int64 ``[B, N]``, of the root 0, of missing nodes -1.
        positions: int64 ``[B, N]``, where the verifier reads a node: the root's position + depth.
        ancestors: int64 ``[B, N, ceil(N / 64)]``, what a node sees of the tree: bit j % 64 of word
            j // 64 is set if node j is the node itself or above it. The bits are those of a uint64
            (``ancestors.view(torch.uint64)``), for which torch has few operators.
        first_children: int64 ``[B, N]``, the best child, or -1.
        next_siblings: int64 ``[B, N]``, the next best child of the same parent, or -1.
        candidates: int64 ``[B, N]``, which candidate a node was, -1 for the root and missing nodes.
    """

    depths: Tensor = dataclasses.field(kw_only=True)
    positions: Tensor = dataclasses.field(kw_only=True)
    ancestors: Tensor = dataclasses.field(kw_only=True)
    first_children: Tensor = dataclasses.field(kw_only=True)
    next_siblings: Tensor = dataclasses.field(kw_only=True)
    candidates: Tensor = dataclasses.field(kw_only=True)


def chain_tree(tokens: Tensor, counts: Tensor | None = None) -> DraftTree:
    """A chain as a tree: node i's parent is node i - 1.

    Args:
        tokens: int64 ``[B, K + 1]``, the last accepted token and K drafted ones: what the verifier
            reads.
        counts: int64 ``[B]``, how many of the drafted tokens are real, the first ones; None: all.

    Raises:
        ValueError: a shape is wrong.
    """
    if tokens.dim() != 2 or tokens.shape[1] < 1:
        raise ValueError(
            f"tokens has the shape {list(tokens.shape)}, expected [B, K + 1]: the last accepted "
            "token, and K drafted ones"
        )
    nodes = torch.arange(tokens.shape[1], device=tokens.device)
    parents = (nodes - 1).expand_as(tokens)
    if counts is not None:
        if counts.shape != tokens.shape[:1]:
            raise ValueError(f"counts has the shape {list(counts.shape)}, expected [B]")
        parents = parents.masked_fill(nodes > counts[:, None], -1)
    return DraftTree(tokens, parents)


def mask_of(ancestors: Tensor) -> Tensor:
    """Words of bits as booleans: int64 ``[B, N, words]`` to bool ``[B, N, N]``."""
    nodes = torch.arange(ancestors.shape[1], device=ancestors.device)
    words = ancestors[..., nodes // WORD_BITS]
    return (words >> (nodes % WORD_BITS)) & 1 != 0
