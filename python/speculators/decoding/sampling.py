"""From logits to tokens: the distribution that settings make of them, and draws from it.

Verifier and draft go through the same function, because acceptance compares their distributions: a
draft that is sampled with other settings than its ``q`` says makes the output biased. Draws are by
inversion from uniform numbers that the caller makes, so that it is the caller who decides which
sequence gets which numbers, and so that a kernel can take the place of each function.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from speculators.ops.tree_verification import LEAST_TEMPERATURE


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen from logits: temperature, then top-k, then top-p, as transformers does.

    Attributes:
        temperature: divides the logits; 0 is greedy decoding, and the others must be off then. The
            least other one is ``LEAST_TEMPERATURE``, where quotients are still numbers.
        top_k: keep the k most likely tokens, and what ties with the last of them; 0 keeps all.
        top_p: keep the fewest tokens whose probabilities add up to at least this; 1 keeps all.

    Raises:
        ValueError: a value is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if not self.greedy and not LEAST_TEMPERATURE <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature is {self.temperature}; expected 0 (greedy), or a number of at least "
                f"{LEAST_TEMPERATURE}"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; expected 0 (all tokens) or at least 1")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}; expected more than 0 and at most 1")
        if self.greedy and (self.top_k or self.top_p < 1.0):
            raise ValueError(
                f"top_k is {self.top_k} and top_p {self.top_p} with temperature 0, which is greedy "
                "decoding; expected a positive temperature, or neither of the two"
            )

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0

    def distribution(self, logits: Tensor) -> Tensor:
        """The distribution that tokens are drawn from.

        Args:
            logits: ``[..., V]``, any floating dtype.

        Returns:
            Probabilities, float32 ``[..., V]``; zero for tokens that top-k or top-p cut off.

        Raises:
            ValueError: the settings are greedy, which has no distribution.
        """
        if self.greedy:
            raise ValueError("greedy settings have no distribution; take the argmax of the logits")
        scores = logits.float() / self.temperature
        if 0 < self.top_k < scores.shape[-1]:
            kth = scores.topk(self.top_k, dim=-1).values[..., -1:]
            scores = scores.masked_fill(scores < kth, float("-inf"))
        probabilities = scores.softmax(-1)
        if self.top_p < 1.0:
            probabilities = _keep_top_p(probabilities, self.top_p)
        return probabilities


GREEDY = Sampling()


def _keep_top_p(probabilities: Tensor, top_p: float) -> Tensor:
    ascending, order = probabilities.sort(-1)
    cut = ascending.cumsum(-1) <= 1.0 - top_p
    cut[..., -1] = False  # the most likely token always stays
    kept = probabilities.masked_fill(torch.zeros_like(cut).scatter(-1, order, cut), 0.0)
    return kept / kept.sum(-1, keepdim=True)


def draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Draws one token of each row, by inversion of its cumulative sum.

    Args:
        weights: ``[N, V]``, not negative and not all zero in a row; they need not add up to 1.
        uniforms: float64 ``[N]`` in [0, 1).

    Returns:
        int64 ``[N]``; never a token of weight zero.
    """
    cumulative = weights.double().cumsum(-1)
    total = cumulative[:, -1:]
    # Rounding must not reach the total, whose place may be past the last token that has a weight.
    target = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, -total))
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


class RandomNumbers:
    """The uniform numbers of a batch of sequences, some of which end before the others.

    Every sequence gets as many numbers in each step, ended ones too. So what one of them draws does
    not depend on what the others do. With one generator for the batch it depends on the batch's
    size, with one for each sequence it does not.

    Args:
        generator: one for the batch, or one for each sequence; None is torch's own.
        sequences: how many there are.
        device: where the numbers shall lie.

    Raises:
        ValueError: there are generators, but not one for each sequence.
    """

    def __init__(
        self,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        sequences: int,
        device: torch.device,
    ) -> None:
        if isinstance(generator, Sequence) and len(generator) != sequences:
            raise ValueError(
                f"got {len(generator)} generators for {sequences} sequences; expected one for "
                "each, or one for all"
            )
        self._generator = generator
        self._sequences = sequences
        self._device = device

    def uniforms(self, count: int, rows: Sequence[int]) -> Tensor:
        """The next numbers of each sequence.

        Args:
            count: how many for each.
            rows: the sequences whose numbers are wanted.

        Returns:
            float64 ``[len(rows), count]`` in [0, 1).
        """
        if isinstance(self._generator, Sequence):
            chosen = [self._generator[row] for row in rows]
            drawn = torch.stack([_uniform((count,), g).cpu() for g in chosen])
        else:
            drawn = _uniform((self._sequences, count), self._generator)
            if len(rows) < self._sequences:
                drawn = drawn[torch.tensor(rows, device=drawn.device)]
        return drawn.to(self._device)


def _uniform(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    device = None if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=device, dtype=torch.float64)
