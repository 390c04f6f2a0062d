"""Where a sequence ends: an end-of-text token, a stop string, or its limit of tokens.

A verification can emit several tokens at once, and the end may lie in the midst of them; what comes
after it is not emitted. The token that ends a text is part of the output, as in transformers.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from transformers import PreTrainedTokenizerBase

FinishReason = Literal["eos", "stop", "length"]


@dataclasses.dataclass(frozen=True)
class Stopping:
    """The ends of texts.

    Attributes:
        eos_token_ids: tokens that end a text.
        stop_strings: strings that end it. The output ends with the token that completes one, and
            may have characters of that token after it. Only generated text is searched, special
            tokens included.
        tokenizer: decodes the text to search; needed for stop strings alone.

    Raises:
        ValueError: a stop string is empty, or there are some and no tokenizer.
    """

    eos_token_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()
    tokenizer: PreTrainedTokenizerBase | None = None

    def __post_init__(self) -> None:
        """Checks the stop strings."""
        if "" in self.stop_strings:
            raise ValueError("a stop string is empty; expected at least one character")
        if self.stop_strings and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer to decode the text; expected one")

    def cut(
        self, before: Sequence[int], new: Sequence[int], limit: int
    ) -> tuple[int, FinishReason | None]:
        """How many new tokens are emitted, and why the sequence ends there.

        Args:
            before: tokens that were generated before.
            new: tokens that come now, at least one.
            limit: how many may be generated in all.

        Returns:
            The number of new tokens to keep, and the reason, or None if the sequence goes on. A
            token that would end it for two reasons ends it for the first of eos, stop, length.
        """
        room = limit - len(before)
        keep = min(len(new), room)
        reason: FinishReason | None = "length" if keep == room else None
        for place, token in enumerate(new[:keep], 1):
            if token in self.eos_token_ids:
                keep, reason = place, "eos"
                break
        if self.stop_strings:
            end = self._stop_string_ends(before, new[:keep])
            if end is not None and (end < keep or reason != "eos"):
                return end, "stop"
        return keep, reason

    def _stop_string_ends(self, before: Sequence[int], new: Sequence[int]) -> int | None:
        """After how many new tokens the text has a stop string; None if it has none."""
        # A token has at least one byte. The tokens in front may lose a blank, or half a character.
        reach = max(len(stop.encode()) for stop in self.stop_strings) + 4
        tail = list(before[-reach:])
        if not self._has_stop_string([*tail, *new]):
            return None
        for place in range(1, len(new)):
            if self._has_stop_string([*tail, *new[:place]]):
                return place
        return len(new)

    def _has_stop_string(self, tokens: list[int]) -> bool:
        assert self.tokenizer is not None  # noqa: S101 - checked when made
        text = self.tokenizer.decode(
            tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return any(stop in text for stop in self.stop_strings)
