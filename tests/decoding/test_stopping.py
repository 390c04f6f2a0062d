"""Where a text ends when several tokens come at once, with the tiny verifier's own tokenizer."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from speculators.decoding.stopping import Stopping

MODEL = Path(__file__).parents[2] / "examples/tiny_verifier/model"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


def test_an_end_of_text_inside_of_a_block_is_the_last_token() -> None:
    stopping = Stopping(frozenset({2, 0}))
    assert stopping.cut([5], [3, 2, 4, 0], 100) == (2, "eos")
    assert stopping.cut([5], [3, 4], 100) == (2, None)


@pytest.mark.parametrize(
    ("before", "new", "expected"),
    [
        ([], [5, 6], (2, None)),
        ([], [5, 6, 7], (3, "length")),
        ([5], [5, 6, 7, 8], (2, "length")),
        ([5], [5, 2, 7, 8], (2, "eos")),  # the limit is reached by the end of the text
        ([5], [5, 6, 2, 8], (2, "length")),  # which is behind the limit here
    ],
)
def test_limit(before: list[int], new: list[int], expected: tuple[int, str | None]) -> None:
    assert Stopping(frozenset({2})).cut(before, new, 3) == expected


def first_stop(tokenizer: Any, tokens: list[int], stops: tuple[str, ...]) -> int | None:
    """By decoding each prefix: after how many tokens the text has a stop string."""
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:end], skip_special_tokens=False)
        if any(stop in text for stop in stops):
            return end
    return None


TEXT = "The naïve café wasn't open. Blue, green, red!\n\nIt was 3 o'clock — 東京 was asleep. END."


@pytest.mark.parametrize("block", [1, 3, 7])
@pytest.mark.parametrize(
    "stops",
    [
        ("\n\n",),
        ("green", "END"),
        (" was ",),
        ("é w", "zzz"),
        ("京",),
        ("o'clock — 東京 was asleep",),
        ("absent",),
        ("<|im_end|>",),
    ],
)
def test_stop_strings_across_tokens_and_blocks(
    tokenizer: Any, stops: tuple[str, ...], block: int
) -> None:
    tokens = tokenizer(TEXT + "<|im_end|> and more")["input_ids"]
    stopping = Stopping(frozenset(), stops, tokenizer)
    emitted: list[int] = []
    reason = None
    while reason is None and len(emitted) < len(tokens):
        new = tokens[len(emitted) : len(emitted) + block]
        keep, reason = stopping.cut(emitted, new, 10_000)
        emitted += new[:keep]
    end = first_stop(tokenizer, tokens, stops)
    assert (end is None) == (stops == ("absent",))
    assert emitted == tokens[:end]
    assert reason == (None if end is None else "stop")


def test_what_comes_first_ends_the_text(tokenizer: Any) -> None:
    one, end, two = (tokenizer(text)["input_ids"] for text in ("one", "<|im_end|>", " two"))
    assert len(end) == 1
    stopping = Stopping(frozenset(end), ("two", "<|im_end|>"), tokenizer)
    assert stopping.cut([], [*one, *end, *two], 100) == (len(one) + 1, "eos")
    assert stopping.cut(one, [*two, *end], 100) == (len(two), "stop")
    assert stopping.cut(one, [*two, *end], len(one) + len(two)) == (len(two), "stop")
    assert stopping.cut(one, [*one, *two], 2 * len(one)) == (len(one), "length")


def test_wrong_stop_strings(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="empty"):
        Stopping(stop_strings=("",), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="need a tokenizer"):
        Stopping(stop_strings=("x",))
