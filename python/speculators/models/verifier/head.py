"""``VerifierHead``: from the last residual stream to the verifier's logits.

Every target that a draft learns from, and every distribution that it is verified against, comes
through this one module. It runs the verifier's own final norm and head modules instead of copies of
their formulas, so that ``1 + w`` norms, biases and quantised heads need no case of their own.
"""

import os

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from speculators.models.verifier.architecture import LogitTransform, find_architecture
from speculators.models.verifier.checkpoint import PartialCheckpoint


class VerifierHead(nn.Module):
    """Final norm, head, and what follows it: logit scale and softcap.

    ``head(r_n)`` is ``head.logits(head.norm(r_n))``; the two halves are there for callers that work
    in chunks of tokens, since the logits of a long batch seldom fit in memory.

    Args:
        final_norm: the verifier's final norm, on the last dimension.
        lm_head: the verifier's head, ``[..., H] -> [..., V]``.
        transform: what happens to the logits after the head.
    """

    def __init__(
        self, final_norm: nn.Module, lm_head: nn.Module, transform: LogitTransform | None = None
    ) -> None:
        super().__init__()
        self.final_norm = final_norm
        self.lm_head = lm_head
        self.transform = transform or LogitTransform()

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> "VerifierHead":
        """The head of a loaded model. It shares the model's modules: moving one moves both.

        Raises:
            UnsupportedVerifierError: the model's head or final norm is of an unknown kind.
        """
        parts = find_architecture(model)
        return cls(parts.final_norm, parts.lm_head, parts.logit_transform)

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
    ) -> "VerifierHead":
        """The head of a checkpoint, frozen, without loading the rest of the model.

        Reads the final norm and the head (or the embedding that it is tied to) from the safetensors
        files that hold them; for a model on the Hub only those files are downloaded.

        Args:
            path_or_id: a directory that ``save_pretrained`` wrote, or a model's name on the Hub.
            device: where the head shall lie; the CPU by default.
            dtype: the weights' dtype; by default as stored.
            trust_remote_code: runs modelling code that comes with the checkpoint.
            revision: a branch, tag or commit on the Hub.
            local_files_only: never asks the Hub.

        Raises:
            UnsupportedVerifierError: the head or final norm is of an unknown kind, or quantised.
            FileNotFoundError: there are no safetensors files.
            ValueError: a tensor that the head needs is missing.
        """
        checkpoint = PartialCheckpoint(
            path_or_id,
            trust_remote_code=trust_remote_code,
            revision=revision,
            local_files_only=local_files_only,
        )
        return cls.from_checkpoint(checkpoint, device=device, dtype=dtype)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: PartialCheckpoint,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "VerifierHead":
        """The head of an opened checkpoint, frozen; see :meth:`from_pretrained`."""
        parts = checkpoint.head()
        head = cls(parts.final_norm, parts.lm_head, parts.logit_transform)
        return head.to(device=device, dtype=dtype).eval().requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the head's weights, and of its logits."""
        return next(self.lm_head.parameters()).dtype

    def norm(self, hidden_states: Tensor) -> Tensor:
        """The final norm: f from the stream before it.

        Args:
            hidden_states: the stream after the last layer, before the final norm, ``[..., H]``.

        Returns:
            What transformers calls ``hidden_states[-1]``, same shape and dtype.
        """
        normed: Tensor = self.final_norm(hidden_states)
        return normed

    def logits(self, normed: Tensor) -> Tensor:
        """The verifier's logits.

        Args:
            normed: ``f``, the stream after the final norm, ``[..., H]``.

        Returns:
            ``[..., V]`` in the head's dtype, scale and softcap applied.
        """
        return self.transform(self.lm_head(normed))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``logits(norm(r_n))``: ``[..., H]`` before the final norm to ``[..., V]``."""
        return self.logits(self.norm(hidden_states))
