"""Reports: intervals, JSON there and back, Markdown, the table, the picture."""

import io
import json
import pathlib
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import image
from rich.console import Console

from speculators.decoding.acceptance import AcceptanceCounts
from speculators.evaluation import EvaluationReport, table
from speculators.evaluation.acceptance import acceptance_result, tau_interval
from speculators.evaluation.plot import HEIGHT, WIDTH, acceptance_plot
from speculators.evaluation.report import markdown
from speculators.evaluation.results import (
    Comparison,
    DivergenceResult,
    DrafterResult,
    EvaluationSettings,
    SpeedResult,
    TransformersResult,
    Versions,
)


def traces(prompts: int, seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [
        generator.binomial(4, generator.uniform(0.2, 0.8), size=int(length)).tolist()
        for length in generator.integers(3, 40, size=prompts)
    ]


def drafter(steps: list[list[int]], tokens_per_second: float = 30.0, **changes: Any) -> Any:
    counts = AcceptanceCounts()
    for trace in steps:
        for accepted in trace:
            counts.record(4, accepted)
    fields: dict[str, Any] = {
        "kind": "eagle3",
        "acceptance": acceptance_result(counts, steps, 4),
        "speed": SpeedResult(tokens=300, seconds=10.0, tokens_per_second=tokens_per_second),
        "speedup": tokens_per_second / 20.0,
        "draft_time_share": 0.25,
        "comparison": Comparison(identical=True, different_prompts=0, divergences=[]),
    }
    return DrafterResult(**fields | changes)


def make_report(**changes: Any) -> EvaluationReport:
    different = Comparison(
        identical=False,
        different_prompts=2,
        divergences=[
            DivergenceResult(
                prompt=1, line=7, index=11, expected=345, found=678, logit_gap=0.015625
            ),
            DivergenceResult(prompt=3, line=9, index=12, expected=910),
        ],
    )
    fields: dict[str, Any] = {
        "command": ["speculators", "evaluate", "a b"],
        "versions": Versions(
            speculators="1.2.3",
            torch="2.99",
            transformers="5.99",
            python="3.11.0",
            device="cpu (x)",
            threads=2,
        ),
        "verifier": "some/verifier",
        "verifier_dtype": "bfloat16",
        "settings": EvaluationSettings(
            k=None,
            max_new_tokens=128,
            batch_size=2,
            temperature=0.0,
            seed=5,
            warmup=1,
            repeats=3,
        ),
        "prompts": 12,
        "prompt_tokens": 345,
        "main": "ours",
        "drafters": {
            "ours": drafter(traces(12)),
            "other|one [x]": drafter(traces(12, seed=1), 25.0, comparison=different),
            "silent": drafter([[], []], 19.0, comparison=None),
        },
        "plain": SpeedResult(tokens=300, seconds=15.0, tokens_per_second=20.0),
        "transformers": TransformersResult(
            speed=SpeedResult(tokens=300, seconds=20.0, tokens_per_second=15.0)
        ),
    }
    return EvaluationReport(**fields | changes)


def test_interval_contains_tau_and_shrinks_with_prompts() -> None:
    widths = []
    for prompts in (5, 50, 500):
        steps = traces(prompts)
        every = [accepted for trace in steps for accepted in trace]
        interval = tau_interval(steps)
        assert interval is not None
        low, high = interval
        assert low < 1 + sum(every) / len(every) < high
        widths.append(high - low)
    assert widths[0] > widths[1] > widths[2] > 0
    # As the root of the number of prompts, roughly.
    assert widths[1] / widths[2] == pytest.approx(10**0.5, rel=0.35)
    # And with many prompts as wide as the normal approximation of a ratio's error.
    accepted = np.array([sum(trace) for trace in steps])
    verified = np.array([len(trace) for trace in steps])
    residuals = accepted - verified * accepted.sum() / verified.sum()
    error = np.sqrt((residuals**2).sum()) / verified.sum()
    assert widths[2] == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_interval_is_that_of_prompts_drawn_one_resample_after_the_other() -> None:
    steps, generator = traces(20), np.random.default_rng(7)
    taus = []
    for _ in range(4000):
        drawn = [steps[prompt] for prompt in generator.integers(len(steps), size=len(steps))]
        taus.append(1 + sum(map(sum, drawn)) / sum(map(len, drawn)))
    low, high = np.quantile(taus, [0.025, 0.975])
    interval = tau_interval(steps, resamples=4000)
    assert interval == pytest.approx((low, high), abs=0.1 * (high - low))


def test_interval_has_its_coverage() -> None:
    """Of many samples from known prompts about 95 % have the true tau in their interval."""
    everything = traces(5000, seed=3)
    every = [accepted for trace in everything for accepted in trace]
    tau = 1 + sum(every) / len(every)
    hits = 0
    for sample in range(100):
        interval = tau_interval(everything[50 * sample : 50 * sample + 50], resamples=300)
        assert interval is not None
        hits += interval[0] <= tau <= interval[1]
    assert 88 <= hits <= 99


def test_interval_depends_on_the_seed_alone() -> None:
    steps = traces(9)
    assert tau_interval(steps, seed=1) == tau_interval(steps, seed=1) != tau_interval(steps, seed=2)
    # Prompts that ended at once, with nothing to verify, say nothing.
    assert tau_interval([[], *steps, []], seed=1) == tau_interval(steps, seed=1)
    assert tau_interval([[], []]) is None
    assert tau_interval([[3, 2]]) == (3.5, 3.5)


def test_report_is_read_back_as_it_was(tmp_path: pathlib.Path) -> None:
    report = make_report()
    report.write(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert sorted(file.name for file in folder.iterdir()) == [
        "acceptance.png",
        "report.json",
        "report.md",
    ]
    for place in (folder, folder / "report.json"):
        assert EvaluationReport.read(place) == report
    content = json.loads((folder / "report.json").read_text())
    ours = report.drafters["ours"]
    assert content["tau"] == ours.acceptance.tau == report.tau
    assert content["acceptance_by_position"] == ours.acceptance.acceptance_by_position
    assert len(content["acceptance_by_position"]) == 4
    assert content["tokens_per_second"] == 30.0
    assert content["baseline_tokens_per_second"] == 20.0
    assert content["transformers_tokens_per_second"] == 15.0
    assert content["speedup"] == 1.5
    assert content["identical"] is True
    assert content["prompts"] == 12
    assert content["command"] == ["speculators", "evaluate", "a b"]
    assert content["versions"]["torch"] == "2.99"
    assert content["drafters"]["silent"]["acceptance"]["tau"] is None
    # The older report is replaced.
    make_report(main="silent", transformers=None).write(folder)
    content = json.loads((folder / "report.json").read_text())
    assert content["tau"] is content["identical"] is None
    assert content["transformers_tokens_per_second"] is None


def test_what_is_no_report_is_refused(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "report.json"
    with pytest.raises(FileNotFoundError):
        EvaluationReport.read(tmp_path)
    make_report().write(tmp_path)
    good = json.loads(file.read_text())
    for text, words in (
        ("{", "no JSON object"),
        ("[]", "no JSON object"),
        ("{}", "no JSON object"),
        (json.dumps(good | {"format_version": 99}), "format_version 99; expected 1"),
        (json.dumps(good | {"main": "nobody"}), "nobody"),
        (json.dumps(good | {"drafters": {"ours": {}}}), "kind"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=words) as caught:
            EvaluationReport.read(tmp_path)
        assert str(file) in str(caught.value)


def test_a_narrow_table_breaks_names_and_no_figures() -> None:
    report, name = make_report(), "tree=dynamic, nodes=24, depth=5, children=6"
    ours = report.drafters["ours"]
    buffer = io.StringIO()
    long = report.model_copy(update={"drafters": {name: ours}, "main": name})
    Console(file=buffer, width=80).print(table(long))
    assert ours.acceptance.tau_interval is not None
    low, high = ours.acceptance.tau_interval
    figures = [f"{ours.acceptance.tau:.2f}", f"{low:.2f}-{high:.2f}", "1.50x", "yes"]
    printed = buffer.getvalue()
    assert all(words in printed for words in figures)
    rows = [line.split("│") for line in printed.splitlines() if line.startswith("│")]
    assert name.replace(" ", "") in "".join(row[1].replace(" ", "") for row in rows)


def test_markdown_and_table_have_the_figures() -> None:
    report = make_report()
    text = markdown(report)
    buffer = io.StringIO()
    Console(file=buffer, width=120).print(table(report))
    printed = buffer.getvalue()
    figures = report.drafters["ours"].acceptance
    assert figures.tau_interval is not None
    row = (
        f"| ours | 4 | {figures.tau:.2f} | {figures.tau_interval[0]:.2f}-"
        f"{figures.tau_interval[1]:.2f} | 30.0 | 1.50x | yes |"
    )
    assert row in text.splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    (line,) = (line for line in printed.splitlines() if line.startswith("│ ours"))
    percent = " ".join(f"{100 * share:.0f}" for share in figures.acceptance_by_position)
    assert [cell.strip() for cell in line.strip("│").split("│")] == [*cells, percent]
    assert r"| other\|one [x] | 4 |" in text
    assert "other|one [x]" in printed
    assert "| 25.0 | 1.25x | 2 differ |" in text
    assert "| silent | 4 | - | - | 19.0 | 0.95x | - |" in text
    assert "| plain | - | - | - | 20.0 | 1.00x | - |" in text
    assert "| transformers | - | - | - | 15.0 | 0.75x | - |" in text
    share, given = (
        figures.acceptance_by_position[2],
        figures.conditional_acceptance_by_position[2],
    )
    assert f"| 3 | {share:.2f} ({given:.2f}) |" in text
    assert r"| other\|one [x] | 1 | 7 | 11 | 345 | 678 | 0.016 |" in text
    assert r"| other\|one [x] | 3 | 9 | 12 | 910 | end | - |" in text
    for words in ("12 prompts (345 tokens)", "some/verifier", "bfloat16", "acceptance.png", "2.99"):
        assert words in text
    assert "speculators evaluate 'a b'" in text
    same = {"ours": drafter(traces(3))}
    assert "Differences" not in markdown(make_report(drafters=same))


def pixels(png: bytes) -> Any:
    return image.imread(io.BytesIO(png), format="png")[..., :3]


def test_plot_is_an_image_of_its_size() -> None:
    curves = {"a: tau 2.31": [0.8, 0.5, 0.25], "_b $x$": [0.6, 0.3], "without": []}
    png = acceptance_plot(curves)
    assert pixels(png).shape == (HEIGHT, WIDTH, 3) == (500, 800, 3)
    # Lines, markers and the legend: more ink than axes alone, and what is drawn depends on it.
    ink = (pixels(png) < 0.9).any(-1).sum()
    assert ink > (pixels(acceptance_plot({})) < 0.9).any(-1).sum() + 2000
    assert acceptance_plot(curves) == png
    assert acceptance_plot({**curves, "without": [0.1]}) != png
    assert (
        acceptance_plot({"a: tau 2.31": [0.8, 0.5, 0.25], "_c": [0.6, 0.3], "without": []}) != png
    )


def test_plot_leaves_matplotlib_alone() -> None:
    before = dict(mpl.rcParams)
    expected = pixels(acceptance_plot({"a": [0.5]})).shape
    assert dict(mpl.rcParams) == before
    with mpl.rc_context({"savefig.bbox": "tight", "savefig.dpi": 50}):
        assert pixels(acceptance_plot({"a": [0.5]})).shape == expected
