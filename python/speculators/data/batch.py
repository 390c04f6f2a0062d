"""``PackedBatch``: what training takes, several documents in each row.

Documents in a row never see each other: ``document_ids`` say which token is whose, and positions
count from 0 in each, so that a document in a row is computed as if it were alone. Everything is
UNSHIFTED (row t holds token t and the verifier's state of token t); only the objective shifts.
"""

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """B rows of T tokens.

    Attributes:
        input_ids: int64 ``[B, T]``; 0 for padding.
        loss_mask: bool ``[B, T]``, true where the token is to be learned; false for padding.
        position_ids: int64 ``[B, T]``, 0, 1, ... in each document; 0 for padding.
        document_ids: int64 ``[B, T]``, the number of the document in its row; -1 for padding.
        hidden_states: residual stream id to ``[B, T, H]``, in the store's dtype; 0 for padding.
    """

    input_ids: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    document_ids: Tensor
    hidden_states: dict[int, Tensor]

    @property
    def tokens(self) -> int:
        """The number of tokens that are no padding."""
        return int((self.document_ids >= 0).sum())

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch on a device."""
        return PackedBatch(
            self.input_ids.to(device),
            self.loss_mask.to(device),
            self.position_ids.to(device),
            self.document_ids.to(device),
            {k: states.to(device) for k, states in self.hidden_states.items()},
        )
