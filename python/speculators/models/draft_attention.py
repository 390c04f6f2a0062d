"""What a draft's rows attend to: while it trains, and while it drafts.

The rows of a draft are not those of a language model. Row t takes token t + 1 and the verifier's
state of token t; a drafting step takes the row's own output again, one position further. It sees
the rows that have the verifier's states, up to its own, and of each drafting step before it just
the one row that it came from. While drafting this is a cache whose last rows are thrown away; in
training, where every row drafts at once, it is a causal step 0 and one diagonal per later step.

A draft's layers are transformers' own. They hand their queries, keys and values to whatever
attention is registered under a name, and here that is a ``DraftAttention``, one per batch.
"""

import abc
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from speculators.ops.draft_attention import draft_attention_reference

# The name by which transformers' layers find us; a layer's configuration carries it.
ATTENTION = "speculators_draft"


class DraftAttention(abc.ABC):
    """The attention of one batch of drafts, over several forward passes."""

    @abc.abstractmethod
    def begin(self, position_ids: Tensor) -> None:
        """Starts a forward pass of R rows for each of B sequences.

        Args:
            position_ids: int64 ``[B, R]``.
        """

    @abc.abstractmethod
    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """The attention of one layer for the rows of this pass.

        Args:
            layer: number of the layer.
            q: queries ``[B, Nq, R, D]``, rotated.
            k: keys of the same rows ``[B, Nkv, R, D]``, rotated.
            v: values ``[B, Nkv, R, D]``.
            scale: of the scores.
            window: a sliding window: a key is seen if its position is more than the query's minus
                this; None for all.

        Returns:
            ``[B, R, Nq, D]``.
        """


class TrainTimeTestAttention(DraftAttention):
    """Every row of packed documents drafts at once; each forward pass is one more drafting step.

    At step s, row t sees the step-0 rows of its document up to t, and row t of steps 1 to s
    (EAGLE-3, section 3.2; HASS's context alignment is the same with other row numbers).

    Args:
        document_ids: int64 ``[B, T]``; rows of different documents never see each other.
    """

    def __init__(self, document_ids: Tensor) -> None:
        self._document_ids = document_ids
        self._positions: list[Tensor] = []  # of each step
        self._keys: dict[int, list[Tensor]] = {}  # of each layer, one per step
        self._values: dict[int, list[Tensor]] = {}
        rows = torch.arange(document_ids.shape[1], device=document_ids.device)
        same = document_ids[:, :, None] == document_ids[:, None, :]
        self._causal = (same & (rows[:, None] >= rows))[:, None]

    def begin(self, position_ids: Tensor) -> None:
        """Starts the next step."""
        self._positions.append(position_ids)

    def select(self, rows: Tensor) -> None:
        """From step 1 on, only some rows go on; to be called once, after step 0.

        A later step's row is seen by the same row alone, so the others are not missed.

        Args:
            rows: int64 ``[B, R]``, which of the T rows; repeats are allowed.
        """
        width = self._causal.shape[-1]
        self._causal = self._causal.gather(2, rows[:, None, :, None].expand(-1, -1, -1, width))

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """See :class:`DraftAttention`."""
        keys, values = self._keys.setdefault(layer, []), self._values.setdefault(layer, [])
        keys.append(k)
        values.append(v)
        mask, diagonals = self._causal, None
        if window is not None:
            oldest = self._positions[-1] - window
            mask = mask & (self._positions[0][:, None, None, :] > oldest[:, None, :, None])
            later = [position > oldest for position in self._positions[1:]]
            diagonals = torch.stack(later, -1) if later else None
        return draft_attention_reference(
            q, keys[0], values[0], keys[1:], values[1:], mask, diagonals, scale
        ).transpose(1, 2)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    draft_attention: DraftAttention,
    sliding_window: int | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """What transformers' layers call, with the keyword arguments that their forward got."""
    del attention_mask, unused
    layer = module.layer_idx
    assert isinstance(layer, int)  # noqa: S101 - for the type checker
    return draft_attention.attend(layer, query, key, value, scaling, sliding_window), None


AttentionInterface.register(ATTENTION, _attend)
