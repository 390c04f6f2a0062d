"""Measures a server with a draft and one without, on the same prompts, at several concurrencies.

Servers that are started here run one after the other, since two of them would share the machine's
memory and its cores. Each continues a few prompts first, which are not counted, because vLLM
compiles and allocates when it first meets a size. A kept prefix of a prompt is not used again at
the next concurrency: every one of them reads its prompts anew.
"""

import dataclasses
import platform
import uuid
from collections.abc import Callable, Sequence

import numpy as np

from speculators.data.generate import Progress
from speculators.integrations.vllm.bench_client import (
    Completion,
    DraftCounters,
    Load,
    Server,
)
from speculators.integrations.vllm.bench_model import recommend
from speculators.integrations.vllm.bench_report import (
    Acceptance,
    BenchVersions,
    Level,
    Milliseconds,
    ServerSpeed,
)
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


def measure(
    server: Server,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    concurrencies: Sequence[int],
    *,
    progress: Progress,
    name: str,
) -> list[Measured]:
    """Continues all prompts at each concurrency.

    Args:
        server: who continues them.
        prompts: token ids.
        max_new_tokens: of each.
        concurrencies: requests at a time.
        progress: told of each prompt.
        name: of the server, for ``progress``.

    Raises:
        BenchError: the server does not answer as it should.
    """

    def run(
        chosen: Sequence[Sequence[int]], at_a_time: int, done: Callable[[], None]
    ) -> tuple[list[Completion], float]:
        salt = uuid.uuid4().hex
        return Load(
            server, chosen, max_new_tokens, concurrency=at_a_time, salt=salt, done=done
        ).run()

    for at_a_time in concurrencies:  # to warm up
        run(prompts[:at_a_time], at_a_time, lambda: None)
    results = []
    for at_a_time in concurrencies:
        progress.start(len(prompts), f"{name}, {at_a_time} at a time")
        before = server.counters()
        completions, seconds = run(prompts, at_a_time, lambda: progress.advance(1))
        after = server.counters()
        counters = None
        if after is not None:
            counters = after.since(before or DraftCounters())
        results.append(Measured(completions, seconds, counters))
    return results


def levels(
    concurrencies: Sequence[int], drafter: Sequence[Measured], plain: Sequence[Measured] | None
) -> list[Level]:
    """Puts the two servers' results beside each other."""
    without: Sequence[Measured | None] = plain if plain is not None else [None] * len(drafter)
    return [
        _level(at_a_time, with_draft, alone)
        for at_a_time, with_draft, alone in zip(concurrencies, drafter, without, strict=True)
    ]


def _level(concurrency: int, drafter: Measured, plain: Measured | None) -> Level:
    found = None if drafter.counters is None else acceptance(drafter.counters)
    speed, alone = _speed(drafter), None if plain is None else _speed(plain)
    recommended, expected = None, []
    if alone is not None and found is not None and found.acceptance_by_position:
        length = recommend(
            alone.tokens_per_second, speed.tokens_per_second, found.acceptance_by_position
        )
        recommended, expected = length.recommended, length.tokens_per_second
    return Level(
        concurrency=concurrency,
        drafter=speed,
        plain=alone,
        acceptance=found,
        speedup=None if alone is None else speed.tokens_per_second / alone.tokens_per_second,
        identical=None if plain is None else _identical(drafter, plain),
        recommended_k=recommended,
        expected_tokens_per_second=expected,
    )


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


def total_acceptance(measured: Sequence[Measured]) -> Acceptance | None:
    """Of all concurrencies together; None if the server does not draft."""
    total = None
    for counters in (one.counters for one in measured):
        if counters is not None:
            total = counters if total is None else total.plus(counters)
    return None if total is None else acceptance(total)


def versions(server: Server) -> BenchVersions:
    """Of this library and of the server's vLLM."""
    return BenchVersions(
        speculators=__version__,
        vllm=server.version,
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
