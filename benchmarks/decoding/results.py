"""What the decoding benchmark prints and writes: two Markdown tables, and the same as JSON."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.decoding.decoders import Settings
from benchmarks.decoding.step_profile import PARTS, Profile

from speculators.atomic import atomic_file
from speculators.decoding.acceptance import AcceptanceCounts
from speculators.evaluation.comparison import compare
from speculators.evaluation.decoders import Decoded
from speculators.evaluation.prompts import Prompt
from speculators.evaluation.speed import Timed
from speculators.models.verifier.verifier import Verifier


@dataclasses.dataclass(frozen=True)
class Result:
    """One decoder on all prompts.

    Attributes:
        decoder: its name.
        tokens: that it wrote.
        seconds: for each prompt the median of its repeats, together.
        speedup: its tokens per second, divided by the baseline's.
        tau: emitted tokens per verification; None where it is not known, or nothing was drafted.
        different: prompts with other tokens than the baseline's.
        logit_gaps: at the first difference of some of those, how much larger the verifier's logit
            of the baseline's token is; about zero is a tie. None where one of the texts had ended.
    """

    decoder: str
    tokens: int
    seconds: float
    speedup: float
    tau: float | None
    different: int
    logit_gaps: list[float | None]


def result_of(
    decoder: str,
    verifier: Verifier,
    prompts: Sequence[Prompt],
    baseline: Sequence[Timed[Decoded]],
    done: Sequence[Timed[Decoded]],
) -> Result:
    """The figures of a decoder.

    Args:
        decoder: its name.
        verifier: whose text it should be.
        prompts: what was continued, one in a batch.
        baseline: the decoder to compare with.
        done: what this one did.
    """
    counts = AcceptanceCounts()
    for batch in done:
        counts += batch.result.counts
    compared = compare(verifier, prompts, _sequences(baseline), _sequences(done))
    return Result(
        decoder,
        tokens=sum(map(len, _sequences(done))),
        seconds=sum(batch.median for batch in done),
        speedup=_rate(done) / _rate(baseline),
        tau=counts.tau if counts.drafts else None,
        different=compared.different_prompts,
        logit_gaps=[divergence.logit_gap for divergence in compared.divergences],
    )


def show(
    machine: Mapping[str, Any],
    results: Sequence[Result],
    profiles: Mapping[str, Profile],
    notes: str,
) -> None:
    """Prints both tables."""
    print(", ".join(f"{key}: {value}" for key, value in machine.items()))
    heads = ["decoder", "tokens/s", f"x {results[0].decoder}", "tau", "identical tokens"]
    _print_row("\n### Decoding, greedy, float32, batch 1\n\n", heads)
    _print_row("", ["---"] * len(heads))
    for result in results:
        tau = "" if result.tau is None else f"{result.tau:.2f}"
        same = "yes" if not result.different else f"no, in {result.different} prompts"
        rate = f"{result.tokens / result.seconds:.1f}"
        _print_row("", [result.decoder, rate, f"{result.speedup:.2f}", tau, same])
    print(f"\n{notes}")
    heads = ["decoder", "steps", "ms a step", *PARTS]
    _print_row("\n### Where the time of a step goes\n\n", heads)
    _print_row("", ["---"] * len(heads))
    for name, profile in profiles.items():
        if profile.steps:
            shares = [f"{profile.shares[part]:.1%}" for part in PARTS]
            step = f"{profile.seconds / profile.steps * 1e3:.3g}"
            _print_row("", [name, str(profile.steps), step, *shares])


def write(
    output: pathlib.Path,
    machine: Mapping[str, Any],
    settings: Settings,
    results: Sequence[Result],
    profiles: Mapping[str, Profile],
) -> None:
    """Writes everything as JSON."""
    content = {
        "machine": machine,
        "settings": dataclasses.asdict(settings),
        "decoders": [dataclasses.asdict(result) for result in results],
        "profiles": {name: dataclasses.asdict(profile) for name, profile in profiles.items()},
    }
    with atomic_file(output, "w") as file:
        json.dump(content, file, indent=1)
    print(f"\nwritten to {output.resolve()}")


def _print_row(before: str, cells: Sequence[str]) -> None:
    print(f"{before}| {' | '.join(cells)} |")


def _rate(done: Sequence[Timed[Decoded]]) -> float:
    return sum(map(len, _sequences(done))) / sum(batch.median for batch in done)


def _sequences(done: Sequence[Timed[Decoded]]) -> list[list[int]]:
    return [sequence for batch in done for sequence in batch.result.sequences]
