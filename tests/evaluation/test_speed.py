"""Taking turns: who goes when, what is kept, and what a clock around a drafter leaves alone."""

import collections
from collections.abc import Callable

import pytest
import torch

from speculators.decoding import NgramDrafter
from speculators.evaluation.speed import Timed, TimedDrafter, take_turns

CPU = torch.device("cpu")


def turns(decoders: int, batches: int, repeats: int, warmup: int) -> tuple[list[str], list[str]]:
    """All calls in their order, and all results."""
    calls: list[str] = []

    def decoder(name: str) -> Callable[[int], str]:
        def run(number: int) -> str:
            calls.append(f"{name}{number}")
            return f"{name}{number}, call {len(calls)}"

        return run

    done = take_turns(
        [decoder("abcd"[n]) for n in range(decoders)],
        batches,
        repeats=repeats,
        warmup=warmup,
        device=CPU,
        after_batch=lambda number: calls.append(f"end {number}"),
    )
    assert all(len(timed.seconds) == repeats for of_one in done for timed in of_one)
    return calls, [timed.result for of_one in done for timed in of_one]


def test_who_goes_first_goes_last_next() -> None:
    calls, results = turns(3, 2, 2, 1)
    assert calls == [
        *("a0", "b0", "c0"),
        *("a0", "b0", "c0", "b0", "c0", "a0", "end 0"),
        *("b1", "c1", "a1", "c1", "a1", "b1", "end 1"),
    ]
    # The first repeat's results, in the order of the batches.
    assert results == [
        *("a0, call 4", "a1, call 13"),
        *("b0, call 5", "b1, call 11"),
        *("c0, call 6", "c1, call 12"),
    ]


@pytest.mark.parametrize("decoders", [1, 2, 4])
def test_all_go_first_equally_often(decoders: int) -> None:
    calls, _ = turns(decoders, 8, 1, 0)
    first = [calls[begin][0] for begin in range(0, len(calls), decoders + 1)]
    assert set(collections.Counter(first).values()) == {8 // decoders}


def test_warmup_ends_with_the_batches() -> None:
    calls, _ = turns(1, 2, 1, 9)
    assert calls == ["a0", "a1", "a0", "end 0", "a1", "end 1"]


def test_median_of_the_repeats() -> None:
    assert Timed("", [5.0, 1.0, 2.0]).median == 2.0


def test_timed_drafter_is_the_drafter() -> None:
    plain, timed = NgramDrafter(), TimedDrafter(NgramDrafter())
    assert timed.capture == plain.capture
    seen = [timed.seconds]
    prompts = torch.tensor([[5, 6, 7, 5, 6], [0, 8, 9, 8, 9]])
    for drafter in (plain, timed):
        drafter.prefill(prompts, [5, 4], torch.tensor([7, 8]), {})
        drafter.select([1, 0])
        drafter.update(torch.tensor([[9, 0], [5, 6]]), [1, 2], {})
    seen.append(timed.seconds)
    assert timed.propose(3, None).tokens.tolist() == plain.propose(3, None).tokens.tolist()
    seen.append(timed.seconds)
    assert 0.0 == seen[0] < seen[1] < seen[2]
