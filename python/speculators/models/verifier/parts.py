"""``VerifierParts``: the two ends of a verifier, its embedding and its head.

Most drafts start from the verifier's embedding and end in its head. They need no more of it, so for
a checkpoint on disk no more is read.
"""

import dataclasses
import os
from typing import Union, cast

import torch
from torch import Tensor

from speculators.models.verifier.checkpoint import PartialCheckpoint
from speculators.models.verifier.head import VerifierHead
from speculators.models.verifier.verifier import Verifier


@dataclasses.dataclass(frozen=True, eq=False)
class VerifierParts:
    """What a draft borrows.

    Attributes:
        embedding: ``[V, H]``, the weight alone: some verifiers scale what they look up, and drafts
            are trained and served without that.
        head: final norm, head, and what follows it.
    """

    embedding: Tensor
    head: VerifierHead

    @classmethod
    def of(
        cls, verifier: Union["VerifierParts", Verifier, str, os.PathLike[str]]
    ) -> "VerifierParts":
        """The parts of a verifier; they share its tensors. A path or Hub id is read from disk."""
        if isinstance(verifier, VerifierParts):
            return verifier
        if isinstance(verifier, Verifier):
            weight = cast("Tensor", verifier.model.get_input_embeddings().weight)
            return cls(weight.detach(), verifier.head)
        return cls.from_pretrained(verifier)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> "VerifierParts":
        """Reads the parts of a checkpoint, frozen, without loading the rest of the model.

        Args:
            path_or_id: a directory that ``save_pretrained`` wrote, or a model's name on the Hub.
            device: where they shall lie; the CPU by default.
            dtype: of the weights; by default as stored.
            trust_remote_code: runs modelling code that comes with the checkpoint.
            revision: a branch, tag or commit on the Hub.
            local_files_only: never asks the Hub.

        Raises:
            UnsupportedVerifierError: the head or final norm is of an unknown kind, or quantised.
            FileNotFoundError: there are no safetensors files.
            ValueError: a tensor is missing.
        """
        checkpoint = PartialCheckpoint(
            path_or_id,
            trust_remote_code=trust_remote_code,
            revision=revision,
            local_files_only=local_files_only,
        )
        return cls(
            checkpoint.embedding().to(device=device, dtype=dtype),
            VerifierHead.from_checkpoint(checkpoint, device=device, dtype=dtype),
        )
