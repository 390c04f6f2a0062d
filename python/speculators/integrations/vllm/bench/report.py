"""``BenchReport``: what a measurement of a server with a draft and without found.

``bench.json`` has everything; the table and ``bench.png`` are for a glance. Where there is nothing
to compare with, or nothing to divide by, a figure is None, null in JSON.
"""

import io
import pathlib
from collections.abc import Sequence

import pydantic
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter
from rich import box
from rich.markup import escape
from rich.table import Table

from speculators.atomic import atomic_file
from speculators.data.artifact import Path

FORMAT_VERSION = 2
JSON, PLOT = "bench.json", "bench.png"

_DPI, _INCHES = 100, (11.0, 4.5)


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


class Milliseconds(_Part):
    """The median, the mean and the 99th percentile of some times, in milliseconds."""

    median: float
    mean: float
    p99: float


class ServerSpeed(_Part):
    """One server at one concurrency.

    Attributes:
        requests: continuations.
        tokens: new tokens of all of them.
        seconds: of wall clock for all of them.
        tokens_per_second: their ratio, of all streams together.
        first_token: from asking to the first token, over requests.
        inter_token: from a token to the next, the mean of each request, over requests; None where
            no request had two tokens.
    """

    requests: int
    tokens: int
    seconds: float
    tokens_per_second: float
    first_token: Milliseconds
    inter_token: Milliseconds | None


class Acceptance(_Part):
    """What a server counted of its drafts.

    Attributes:
        drafts: verifications with a draft.
        draft_tokens: drafted tokens.
        accepted_tokens: those that were accepted.
        tau: emitted tokens per verification, 1 + accepted tokens / drafts.
        acceptance_by_position: the share of the drafts whose first, second, ... token was accepted.
    """

    drafts: int
    draft_tokens: int
    accepted_tokens: int
    tau: float | None
    acceptance_by_position: list[float]


class DrafterSpeed(_Part):
    """One server with the draft at one concurrency.

    Attributes:
        k: tokens drafted before each verification; None if a running server does not say.
        speed: how fast it is.
        acceptance: of the drafts; None if the server does not say.
        speedup: its tokens per second by those of the server without the draft.
        identical: requests with the same tokens from both; None without the other server.
    """

    k: int | None
    speed: ServerSpeed
    acceptance: Acceptance | None
    speedup: float | None
    identical: int | None


class Level(_Part):
    """One concurrency.

    Attributes:
        concurrency: requests at a time.
        plain: the server without the draft; None if there is none.
        drafters: those with it, one for each number of drafted tokens.
        best_k: of the numbers that were measured, that with the most tokens per second; 0 is the
            server without the draft. None where there is no other to compare with.
    """

    concurrency: int
    plain: ServerSpeed | None
    drafters: list[DrafterSpeed] = pydantic.Field(min_length=1)
    best_k: int | None


class Drafter(_Part):
    """One server with the draft, all levels together.

    Attributes:
        k: tokens drafted before each verification; None if a running server does not say.
        acceptance: of the drafts; None if the server does not say.
    """

    k: int | None
    acceptance: Acceptance | None


class BenchSettings(_Part):
    """What was asked for.

    Attributes:
        prompts: the file.
        requests: prompts at each concurrency.
        max_new_tokens: of each.
        server_flags: of vLLM, beside the draft.
    """

    prompts: str
    requests: int
    max_new_tokens: int
    server_flags: list[str]


class BenchVersions(_Part):
    """What it ran with."""

    speculators: str
    vllm: str | None
    python: str
    machine: str


class BenchReport(_Part):
    """One measurement.

    Attributes:
        format_version: of ``bench.json``.
        command: the command line that made it.
        versions: of what it ran with.
        draft: its directory.
        verifier: where the verifier comes from.
        settings: what was asked for.
        drafters: the servers with the draft, in the order in which they ran.
        levels: one for each concurrency, in the order in which they ran; each has the drafters in
            the same order.
    """

    format_version: int = FORMAT_VERSION
    command: list[str]
    versions: BenchVersions
    draft: str
    verifier: str
    settings: BenchSettings
    drafters: list[Drafter] = pydantic.Field(min_length=1)
    levels: list[Level] = pydantic.Field(min_length=1)

    def write(self, directory: Path) -> None:
        """Writes bench.json and bench.png, each whole or not at all; older ones are replaced."""
        folder = pathlib.Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        image = plot(self)
        with atomic_file(folder / PLOT) as file:
            file.write(image)
        with atomic_file(folder / JSON, "w") as file:
            file.write(self.model_dump_json(indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> "BenchReport":
        """Reads a report.

        Args:
            path: a bench.json, or the folder that has one.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is no such report, or one of another format version.
        """
        file = pathlib.Path(path)
        file = file / JSON if file.is_dir() else file
        try:
            report = cls.model_validate_json(file.read_bytes())
        except pydantic.ValidationError as error:
            raise ValueError(f"{file} is no report of a bench: {error}") from None
        if report.format_version != FORMAT_VERSION:
            raise ValueError(
                f"{file} has format_version {report.format_version}; expected {FORMAT_VERSION}. "
                "Read it with the version of speculators that wrote it, or measure again"
            )
        return report


def table(report: BenchReport) -> Table:
    """The report for a terminal of 80 columns: a row for each server at each concurrency."""
    settings = report.settings
    made = Table(
        title=f"{settings.requests} prompts, up to {settings.max_new_tokens} tokens each, "
        f"verifier {escape(report.verifier)}",
        caption="\n".join(map(_accepted, report.drafters)),
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    for name in ("at once", "serving", "tokens/s", "speedup", "first ms", "next ms", "tau", "same"):
        made.add_column(name, justify="left" if name == "serving" else "right", no_wrap=True)
    made.add_column("", no_wrap=True)
    for level in report.levels:
        at_once = str(level.concurrency)
        if level.plain is not None:
            best = "best" if level.best_k == 0 else ""
            made.add_row(at_once, "plain", *_speed(level.plain, 1.0), "-", "-", best)
        for drafter in level.drafters:
            found = drafter.acceptance
            made.add_row(
                at_once,
                _name(drafter.k),
                *_speed(drafter.speed, drafter.speedup),
                "-" if found is None or found.tau is None else f"{found.tau:.2f}",
                "-" if drafter.identical is None else f"{drafter.identical}/{settings.requests}",
                "best" if level.best_k is not None and drafter.k == level.best_k else "",
            )
    return made


def _name(k: int | None) -> str:
    """Of a server with the draft."""
    return "draft" if k is None else f"K {k}"


def _accepted(drafter: Drafter) -> str:
    shares = [] if drafter.acceptance is None else drafter.acceptance.acceptance_by_position
    listed = " ".join(f"{100 * share:.0f}" for share in shares) or "-"
    return f"{_name(drafter.k)}: accepted up to each position, %: {listed}"


def _speed(speed: ServerSpeed, speedup: float | None) -> Sequence[str]:
    return (
        f"{speed.tokens_per_second:.1f}",
        "-" if speedup is None else f"{speedup:.2f}x",
        f"{speed.first_token.median:.1f}",
        "-" if speed.inter_token is None else f"{speed.inter_token.median:.2f}",
    )


def plot(report: BenchReport) -> bytes:
    """Tokens per second by concurrency, and acceptance by position; a PNG.

    It is drawn without pyplot, whose figures and settings belong to whoever uses this library.
    """
    figure = Figure(figsize=_INCHES, dpi=_DPI, layout="constrained")
    speed, accepted = figure.subplots(1, 2)
    _plot_speed(report, speed)
    _plot_acceptance(report, accepted)
    for axes in (speed, accepted):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(
        buffer, format="png", dpi=_DPI, bbox_inches=figure.bbox_inches
    )
    return buffer.getvalue()


def _plot_speed(report: BenchReport, axes: Axes) -> None:
    levels = sorted(report.levels, key=lambda level: level.concurrency)
    at = [level.concurrency for level in levels]
    plain = [(level.concurrency, level.plain) for level in levels if level.plain is not None]
    if plain:
        rates = [found.tokens_per_second for _, found in plain]
        places = [place for place, _ in plain]
        axes.plot(places, rates, marker="s", color="black", linewidth=2, label="plain")
    for number, drafter in enumerate(report.drafters):
        rates = [level.drafters[number].speed.tokens_per_second for level in levels]
        axes.plot(at, rates, marker="o", color=f"C{number}", linewidth=2, label=_name(drafter.k))
    axes.set_title("All streams together")
    axes.set_xscale("log", base=2)
    axes.set_xticks(at)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("requests at a time")
    axes.set_ylabel("tokens per second")
    axes.set_ylim(bottom=0)
    axes.legend()


def _plot_acceptance(report: BenchReport, axes: Axes) -> None:
    longest = 2
    for number, drafter in enumerate(report.drafters):
        found = drafter.acceptance
        shares = [] if found is None else found.acceptance_by_position
        longest = max(longest, len(shares))
        axes.plot(
            range(1, len(shares) + 1),
            shares,
            marker="o",
            color=f"C{number}",
            linewidth=2,
            clip_on=False,
            label=_name(drafter.k),
        )
    axes.set_title("Drafted tokens that the verifier accepted")
    axes.set_xlabel("position in the draft")
    axes.set_ylabel("share of the drafts")
    axes.set_xlim(0.75, longest + 0.25)
    axes.set_ylim(0.0, 1.0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
