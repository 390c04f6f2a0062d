"""``EvaluationReport``: what an evaluation found, for programs, for readers and for a glance.

``report.json`` has everything. Its first keys are the main drafter's figures, so that a script need
not know that there can be several. ``report.md`` and the table say the same in words and columns.
"""

import json
import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import pydantic
from rich.markup import escape
from rich.table import Table

from speculators.atomic import atomic_file
from speculators.data.artifact import Path
from speculators.evaluation.plot import acceptance_plot
from speculators.evaluation.results import (
    Comparison,
    DrafterResult,
    EvaluationSettings,
    SpeedResult,
    TransformersResult,
    Versions,
)

FORMAT_VERSION = 1
JSON, MARKDOWN, PLOT = "report.json", "report.md", "acceptance.png"

_HEADER = ("decoding", "K", "tau", "95 %", "tokens/s", "speedup", "identical")
_NOTES = """\
tau is the mean number of tokens that the verifier emits in one pass, 1 + accepted tokens /
verifications, over all prompts together; the pass over the prompt is not counted. Its 95 % interval
is a bootstrap over prompts. Tokens per second are emitted tokens by seconds of wall clock, reading
the prompts included, loading the models not; the decoders took turns batch by batch. Plain is
decoding without a draft in the same engine, and "identical" compares with its tokens, one for one;
else it says how many prompts differ."""
_POSITIONS = """\
The share of the drafts accepted up to this position; in brackets, of those only that were accepted
up to the one before."""
_DIFFERENCES = """\
The first differing token of the first few prompts. A gap of about zero, in the verifier's
precision, is a tie that rounding decided; a larger one is an error."""


class EvaluationReport(pydantic.BaseModel):
    """One evaluation.

    Attributes:
        format_version: of ``report.json``.
        command: the command line that made it.
        versions: of what it ran with.
        verifier: where the verifier comes from.
        verifier_dtype: of its weights.
        settings: what the caller chose.
        prompts: how many.
        prompt_tokens: of all of them together.
        main: the drafter whose figures ``report.json`` has at its top, the first one.
        drafters: each drafter's results.
        plain: the speed of decoding without a drafter in our engine.
        transformers: transformers' own ``generate``; None where it was not run.
    """

    format_version: int = FORMAT_VERSION
    command: list[str]
    versions: Versions
    verifier: str
    verifier_dtype: str
    settings: EvaluationSettings
    prompts: int
    prompt_tokens: int
    main: str
    drafters: dict[str, DrafterResult]
    plain: SpeedResult
    transformers: TransformersResult | None = None

    @pydantic.model_validator(mode="after")
    def _check_main(self) -> "EvaluationReport":
        if self.main not in self.drafters:
            raise ValueError(f"main is {self.main!r}; expected one of {', '.join(self.drafters)}")
        return self

    @pydantic.model_serializer(mode="wrap")
    def _with_main_figures(self, handler: Any) -> dict[str, Any]:
        # Readers of the JSON find them at the top; reading back takes them from the main drafter.
        figures = {name: getattr(self, name) for name in _FIGURES}
        everything: dict[str, Any] = handler(self)
        return figures | everything

    @property
    def tau(self) -> float | None:
        """The main drafter's emitted tokens per verification."""
        return self.drafters[self.main].acceptance.tau

    @property
    def acceptance_by_position(self) -> list[float]:
        """The share of the main drafter's drafts accepted up to the first, second, ... token."""
        return self.drafters[self.main].acceptance.acceptance_by_position

    @property
    def tokens_per_second(self) -> float:
        """Of decoding with the main drafter."""
        return self.drafters[self.main].speed.tokens_per_second

    @property
    def baseline_tokens_per_second(self) -> float:
        """Of plain decoding in our engine."""
        return self.plain.tokens_per_second

    @property
    def transformers_tokens_per_second(self) -> float | None:
        """Of transformers' ``generate``; None where it was not run."""
        return None if self.transformers is None else self.transformers.speed.tokens_per_second

    @property
    def speedup(self) -> float:
        """The main drafter's, over plain decoding in our engine."""
        return self.drafters[self.main].speedup

    @property
    def identical(self) -> bool | None:
        """Whether the main drafter changed no token; None where tokens were sampled."""
        comparison = self.drafters[self.main].comparison
        return None if comparison is None else comparison.identical

    def write(self, directory: Path) -> None:
        """Writes report.json, report.md and acceptance.png, each whole or not at all.

        Args:
            directory: where to; made if need be. An older report there is replaced.
        """
        folder = pathlib.Path(directory)
        curves = {
            f"{name}: tau {_number(result.acceptance.tau)}": (
                result.acceptance.acceptance_by_position
            )
            for name, result in self.drafters.items()
        }
        image = acceptance_plot(curves)
        with atomic_file(folder / PLOT) as file:
            file.write(image)
        with atomic_file(folder / MARKDOWN, "w") as file:
            file.write(markdown(self))
        with atomic_file(folder / JSON, "w") as file:
            file.write(self.model_dump_json(indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> "EvaluationReport":
        """Reads a report.

        Args:
            path: a report.json, or the folder that has one.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is no report, or one of another format version.
        """
        file = pathlib.Path(path)
        file = file / JSON if file.is_dir() else file
        text = file.read_text(encoding="utf-8")
        try:
            content = json.loads(text)
            version = content["format_version"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{file} is no evaluation report: no JSON object with format_version"
            ) from error
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{file} has format_version {version!r}; expected {FORMAT_VERSION}. Read it with "
                "the version of speculators that wrote it, or evaluate again"
            )
        try:
            return cls.model_validate(content)
        except pydantic.ValidationError as error:
            raise ValueError(f"{file} is no evaluation report: {error}") from error


_FIGURES = (
    "tau",
    "acceptance_by_position",
    "tokens_per_second",
    "baseline_tokens_per_second",
    "transformers_tokens_per_second",
    "speedup",
    "identical",
)


def table(report: EvaluationReport) -> Table:
    """The report as a table for a terminal."""
    made = Table(title=f"{report.prompts} prompts, verifier {report.verifier}")
    # In a narrow terminal the names and the shares by position take several lines.
    made.add_column(_HEADER[0], overflow="fold")
    for column in _HEADER[1:]:
        made.add_column(column, justify="right", no_wrap=True)
    made.add_column("accepted, %")
    shares = [r.acceptance.acceptance_by_position for r in report.drafters.values()]
    rows = _rows(report)
    without: list[list[float]] = [[] for _ in range(len(rows) - len(shares))]
    for row, accepted in zip(rows, without + shares, strict=True):
        percent = [f"{100 * share:.0f}" for share in accepted]
        made.add_row(*map(escape, row), " ".join(percent))
    return made


def markdown(report: EvaluationReport) -> str:
    """The report as Markdown; it shows the plot that lies beside it."""
    settings, versions = report.settings, report.versions
    chosen = "greedy" if settings.temperature == 0 else f"temperature {settings.temperature}"
    longest = max(len(r.acceptance.acceptance_by_position) for r in report.drafters.values())
    positions = [
        [str(place + 1), *(_at(result, place) for result in report.drafters.values())]
        for place in range(longest)
    ]
    asked = (
        f"{report.prompts} prompts ({report.prompt_tokens} tokens), up to "
        f"{settings.max_new_tokens} new tokens each, {chosen}, batches of {settings.batch_size}; "
        f"verifier `{report.verifier}` in {report.verifier_dtype}."
    )
    ran = (
        f"speculators {versions.speculators}, torch {versions.torch}, transformers "
        f"{versions.transformers}, Python {versions.python}, {versions.device}, "
        f"threads: {versions.threads}, seed: {settings.seed}, batches of warm-up: "
        f"{settings.warmup}, repeats: {settings.repeats}."
    )
    sections = [
        "# Evaluation",
        asked,
        _markdown_table(_HEADER, _rows(report)),
        _NOTES,
        *(f"{name} drafts trees: {r.tree}." for name, r in report.drafters.items() if r.tree),
        "## Acceptance by position",
        _POSITIONS,
        _markdown_table(("position", *report.drafters), positions),
        f"![acceptance by position]({PLOT})",
        *_differences(report),
        "## How it was made",
        f"    {shlex.join(report.command)}",
        ran,
    ]
    return "\n\n".join(sections) + "\n"


def _rows(report: EvaluationReport) -> list[list[str]]:
    """The cells under ``_HEADER``: plain decoding, transformers', then each drafter."""
    nothing = ["-", "-", "-"]
    rows = [["plain", *nothing, *_speed(report.plain, 1.0), "-"]]
    if report.transformers is not None:
        speed = report.transformers.speed
        speedup = speed.tokens_per_second / report.plain.tokens_per_second
        same = _same(report.transformers.comparison)
        rows.append(["transformers", *nothing, *_speed(speed, speedup), same])
    for name, result in report.drafters.items():
        figures = result.acceptance
        interval = "-"
        if figures.tau_interval is not None:
            interval = "-".join(map(_number, figures.tau_interval))
        rows.append(
            [
                name,
                str(figures.k) if result.tree is None else f"{figures.k} deep",
                _number(figures.tau),
                interval,
                *_speed(result.speed, result.speedup),
                _same(result.comparison),
            ]
        )
    return rows


def _speed(speed: SpeedResult, speedup: float) -> list[str]:
    return [f"{speed.tokens_per_second:.1f}", f"{speedup:.2f}x"]


def _same(comparison: Comparison | None) -> str:
    if comparison is None:
        return "-"
    return "yes" if comparison.identical else f"{comparison.different_prompts} differ"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _at(result: DrafterResult, place: int) -> str:
    shares = result.acceptance.acceptance_by_position
    if place >= len(shares):
        return "-"
    conditional = result.acceptance.conditional_acceptance_by_position[place]
    return f"{_number(shares[place])} ({_number(conditional)})"


def _differences(report: EvaluationReport) -> list[str]:
    compared: Mapping[str, Comparison | None] = {
        name: result.comparison for name, result in report.drafters.items()
    }
    if report.transformers is not None:
        compared = {"transformers": report.transformers.comparison, **compared}
    rows = [
        [
            name,
            str(found.prompt),
            str(found.line or "-"),
            str(found.index),
            *("end" if token is None else str(token) for token in (found.expected, found.found)),
            "-" if found.logit_gap is None else f"{found.logit_gap:.2g}",
        ]
        for name, comparison in compared.items()
        if comparison is not None
        for found in comparison.divergences
    ]
    if not rows:
        return []
    header = ("decoding", "prompt", "line", "token", "plain's", "found", "logit gap")
    return [
        "## Differences from plain decoding",
        _DIFFERENCES,
        _markdown_table(header, rows),
    ]


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [header, ["---"] * len(header), *rows]
    escaped = [[cell.replace("|", r"\|") for cell in row] for row in cells]
    return "\n".join(f"| {' | '.join(row)} |" for row in escaped)
