"""Which rows fall into which chunk, when several drafting steps learn from the same target rows.

Target rows are cut into chunks in rising order. Each step's pairs of a draft row and a target row
are sorted by target, so that those of one chunk stand side by side. All of it is index arithmetic
on the device; the host learns, once, how many chunks there are and where the steps' pairs are cut.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Piece:
    """Pairs of one step that learn from one chunk; int64 ``[r]``, r at most ``chunk_rows``.

    Attributes:
        step: which step.
        pairs: which of the step's R pairs.
        positions: where in the chunk their target rows stand.
    """

    step: int
    pairs: Tensor
    positions: Tensor


@dataclasses.dataclass(frozen=True)
class Chunk:
    """At most ``chunk_rows`` target rows, rising, and the pieces that learn from them."""

    target_rows: Tensor
    pieces: list[Piece]


def plan_chunks(target_rows: Sequence[Tensor], chunk_rows: int) -> list[Chunk]:
    """Chunks of the target rows that any step names, each row in exactly one of them.

    Args:
        target_rows: for each of K >= 1 steps int64 ``[R_k]``: the target rows of its pairs, in any
            order, repeats allowed.
        chunk_rows: the most rows of a chunk, and of a piece; at least 1.

    Returns:
        The chunks; together their pieces hold each pair of each step once, targets rising.
    """
    used, inverse = torch.cat(list(target_rows)).unique(return_inverse=True)
    if not len(used):
        return []
    begins = torch.arange(0, len(used) + chunk_rows, chunk_rows, device=used.device)
    sorted_ranks = [
        rank.sort(stable=True) for rank in inverse.split([len(rows) for rows in target_rows])
    ]
    cuts = torch.stack([torch.searchsorted(ranks, begins) for ranks, _ in sorted_ranks]).tolist()
    chunks = []
    for number, rows in enumerate(used.split(chunk_rows)):
        pieces = []
        for step, (ranks, order) in enumerate(sorted_ranks):
            end = cuts[step][number + 1]
            # More pairs than targets, where a step names a target repeatedly.
            for begin in range(cuts[step][number], end, chunk_rows):
                part = slice(begin, min(begin + chunk_rows, end))
                pieces.append(Piece(step, order[part], ranks[part] - number * chunk_rows))
        chunks.append(Chunk(rows, pieces))
    return chunks
