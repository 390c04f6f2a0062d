"""The verifier's distributions as the distillation losses need them, read from its logits once.

A draft that is trained several steps ahead has several rows for one row of the verifier, and the
verifier's vocabulary is the larger of the two; so what depends on the verifier alone is kept.

A draft vocabulary of W < V tokens gives two distributions: the loss takes p restricted to the W
tokens and renormalised, which the draft can reach; acceptance is measured against the full p, since
a verifier's token that the draft cannot say is a rejection. The renormalised p would flatter.
"""

import dataclasses
import math
from functools import cached_property

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class TargetDistribution:
    """The verifier's distributions at R rows; nothing here carries gradient.

    Attributes:
        log_p: ``[R, W]`` float32 or float64, over the draft's vocabulary, renormalised; -inf where
            p = 0. Uniform in rows in which p gives that vocabulary no probability at all.
        coverage: ``[R]``, the probability that the full p gives to the draft's vocabulary.
        argmax: int64 ``[R]``, the verifier's id of its most likely token (of V; the first of many).
        draft_to_verifier: int64 ``[W]``, or None where the vocabularies are one.
        verifier_to_draft: int64 ``[V]``, -1 outside of the draft's vocabulary; None likewise.
        top_by_count: what ``top`` has found so far.
    """

    log_p: Tensor
    coverage: Tensor
    argmax: Tensor
    draft_to_verifier: Tensor | None = None
    verifier_to_draft: Tensor | None = None
    top_by_count: dict[int, Tensor] = dataclasses.field(default_factory=dict, repr=False)

    @cached_property
    def best(self) -> Tensor:
        """The draft's id of the verifier's most likely token, or -1: int64 ``[R]``."""
        return self.to_draft_ids(self.argmax)

    @cached_property
    def likeliest(self) -> Tensor:
        """``best``; where that is -1, the draft's token with the largest p: int64 ``[R]``."""
        if self.verifier_to_draft is None:
            return self.best
        return torch.where(self.best >= 0, self.best, self.log_p.argmax(-1))

    def top(self, count: int) -> Tensor:
        """The draft's ids of the most likely tokens, in no order: int64 ``[R, min(count, W)]``.

        Looked for once, for all who learn from these rows. Which of several tokens with the same
        p are the last to be taken is up to ``torch.topk``; who asks again gets the same.
        """
        if count not in self.top_by_count:
            width = self.log_p.shape[1]
            found = self.log_p.topk(min(count, width), dim=-1, sorted=False)
            self.top_by_count[count] = found.indices
        return self.top_by_count[count]

    def select(self, rows: Tensor) -> "TargetDistribution":
        """The distributions at some rows: int64 ``[rows]``, in any order, repeats allowed."""
        return dataclasses.replace(
            self,
            log_p=self.log_p.index_select(0, rows),
            coverage=self.coverage.index_select(0, rows),
            argmax=self.argmax.index_select(0, rows),
            top_by_count={
                count: top.index_select(0, rows) for count, top in self.top_by_count.items()
            },
        )

    def to_draft_ids(self, verifier_ids: Tensor) -> Tensor:
        """The same tokens in the draft's ids, -1 where it has none: int64, any shape."""
        table = self.verifier_to_draft
        return verifier_ids if table is None else table[verifier_ids]

    def to_verifier_ids(self, draft_ids: Tensor) -> Tensor:
        """The same tokens in the verifier's ids: int64, any shape."""
        table = self.draft_to_verifier
        return draft_ids if table is None else table[draft_ids]


@torch.no_grad()
def target_distribution(
    target_logits: Tensor, draft_to_verifier: Tensor | None = None
) -> TargetDistribution:
    """What the losses need of the verifier's logits.

    Args:
        target_logits: ``[R, V]``, any float dtype; -inf is a token with p = 0.
        draft_to_verifier: int64 ``[W]``, the verifier's ids of the draft's tokens, distinct;
            None where the draft has the verifier's vocabulary.

    Raises:
        ValueError: a shape is wrong.
        TypeError: the logits are not of a float dtype, or the ids not int64.
    """
    check_logits("target_logits", target_logits)
    log_p = torch.log_softmax(target_logits, -1, dtype=arithmetic_dtype(target_logits))
    argmax = target_logits.max(-1).indices  # the first of many, as argmax, which is slower on a CPU
    if draft_to_verifier is None:
        return TargetDistribution(log_p, torch.ones_like(log_p[:, 0]), argmax)
    _check_selection(draft_to_verifier)
    width = len(draft_to_verifier)
    log_p = log_p.index_select(1, draft_to_verifier)
    log_coverage = log_p.logsumexp(-1)
    unreachable = log_coverage.isneginf()
    log_p = (log_p - log_coverage[:, None]).masked_fill(unreachable[:, None], -math.log(width))
    verifier_to_draft = argmax.new_full((target_logits.shape[1],), -1)
    verifier_to_draft[draft_to_verifier] = torch.arange(width, device=argmax.device)
    return TargetDistribution(
        log_p, log_coverage.exp(), argmax, draft_to_verifier, verifier_to_draft
    )


def arithmetic_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype to compute in: float32, or float64 where one of the tensors has it."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def check_logits(name: str, logits: Tensor) -> None:
    """Refuses what is not a matrix of floats with at least one column.

    Raises:
        ValueError: the shape is wrong.
        TypeError: the dtype is.
    """
    if not logits.is_floating_point():
        raise TypeError(f"{name} is {logits.dtype}, expected a float dtype")
    if logits.dim() != 2 or logits.shape[1] == 0:
        found = list(logits.shape)
        raise ValueError(f"{name} has the shape {found}, expected [rows, vocabulary]")


def _check_selection(draft_to_verifier: Tensor) -> None:
    if draft_to_verifier.dtype != torch.int64:
        raise TypeError(f"draft_to_verifier is {draft_to_verifier.dtype}, expected torch.int64")
    if draft_to_verifier.dim() != 1 or len(draft_to_verifier) == 0:
        found = list(draft_to_verifier.shape)
        raise ValueError(f"draft_to_verifier has the shape {found}, expected [W] with W >= 1")
