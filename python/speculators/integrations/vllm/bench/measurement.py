"""A server at several concurrencies, and the servers with the draft beside the one without.

Each server continues a few prompts first, which are not counted, because vLLM compiles and
allocates when it first meets a size. A kept prefix of a prompt is not used again at the next
concurrency: every one of them reads its prompts anew.

Which number of drafted tokens is the best is read off what was measured, and off nothing else. What
a step costs with fewer tokens than were measured does not follow from two points: a part of it is
the same for any number, and the more requests share a step the larger that part is.
"""

import dataclasses
import platform
import uuid
from collections.abc import Callable, Sequence

import numpy as np

from speculators.data.generate import Progress
from speculators.integrations.vllm.bench.counters import DraftCounters, parse_counters
from speculators.integrations.vllm.bench.load import Completion, Load
from speculators.integrations.vllm.bench.report import (
    Acceptance,
    BenchVersions,
    DrafterSpeed,
    Level,
    Milliseconds,
    ServerSpeed,
)
from speculators.integrations.vllm.serving.client import Client
from speculators.version import __version__


@dataclasses.dataclass(frozen=True)
class Measured:
    """One server at one concurrency.

    Attributes:
        completions: of the prompts, in their order.
        seconds: of wall clock.
        counters: of the drafts; None if the server does not draft.
    """

    completions: Sequence[Completion]
    seconds: float
    counters: DraftCounters | None


@dataclasses.dataclass(frozen=True)
class MeasuredDrafter:
    """A server with the draft.

    Attributes:
        levels: one for each concurrency.
        k: tokens drafted before each verification; None if that is not known.
    """

    levels: Sequence[Measured]
    k: int | None

    @property
    def acceptance(self) -> Acceptance | None:
        """Of all concurrencies together; None if the server does not draft."""
        total = None
        for counters in (one.counters for one in self.levels):
            if counters is not None:
                total = counters if total is None else total.plus(counters)
        return None if total is None else acceptance(total)


def measure(
    client: Client,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    concurrencies: Sequence[int],
    *,
    progress: Progress,
    name: str,
) -> list[Measured]:
    """Continues all prompts at each concurrency.

    Args:
        client: of the server that continues them.
        prompts: token ids.
        max_new_tokens: of each.
        concurrencies: requests at a time.
        progress: told of each prompt.
        name: of the server, for ``progress``.

    Raises:
        AnswerError: the server does not answer as it should.
    """

    def run(
        chosen: Sequence[Sequence[int]], at_a_time: int, done: Callable[[], None]
    ) -> tuple[list[Completion], float]:
        salt = uuid.uuid4().hex
        return Load(
            client, chosen, max_new_tokens, concurrency=at_a_time, salt=salt, done=done
        ).run()

    for at_a_time in concurrencies:  # to warm up
        run(prompts[:at_a_time], at_a_time, lambda: None)
    results = []
    for at_a_time in concurrencies:
        progress.start(len(prompts), f"{name}, {at_a_time} at a time")
        before = parse_counters(client.text("/metrics"))
        completions, seconds = run(prompts, at_a_time, lambda: progress.advance(1))
        after = parse_counters(client.text("/metrics"))
        counters = None
        if after is not None:
            counters = after.since(before or DraftCounters())
        results.append(Measured(completions, seconds, counters))
    return results


def levels(
    concurrencies: Sequence[int],
    drafters: Sequence[MeasuredDrafter],
    plain: Sequence[Measured] | None,
) -> list[Level]:
    """Puts the servers' results beside each other."""
    return [
        _level(
            concurrency,
            [(drafter.k, drafter.levels[place]) for drafter in drafters],
            None if plain is None else plain[place],
        )
        for place, concurrency in enumerate(concurrencies)
    ]


def _level(
    concurrency: int, drafters: Sequence[tuple[int | None, Measured]], plain: Measured | None
) -> Level:
    speeds = [_drafter_speed(k, measured, plain) for k, measured in drafters]
    alone = None if plain is None else _speed(plain)
    return Level(
        concurrency=concurrency, plain=alone, drafters=speeds, best_k=_best_k(speeds, alone)
    )


def _drafter_speed(k: int | None, measured: Measured, plain: Measured | None) -> DrafterSpeed:
    speed = _speed(measured)
    return DrafterSpeed(
        k=k,
        speed=speed,
        acceptance=None if measured.counters is None else acceptance(measured.counters),
        speedup=(
            None if plain is None else speed.tokens_per_second / _speed(plain).tokens_per_second
        ),
        identical=None if plain is None else _identical(measured, plain),
    )


def _best_k(drafters: Sequence[DrafterSpeed], plain: ServerSpeed | None) -> int | None:
    """The measured number with the most tokens per second; the smaller one of two that are equal.

    None where there is nothing to choose from: no server without the draft, or one whose number
    nobody knows.
    """
    if plain is None or any(drafter.k is None for drafter in drafters):
        return None
    rates = {0: plain.tokens_per_second}
    rates |= {int(one.k or 0): one.speed.tokens_per_second for one in drafters}
    return max(sorted(rates), key=rates.__getitem__)


def acceptance(counters: DraftCounters) -> Acceptance:
    """Shares of what was counted."""
    drafts = counters.drafts
    return Acceptance(
        drafts=drafts,
        draft_tokens=counters.draft_tokens,
        accepted_tokens=counters.accepted_tokens,
        tau=1 + counters.accepted_tokens / drafts if drafts else None,
        acceptance_by_position=(
            [count / drafts for count in counters.accepted_by_position] if drafts else []
        ),
    )


def versions(client: Client) -> BenchVersions:
    """Of this library and of the server's vLLM."""
    return BenchVersions(
        speculators=__version__,
        vllm=client.version,
        python=platform.python_version(),
        machine=platform.machine(),
    )


def _speed(measured: Measured) -> ServerSpeed:
    tokens = sum(len(one.token_ids) for one in measured.completions)
    between = [
        one.seconds_per_token for one in measured.completions if one.seconds_per_token is not None
    ]
    return ServerSpeed(
        requests=len(measured.completions),
        tokens=tokens,
        seconds=measured.seconds,
        tokens_per_second=tokens / measured.seconds,
        first_token=_milliseconds([one.first_seconds for one in measured.completions]),
        inter_token=_milliseconds(between) if between else None,
    )


def _milliseconds(seconds: Sequence[float]) -> Milliseconds:
    values = 1000 * np.asarray(seconds)
    return Milliseconds(
        median=float(np.median(values)),
        mean=float(values.mean()),
        p99=float(np.percentile(values, 99)),
    )


def _identical(one: Measured, other: Measured) -> int:
    pairs = zip(one.completions, other.completions, strict=True)
    return sum(a.token_ids == b.token_ids for a, b in pairs)
