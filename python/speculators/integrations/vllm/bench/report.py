"""``BenchReport``: what a measurement of a server with a draft and without found.

``bench.json`` has everything; the table and ``bench.png`` are for a glance. Where there is nothing
to compare with, or nothing to divide by, a figure is None, null in JSON.
"""

import io
import pathlib
from collections.abc import Sequence

import pydantic
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter
from rich import box
from rich.markup import escape
from rich.table import Table

from speculators.atomic import atomic_file
from speculators.data.artifact import Path

FORMAT_VERSION = 1
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


class Level(_Part):
    """One concurrency.

    Attributes:
        concurrency: requests at a time.
        drafter: the server with the draft.
        plain: the one without; None if there is none.
        acceptance: of the drafts; None if the server does not say.
        speedup: tokens per second of ``drafter`` by those of ``plain``.
        identical: requests with the same tokens from both servers; None without ``plain``.
        recommended_k: tokens to draft at this concurrency, 0 for none; see ``bench_model``.
        expected_tokens_per_second: of all streams, for 0, 1, ..., K drafted tokens.
    """

    concurrency: int
    drafter: ServerSpeed
    plain: ServerSpeed | None
    acceptance: Acceptance | None
    speedup: float | None
    identical: int | None
    recommended_k: int | None
    expected_tokens_per_second: list[float]


class BenchSettings(_Part):
    """What was asked for.

    Attributes:
        k: tokens drafted before each verification; None if a running server decided.
        prompts: the file.
        requests: prompts at each concurrency.
        max_new_tokens: of each.
        server_flags: of vLLM, beside the draft.
    """

    k: int | None
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
        levels: one for each concurrency, in the order in which they ran.
        acceptance: of all levels together.
    """

    format_version: int = FORMAT_VERSION
    command: list[str]
    versions: BenchVersions
    draft: str
    verifier: str
    settings: BenchSettings
    levels: list[Level] = pydantic.Field(min_length=1)
    acceptance: Acceptance | None

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
    """The report for a terminal of 80 columns: two rows for each concurrency."""
    settings, total = report.settings, report.acceptance
    shares = [] if total is None else [f"{100 * s:.0f}" for s in total.acceptance_by_position]
    made = Table(
        title=f"{settings.requests} prompts, up to {settings.max_new_tokens} tokens each, "
        f"K {settings.k or '-'}, verifier {escape(report.verifier)}",
        caption=f"accepted up to each position, %: {' '.join(shares) or '-'}",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    for name in ("at once", "serving", "tokens/s", "speedup", "first ms", "next ms", "tau", "same"):
        made.add_column(name, justify="left" if name == "serving" else "right", no_wrap=True)
    made.add_column("best K", justify="right", no_wrap=True)
    for level in report.levels:
        at_once, found = str(level.concurrency), level.acceptance
        if level.plain is not None:
            made.add_row(at_once, "plain", *_speed(level.plain, 1.0), "-", "-", "-")
        made.add_row(
            at_once,
            "draft",
            *_speed(level.drafter, level.speedup),
            "-" if found is None or found.tau is None else f"{found.tau:.2f}",
            "-" if level.identical is None else f"{level.identical}/{level.drafter.requests}",
            "-" if level.recommended_k is None else str(level.recommended_k),
        )
    return made


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
    levels = sorted(report.levels, key=lambda level: level.concurrency)
    at = [level.concurrency for level in levels]
    rates = [level.drafter.tokens_per_second for level in levels]
    speed.plot(at, rates, marker="o", color="C0", linewidth=2, label="with the draft")
    plain = [(level.concurrency, level.plain) for level in levels if level.plain is not None]
    if plain:
        places = [place for place, _ in plain]
        rates = [found.tokens_per_second for _, found in plain]
        speed.plot(places, rates, marker="s", color="C1", linewidth=2, label="plain")
    speed.set_title("All streams together")
    speed.set_xscale("log", base=2)
    speed.set_xticks(at)
    speed.xaxis.set_major_formatter(ScalarFormatter())
    speed.set_xlabel("requests at a time")
    speed.set_ylabel("tokens per second")
    speed.set_ylim(bottom=0)
    speed.legend()
    shares = report.acceptance.acceptance_by_position if report.acceptance is not None else []
    accepted.plot(range(1, len(shares) + 1), shares, marker="o", linewidth=2, clip_on=False)
    accepted.set_title("Drafted tokens that the verifier accepted")
    accepted.set_xlabel("position in the draft")
    accepted.set_ylabel("share of the drafts")
    accepted.set_xlim(0.75, max(len(shares), 2) + 0.25)
    accepted.set_ylim(0.0, 1.0)
    accepted.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (speed, accepted):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(
        buffer, format="png", dpi=_DPI, bbox_inches=figure.bbox_inches
    )
    return buffer.getvalue()
