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

from torch import Tensor, nn
from transformers import AttentionInterface

from speculators.ops.draft_attention import draft_attention
from speculators.ops.packed_rows import PackedRows

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
        document_ids: int64 ``[B, T]``, negative for padding; rows of different documents never see
            each other, those of one lie side by side.
    """

    def __init__(self, document_ids: Tensor) -> None:
        self._rows = PackedRows(document_ids)
        self._positions: list[Tensor] = []  # of each step
        self._checked = 0  # steps whose positions were looked at
        self._keys: dict[int, list[Tensor]] = {}  # of each layer, one per step
        self._values: dict[int, list[Tensor]] = {}

    def begin(self, position_ids: Tensor) -> None:
        """Starts the next step."""
        self._positions.append(position_ids)

    def select(self, rows: Tensor) -> None:
        """From step 1 on, only some rows go on; to be called once, after step 0.

        A later step's row is seen by the same row alone, so the others are not missed.

        Args:
            rows: int64 ``[B, R]``, which of the T rows; repeats are allowed.
        """
        self._rows = self._rows.select(rows)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """See :class:`DraftAttention`; the output has the dtype of ``v``.

        Raises:
            ValueError: there is a window, and positions do not rise by 1 from row to row of a
                document and from step to step.
        """
        if window is not None:
            self._check_positions()
        keys, values = self._keys.setdefault(layer, []), self._values.setdefault(layer, [])
        # Under autocast the rotary embedding leaves queries and keys in float32. Once per key:
        # every later step sees it again.
        keys.append(k.to(v.dtype))
        values.append(v)
        return draft_attention(q.to(v.dtype), keys, values, self._rows, scale, window)

    def _check_positions(self) -> None:
        """A window is counted in rows, which is right if positions rise as rows do."""
        for step in range(self._checked, len(self._positions)):
            positions, first = self._positions[step], self._positions[0]
            documents, selected = self._rows.document_ids, self._rows.selected
            if step == 0:
                inside = (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] >= 0)
                wrong = inside & (first.diff(dim=1) != 1)
            else:
                if selected is not None:
                    documents, first = documents.gather(1, selected), first.gather(1, selected)
                wrong = (documents >= 0) & (positions != first + step)
            if bool(wrong.any()):
                raise ValueError(
                    f"the position ids of step {step} do not rise by 1 from row to row of a "
                    "document and from step to step, as a sliding window needs"
                )
        self._checked = len(self._positions)


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
