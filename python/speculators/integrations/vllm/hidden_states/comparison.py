"""Are the states that a server gives those of the verifier? Its first ones beside transformers'.

Another implementation of the same model rounds otherwise, and in bfloat16 that adds up from layer
to layer. What must be found are mistakes: a stream off by one, another model or another revision of
it, states of other tokens, states after a norm. They are far larger.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """How far states may be from the reference; the defaults are for bfloat16.

    Rounding to bfloat16 changes an entry by at most 1/256 of it. Over some dozens of layers states
    come to differ by about 1 % in norm, a cosine of 0.99995; neighbouring streams of a large model
    are seldom closer than 0.995 to each other.

    Attributes:
        cosine: between a token's states here and there; 95 % of the tokens must reach it. A few may
            not: a router of experts, nearly undecided, chooses otherwise after rounding.
        max_difference: of two entries, as a share of the stream's largest entry.
    """

    cosine: float = 0.999
    max_difference: float = 0.05


_SHARE = 0.05


class DifferentStatesError(RuntimeError):
    """The server's states are not the verifier's."""


@dataclasses.dataclass(frozen=True)
class StreamDifference:
    """How one residual stream differs over all tokens compared.

    Attributes:
        layer_id: the stream.
        cosine: what 95 % of the tokens reach.
        mean_cosine: over tokens.
        max_difference: of two entries.
        largest: entry of the reference.
    """

    layer_id: int
    cosine: float
    mean_cosine: float
    max_difference: float
    largest: float

    def within(self, tolerance: Tolerance) -> bool:
        """Whether rounding explains it."""
        return (
            self.cosine >= tolerance.cosine
            and self.max_difference <= tolerance.max_difference * self.largest
        )

    def __str__(self) -> str:
        return (
            f"stream {self.layer_id}: cosine {self.mean_cosine:.6f} (95 % of the tokens at least "
            f"{self.cosine:.6f}), max difference {self.max_difference:.4g} of {self.largest:.4g}"
        )


def compare_states(
    found: Sequence[Mapping[int, Tensor]], expected: Sequence[Mapping[int, Tensor]]
) -> list[StreamDifference]:
    """Compares the states of some documents.

    Args:
        found: for each document, residual stream id to ``[L, H]``.
        expected: the same of the reference.

    Returns:
        One for each stream, in the order of their ids.
    """
    return [
        _compare(
            layer_id,
            torch.cat([states[layer_id] for states in found]).double(),
            torch.cat([states[layer_id] for states in expected]).double(),
        )
        for layer_id in sorted(expected[0])
    ]


def check_states(differences: Sequence[StreamDifference], tolerance: Tolerance, who: str) -> None:
    """Refuses states that rounding does not explain.

    Raises:
        DifferentStatesError: with what was found in each stream.
    """
    wrong = [one for one in differences if not one.within(tolerance)]
    if wrong:
        lines = "\n".join(f"  {one}" for one in wrong)
        raise DifferentStatesError(
            f"{who} gives hidden states that are not those of transformers; expected cosines of "
            f"{tolerance.cosine} or more and differences of at most {tolerance.max_difference} of "
            f"the largest entry:\n{lines}\nSee that it serves the same weights in the same dtype, "
            "unquantised; or set generate.vllm.cosine and generate.vllm.max_difference"
        )


def _compare(layer_id: int, found: Tensor, expected: Tensor) -> StreamDifference:
    # A token whose states are all zero, as some embeddings are, is like itself only.
    cosine = torch.where(
        (found == expected).all(-1), 1.0, torch.cosine_similarity(found, expected, dim=-1)
    )
    ordered = cosine.nan_to_num(-1.0).sort().values
    return StreamDifference(
        layer_id,
        cosine=float(ordered[int(_SHARE * len(ordered))]),
        mean_cosine=float(ordered.mean()),
        max_difference=float((found - expected).abs().max()),
        largest=float(expected.abs().max()),
    )
