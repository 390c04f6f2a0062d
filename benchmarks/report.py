"""What benchmarks print and write: Markdown tables, a JSON file, and goals met or missed."""

import dataclasses
import json
import os
import pathlib
from typing import Any

from benchmarks.measurement import MIB, Measured

from speculators.atomic import atomic_file


@dataclasses.dataclass(frozen=True)
class Row:
    """One case by one implementation.

    Attributes:
        table: the table that it is in.
        case: what was measured, in words, the same for all implementations.
        implementation: ours or a peer.
        time: seconds; None where it does not run, see ``note``.
        floor: seconds at best, of the same case.
        moved: bytes read and written at least.
        flops: floating-point operations at least.
        peak: bytes beyond the arguments.
        note: what else there is to say.
    """

    table: str
    case: str
    implementation: str
    time: Measured | None
    floor: float | None = None
    moved: int | None = None
    flops: int | None = None
    peak: Measured | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Goal:
    """A number that was to be reached, and what was found.

    Attributes:
        name: what is measured, and in which case.
        found: the number.
        wanted: the bound.
        at_most: whether the bound is an upper one.
    """

    name: str
    found: float
    wanted: float
    at_most: bool

    @property
    def met(self) -> bool:
        """Whether it was reached."""
        return self.found <= self.wanted if self.at_most else self.found >= self.wanted

    def line(self) -> str:
        """For people."""
        bound = "at most" if self.at_most else "at least"
        verdict = "met" if self.met else "MISSED"
        return f"- {verdict}: {self.name}: {self.found:.3g}, wanted {bound} {self.wanted:g}"


class Report:
    """Rows as they come, printed table by table.

    Args:
        machine: what the benchmarks ran on.
        quick: whether sizes were only to show that everything runs.
    """

    def __init__(self, machine: dict[str, Any], *, quick: bool = False) -> None:
        self.machine = machine
        self.quick = quick
        self.rows: list[Row] = []
        self.goals: list[Goal] = []
        print(", ".join(f"{key}: {value}" for key, value in machine.items()), flush=True)

    def add(self, row: Row) -> Row:
        """Takes a row, and prints it; the head of a table is printed with its first row."""
        if not self.rows or self.rows[-1].table != row.table:
            heads = ["case", "by", "ms", "least", "rate", "floor, ms", "x floor", "peak, MiB", ""]
            print(f"\n### {row.table}\n\n| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
        self.rows.append(row)
        print(f"| {' | '.join(_cells(row))} |", flush=True)
        return row

    def goal(self, name: str, found: float, *, most: float = 0.0, least: float = 0.0) -> None:
        """Holds a number against the bound that was set: ``most`` or ``least``."""
        self.goals.append(Goal(name, found, most or least, at_most=bool(most)))

    def finish(self, output: str | os.PathLike[str]) -> None:
        """Prints the goals, and writes everything as JSON."""
        if self.goals:
            print(f"\n### Goals{', of larger sizes than these' if self.quick else ''}\n")
        for goal in self.goals:
            print(goal.line())
        content = {
            "machine": self.machine,
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "goals": [dataclasses.asdict(goal) | {"met": goal.met} for goal in self.goals],
        }
        with atomic_file(output, "w") as file:
            json.dump(content, file, indent=1)
        print(f"\nwritten to {pathlib.Path(output).resolve()}; ~ is extrapolated")


def _cells(row: Row) -> list[str]:
    if row.time is None:
        return [row.case, row.implementation, *["-"] * 6, row.note]
    mark = "~" if row.time.extrapolated else ""
    rate = ""
    if row.moved is not None:
        rate = f"{row.moved / row.time.median / 1e9:.1f} GB/s"
    if row.flops is not None:
        rate = f"{row.flops / row.time.median / 1e9:.0f} GFLOP/s"
    floor = ratio = peak = ""
    if row.floor is not None:
        floor, ratio = f"{row.floor * 1e3:.3g}", f"{mark}{row.time.median / row.floor:.2f}"
    if row.peak is not None:
        peak = f"{'~' if row.peak.extrapolated else ''}{row.peak.median / MIB:.1f}"
    median, least = (f"{mark}{value * 1e3:.4g}" for value in (row.time.median, row.time.least))
    return [row.case, row.implementation, median, least, rate, floor, ratio, peak, row.note]
