"""What ``speculators bench`` computes: counters, acceptance, the best K, the report."""

import io
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import pytest
from matplotlib import image
from rich.console import Console

from speculators.integrations.vllm.bench import measurement
from speculators.integrations.vllm.bench import report as bench_report
from speculators.integrations.vllm.bench.counters import DraftCounters, parse_counters
from speculators.integrations.vllm.bench.load import Completion
from speculators.integrations.vllm.bench.measurement import Measured, MeasuredDrafter
from speculators.integrations.vllm.bench.report import BenchReport

METRICS = """\
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="a,b"} 100.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="a,b"} 20.0
vllm:spec_decode_num_drafts_created{engine="0",model_name="a,b"} 1.7e+09
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="a,b"} 360.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="a,b"} 1.2e+02
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="0"} 70.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="2"} 10.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",model_name="m",position="0"} 10.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="1"} 30.0
vllm:spec_decode_num_accepted_tokens_per_pos_created{engine="0",position="0"} 1.7e+09
vllm:num_requests_running{engine="0"} 4.0
"""


# ---- counters


def test_counters_are_read_and_engines_summed() -> None:
    assert parse_counters(METRICS) == DraftCounters(120, 360, 120, (80, 30, 10))


def test_a_server_that_does_not_draft_has_no_counters() -> None:
    assert parse_counters('vllm:num_requests_running{engine="0"} 4.0\n') is None
    assert parse_counters("") is None


def test_counters_since_and_together() -> None:
    before, after = DraftCounters(10, 30, 5, (5,)), DraftCounters(30, 90, 25, (15, 8, 2))
    assert after.since(before) == DraftCounters(20, 60, 20, (10, 8, 2))
    assert after.since(before).plus(before) == after
    assert after.since(DraftCounters()) == after


def test_acceptance_of_counters() -> None:
    found = measurement.acceptance(DraftCounters(40, 120, 30, (20, 8, 2)))
    assert found.tau == 1.75
    assert found.acceptance_by_position == [0.5, 0.2, 0.05]
    nothing = measurement.acceptance(DraftCounters(0, 0, 0, (0, 0)))
    assert nothing.tau is None
    assert nothing.acceptance_by_position == []


# ---- two servers beside each other


def completion(tokens: Sequence[int], first: float, decode: float, at_once: int = 1) -> Completion:
    return Completion(list(tokens), first, decode, at_once)


DRAFTER = Measured(
    [completion([1, 2, 3, 4, 5], 0.1, 0.2), completion([6, 7, 8], 0.3, 0.1)],
    seconds=0.4,
    counters=DraftCounters(4, 8, 3, (2, 1)),
)
PLAIN = Measured(
    [completion([1, 2, 3, 4, 5], 0.2, 0.8), completion([6, 7, 9], 0.2, 0.4)],
    seconds=1.6,
    counters=None,
)


def test_a_level_compares_the_two() -> None:
    [level] = measurement.levels([2], [MeasuredDrafter([DRAFTER], 2)], [PLAIN])
    [drafter] = level.drafters
    assert level.plain is not None
    assert drafter.k == 2
    assert drafter.speed.tokens_per_second == pytest.approx(20.0)
    assert level.plain.tokens_per_second == pytest.approx(5.0)
    assert drafter.speedup == pytest.approx(4.0)
    assert drafter.identical == 1
    assert drafter.speed.first_token.median == pytest.approx(200.0)
    assert drafter.speed.inter_token is not None
    assert drafter.speed.inter_token.mean == pytest.approx(50.0)
    assert drafter.acceptance is not None
    assert drafter.acceptance.tau == 1.75
    assert level.best_k == 2


def test_without_the_other_server_nothing_is_compared() -> None:
    [level] = measurement.levels([2], [MeasuredDrafter([DRAFTER], 2)], None)
    [drafter] = level.drafters
    assert level.plain is None
    assert drafter.speedup is None
    assert drafter.identical is None
    assert level.best_k is None


def at_rates(*rates: float) -> list[Measured]:
    """A server at several concurrencies, at so many tokens per second."""
    counters = DraftCounters(2, 2, 1, (1,))
    return [Measured([completion([1, 2], 0.1, 0.1)], 2 / rate, counters) for rate in rates]


def test_the_best_k_is_the_fastest_that_was_measured_at_each_concurrency() -> None:
    drafters = [
        MeasuredDrafter(at_rates(110, 130, 90, 100), 5),
        MeasuredDrafter(at_rates(120, 90, 80, 100), 1),
        MeasuredDrafter(at_rates(115, 120, 99, 90), 3),
    ]
    plain = at_rates(100, 100, 100, 90)
    found = measurement.levels([1, 4, 16, 64], drafters, plain)
    assert [level.best_k for level in found] == [1, 5, 0, 1]  # fewer tokens where two are equal
    assert [[one.k for one in level.drafters] for level in found] == [[5, 1, 3]] * 4
    drafters[1] = MeasuredDrafter(drafters[1].levels, None)
    assert {level.best_k for level in measurement.levels([1, 4, 16, 64], drafters, plain)} == {None}


def test_acceptance_of_all_concurrencies_together() -> None:
    both = MeasuredDrafter([DRAFTER, *at_rates(10)], 2).acceptance
    assert both is not None
    assert (both.drafts, both.accepted_tokens) == (6, 4)
    assert both.acceptance_by_position == [3 / 6, 1 / 6]
    assert MeasuredDrafter([PLAIN], 2).acceptance is None


def test_one_token_each_has_no_time_between_tokens() -> None:
    one = Measured([completion([1], 0.1, 0.0)], 0.1, DraftCounters(0, 0, 0, ()))
    [level] = measurement.levels([1], [MeasuredDrafter([one], 3)], [one])
    assert level.drafters[0].speed.inter_token is None
    assert level.drafters[0].identical == 1


# ---- the report


def make_report(plain: bool = True) -> BenchReport:
    drafters = [MeasuredDrafter([DRAFTER] * 2, 2), MeasuredDrafter([PLAIN] * 2, 4)]
    return BenchReport(
        command=["speculators", "bench"],
        versions=bench_report.BenchVersions(
            speculators="1.2", vllm="0.32.0", python="3.11", machine="x"
        ),
        draft="draft",
        verifier="some/[verifier]",
        settings=bench_report.BenchSettings(
            prompts="p.jsonl", requests=2, max_new_tokens=5, server_flags=["--enforce-eager"]
        ),
        drafters=[bench_report.Drafter(k=one.k, acceptance=one.acceptance) for one in drafters],
        levels=measurement.levels([4, 1], drafters, [PLAIN] * 2 if plain else None),
    )


@pytest.mark.parametrize("plain", [True, False])
def test_a_report_there_and_back(plain: bool, tmp_path: pathlib.Path) -> None:
    report = make_report(plain)
    report.write(tmp_path / "new")
    assert BenchReport.read(tmp_path / "new") == report
    content = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert content["drafters"][0]["acceptance"]["drafts"] == 8
    assert (content["levels"][0]["plain"] is None) is not plain
    picture = image.imread(io.BytesIO((tmp_path / "new" / "bench.png").read_bytes()))
    assert picture.shape[:2] == (450, 1100)
    assert picture.std() > 0.05


@pytest.mark.parametrize("change", [{"format_version": 1}, {"levels": []}, {"surplus": 1}])
def test_what_is_no_report(change: dict[str, Any], tmp_path: pathlib.Path) -> None:
    content = make_report().model_dump(mode="json")
    (tmp_path / "bench.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(ValueError, match=r"bench\.json"):
        BenchReport.read(tmp_path)


def test_the_table() -> None:
    console = Console(width=80, file=io.StringIO())
    console.print(bench_report.table(make_report()))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "some/[verifier]" in text
    assert "4 plain 5.0 1.00x 200.0 200.00 - -" in rows
    assert "1 K 2 20.0 4.00x 200.0 50.00 1.75 1/2 best" in rows
    assert "1 K 4 5.0 1.00x 200.0 200.00 - 2/2" in rows
    assert text.count("best") == 2
    assert "K 2: accepted up to each position, %: 50 25" in rows
    assert "K 4: accepted up to each position, %: -" in rows
