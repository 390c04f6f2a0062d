"""``DraftCache``: what a draft remembers of B sequences while it drafts.

Each row has a slot. Committed rows, which have the verifier's states, come first; drafted rows
follow them and are thrown away when the verifier has spoken. Sequences commit different numbers of
rows, so each counts its own slots from the left. A row is visible to all later slots, but in a tree
of drafts, where a mask says which drafted rows are ancestors.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from speculators.models.draft_attention import DraftAttention


class DraftCache(DraftAttention):
    """Keys and values of committed and of drafted rows.

    Say which of the two the next forward pass makes, then run it::

        cache = DraftCache(batch_size=2)
        cache.extend([5, 3])  # 5 rows; the last two of the second sequence are padding
        model(ids, states, positions, cache)
        cache.draft()
        model(drafted_ids, previous_states, positions, cache)
        cache.drop_drafted()

    Args:
        batch_size: B.
    """

    def __init__(self, batch_size: int) -> None:
        self._lengths = [0] * batch_size
        self._committed = torch.zeros(batch_size, 1, dtype=torch.int64)
        self._drafted = 0
        # Of the next pass: counts where it commits, the tree's mask where it drafts.
        self._extends = True
        self._counts: list[int] | None = None
        self._tree_mask: Tensor | None = None
        # Of the running pass.
        self._positions = torch.empty(batch_size, 0, dtype=torch.int64)  # [B, capacity]
        self._query_positions = self._positions
        self._slots: Tensor | None = None  # [B, R]; None: all sequences use first .. end - 1
        self._first = self._end = 0
        self._mask: Tensor | None = None  # [B or 1, R, end]; None: every key is seen
        self._buffers: dict[tuple[int, str], Tensor] = {}  # [B, Nkv, capacity, D]

    @property
    def lengths(self) -> list[int]:
        """Committed rows of each sequence."""
        return list(self._lengths)

    @property
    def committed(self) -> Tensor:
        """The same as int64 ``[B, 1]``, on the device since the pass that made it so."""
        return self._committed

    def extend(self, counts: Sequence[int] | Tensor | None = None) -> None:
        """The next pass commits rows.

        Args:
            counts: how many of its R rows are real, for each sequence; they come first. None: all.

        Raises:
            ValueError: rows are drafted and not dropped yet, or there are not B counts.
        """
        if self._drafted:
            raise ValueError(
                f"{self._drafted} drafted rows follow the committed ones; expected drop_drafted() "
                "before extend()"
            )
        if isinstance(counts, Tensor):
            counts = counts.tolist()
        if counts is not None and len(counts) != len(self._lengths):
            raise ValueError(
                f"got counts for {len(counts)} sequences; expected {len(self._lengths)}"
            )
        self._extends, self._counts = True, None if counts is None else list(counts)

    def draft(self, tree_mask: Tensor | None = None) -> None:
        """The next pass drafts rows; they see every committed row.

        Args:
            tree_mask: bool ``[B or 1, R, D + R]``, which of the D rows drafted so far and of its
                own R rows each row sees, itself included. None: all up to itself, a chain.
        """
        self._extends, self._tree_mask = False, tree_mask

    def drop_drafted(self) -> None:
        """Forgets the drafted rows."""
        self._drafted = 0

    def select(self, rows: Sequence[int]) -> None:
        """Keeps these sequences only, in this order."""
        index = torch.tensor(rows, device=self._positions.device)
        self._lengths = [self._lengths[row] for row in rows]
        self._committed = self._committed[index]
        self._positions = self._positions[index]
        self._buffers = {key: buffer[index] for key, buffer in self._buffers.items()}

    def begin(self, position_ids: Tensor) -> None:
        """Gives the rows of this pass their slots, and the keys they see."""
        batch, rows = position_ids.shape
        if batch != len(self._lengths):
            raise ValueError(
                f"got rows of {batch} sequences for a cache of {len(self._lengths)}; make one "
                "cache for each batch"
            )
        device = position_ids.device
        first = [length + self._drafted for length in self._lengths]
        self._first, self._end = min(first), max(first) + rows
        self._slots = None
        slots = self._first + torch.arange(rows, device=device)[None]
        if min(first) != max(first):
            self._slots = slots = slots + self._committed + (self._drafted - self._first)
        if self._extends:
            counts = self._counts or [rows] * batch
            self._lengths = [n + count for n, count in zip(self._lengths, counts, strict=True)]
            lengths = torch.tensor(self._lengths)[:, None]
            # Once for all passes until the next such; each sending would wait for the device.
            self._committed = lengths.to(device, non_blocking=True)
        else:
            self._drafted += rows
        self._mask = self._visible(slots, rows)
        if self._positions.shape[1] < self._end or self._positions.device != device:
            self._positions = _grown(self._positions.to(device), 1, self._end)
        self._positions.scatter_(1, slots.expand(batch, -1), position_ids)
        self._query_positions = position_ids

    def _visible(self, slots: Tensor, rows: int) -> Tensor | None:
        """Which slots each row sees, but for a window: bool ``[B or 1, R, end]``."""
        tree = None if self._extends else self._tree_mask
        if tree is None:
            if rows == 1 and self._slots is None:
                return None
            return torch.arange(self._end, device=slots.device) <= slots[..., None]
        batch = len(self._lengths)
        mask = torch.arange(self._end, device=slots.device) < self._committed
        drafted = self._committed + torch.arange(self._drafted, device=slots.device)
        return (
            mask[:, None]
            .repeat(1, rows, 1)
            .scatter(
                2,
                drafted[:, None].expand(-1, rows, -1),
                tree.to(slots.device).expand(batch, -1, -1),
            )
        )

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """See :class:`DraftAttention`."""
        keys, values = self._store(layer, "keys", k), self._store(layer, "values", v)
        mask = self._mask
        if window is not None:
            oldest = self._query_positions[..., None] - window
            recent = self._positions[:, None, : self._end] > oldest
            mask = recent if mask is None else mask & recent
        return functional.scaled_dot_product_attention(
            q,
            keys,
            values,
            None if mask is None else mask[:, None],
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        ).transpose(1, 2)

    def _store(self, layer: int, what: str, new: Tensor) -> Tensor:
        """Puts the rows of this pass into their slots; returns what is there up to the last."""
        buffer = self._buffers.get((layer, what))
        if buffer is None:
            buffer = new.new_empty(new.shape[0], new.shape[1], 0, new.shape[3])
        if buffer.shape[2] < self._end:
            buffer = self._buffers[layer, what] = _grown(buffer, 2, self._end)
        if self._slots is None:
            buffer[:, :, self._first : self._end] = new
        else:
            buffer.scatter_(2, self._slots[:, None, :, None].expand_as(new), new)
        return buffer[:, :, : self._end]


def _grown(buffer: Tensor, dim: int, needed: int) -> Tensor:
    """A buffer with room for twice ``needed`` slots, so that growth is rare."""
    shape = list(buffer.shape)
    shape[dim] = 2 * needed - buffer.shape[dim]
    return torch.cat([buffer, buffer.new_zeros(shape)], dim)
