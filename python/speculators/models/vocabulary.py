"""The draft vocabulary: the few tokens of the verifier's vocabulary that a draft can propose.

A draft's head costs as much as its vocabulary is large, and most of a vocabulary is rarely used. So
the tokens that the training data asks for most are chosen. On disk the choice is two tensors that
servers read: ``d2t``, what to add to a draft id to get the verifier's, and ``t2d``, which of the
verifier's tokens are in.
"""

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class VocabularyMapping:
    """Which W of the verifier's V tokens the draft knows, in increasing order of their ids.

    Attributes:
        d2t: int64 ``[W]``, the verifier's id minus the draft's.
        t2d: bool ``[V]``, whether the draft knows the verifier's token.

    Raises:
        ValueError: the two do not describe the same choice of tokens.
    """

    d2t: Tensor
    t2d: Tensor

    def __post_init__(self) -> None:
        """Checks that the two tensors agree."""
        for name, tensor, dtype in (
            ("d2t", self.d2t, torch.int64),
            ("t2d", self.t2d, torch.bool),
        ):
            if tensor.dtype != dtype or tensor.ndim != 1:
                raise ValueError(
                    f"{name} is {tensor.dtype} {list(tensor.shape)}; expected one row of {dtype}"
                )
        if self.d2t.is_meta:
            return
        ids = self.draft_to_verifier
        outside = (ids < 0) | (ids >= len(self.t2d))
        if bool(outside.any()):
            raise ValueError(
                f"d2t sends the draft's token {int(outside.nonzero()[0])} to the verifier's token "
                f"{int(ids[outside][0])}; expected ids from 0 to {len(self.t2d) - 1}"
            )
        chosen = torch.zeros_like(self.t2d)
        chosen[ids] = True
        if len(ids.unique()) != len(ids) or not torch.equal(chosen, self.t2d):
            raise ValueError(
                f"d2t and t2d disagree: d2t names {len(ids.unique())} different tokens with "
                f"{len(ids)} entries, t2d has {int(self.t2d.sum())}; expected the same tokens, "
                "each once"
            )

    @classmethod
    def from_counts(cls, counts: Tensor, draft_vocab_size: int) -> "VocabularyMapping":
        """Takes the most frequent tokens; ties, those that never occur too, go to lower ids.

        Args:
            counts: integers ``[V]``, how often each token is to be learned.
            draft_vocab_size: W, from 1 to V.

        Raises:
            ValueError: ``draft_vocab_size`` is out of range, or ``counts`` are not a row of counts.
        """
        if counts.ndim != 1 or counts.is_floating_point() or bool((counts < 0).any()):
            raise ValueError(
                f"counts are {counts.dtype} {list(counts.shape)}; expected one row of integers "
                "that are not negative, one per token of the verifier"
            )
        if not 1 <= draft_vocab_size <= len(counts):
            raise ValueError(
                f"the draft vocabulary has {draft_vocab_size} tokens; expected from 1 to the "
                f"verifier's {len(counts)}"
            )
        order = counts.argsort(descending=True, stable=True)
        return cls.from_ids(order[:draft_vocab_size], len(counts))

    @classmethod
    def from_ids(cls, ids: Tensor, vocab_size: int) -> "VocabularyMapping":
        """The mapping of these tokens, int64 ``[W]`` in any order, of a verifier with V tokens."""
        ids = ids.sort().values
        t2d = torch.zeros(vocab_size, dtype=torch.bool, device=ids.device)
        t2d[ids] = True
        return cls(ids - torch.arange(len(ids), device=ids.device), t2d)

    @property
    def draft_to_verifier(self) -> Tensor:
        """int64 ``[W]``: the verifier's id of each of the draft's tokens."""
        return torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t

    @property
    def verifier_to_draft(self) -> Tensor:
        """int64 ``[V]``: the draft's id of each of the verifier's tokens, -1 where it has none."""
        inverse = torch.full_like(self.t2d, -1, dtype=torch.int64)
        inverse[self.draft_to_verifier] = torch.arange(len(self.d2t), device=self.d2t.device)
        return inverse

    def coverage(self, counts: Tensor) -> float:
        """The share of ``counts`` (``[V]``) that falls on tokens the draft knows; 0 if all are 0.

        It bounds what the draft can have accepted: a token outside is always a rejection.
        """
        total = int(counts.sum())
        return int(counts[self.t2d.to(counts.device)].sum()) / total if total else 0.0
