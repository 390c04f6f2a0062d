"""What ``speculators bench`` computes: counters, acceptance, the best K, the report."""

import io
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import pytest
from matplotlib import image
from rich.console import Console

from speculators.integrations.vllm import bench, bench_report
from speculators.integrations.vllm.bench_client import (
    Completion,
    DraftCounters,
    parse_counters,
)
from speculators.integrations.vllm.bench_model import recommend
from speculators.integrations.vllm.bench_report import BenchReport

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
    found = bench.acceptance(DraftCounters(40, 120, 30, (20, 8, 2)))
    assert found.tau == 1.75
    assert found.acceptance_by_position == [0.5, 0.2, 0.05]
    nothing = bench.acceptance(DraftCounters(0, 0, 0, (0, 0)))
    assert nothing.tau is None
    assert nothing.acceptance_by_position == []


# ---- how many tokens to draft


def test_the_model_has_what_was_measured_at_its_ends() -> None:
    length = recommend(100.0, 125.0, [0.8, 0.5, 0.2])
    assert len(length.tokens_per_second) == 4
    assert length.tokens_per_second[0] == pytest.approx(100.0)
    assert length.tokens_per_second[-1] == pytest.approx(125.0)


@pytest.mark.parametrize(
    ("draft_seconds", "shares", "best"),
    [
        (0.0, [0.9, 0.1, 0.01], 3),  # drafting for nothing: as many as there are
        (0.1, [0.9, 0.7, 0.05], 2),  # the third token costs more than it brings
        (0.5, [0.9, 0.2, 0.1], 1),
        (2.0, [0.9, 0.8, 0.7], 0),  # a draft that is slower than its verifier
        (0.1, [0.0, 0.0, 0.0], 0),
    ],
)
def test_the_recommended_number_of_tokens(
    draft_seconds: float, shares: list[float], best: int
) -> None:
    step = 1.0 + 3 * draft_seconds
    tokens = [1 + sum(shares[:k]) for k in range(4)]
    rates = [tokens[k] / (1 + k * draft_seconds) for k in range(4)]
    length = recommend(1.0, tokens[3] / step, shares)
    assert length.tokens_per_second == pytest.approx(rates)
    assert length.recommended == best == max(range(4), key=rates.__getitem__)


@pytest.mark.parametrize("arguments", [(0.0, 1.0, [0.5]), (1.0, -1.0, [0.5]), (1.0, 1.0, [])])
def test_a_model_of_nothing(arguments: Any) -> None:
    with pytest.raises(ValueError, match="expected rates above 0"):
        recommend(*arguments)


# ---- two servers beside each other


def completion(tokens: Sequence[int], first: float, decode: float, at_once: int = 1) -> Completion:
    return Completion(list(tokens), first, decode, at_once)


DRAFTER = bench.Measured(
    [completion([1, 2, 3, 4, 5], 0.1, 0.2), completion([6, 7, 8], 0.3, 0.1)],
    seconds=0.4,
    counters=DraftCounters(4, 8, 3, (2, 1)),
)
PLAIN = bench.Measured(
    [completion([1, 2, 3, 4, 5], 0.2, 0.8), completion([6, 7, 9], 0.2, 0.4)],
    seconds=1.6,
    counters=None,
)


def test_a_level_compares_the_two() -> None:
    [level] = bench.levels([2], [DRAFTER], [PLAIN])
    assert level.plain is not None
    assert level.drafter.tokens_per_second == pytest.approx(20.0)
    assert level.plain.tokens_per_second == pytest.approx(5.0)
    assert level.speedup == pytest.approx(4.0)
    assert level.identical == 1
    assert level.drafter.first_token.median == pytest.approx(200.0)
    assert level.drafter.inter_token is not None
    assert level.drafter.inter_token.mean == pytest.approx(50.0)
    assert level.acceptance is not None
    assert level.acceptance.tau == 1.75
    assert level.expected_tokens_per_second[0] == pytest.approx(5.0)
    assert level.expected_tokens_per_second[-1] == pytest.approx(20.0)
    assert level.recommended_k == 2


def test_without_the_other_server_nothing_is_compared() -> None:
    [level] = bench.levels([2], [DRAFTER], None)
    assert level.plain is None
    assert level.speedup is None
    assert level.identical is None
    assert level.recommended_k is None
    assert level.expected_tokens_per_second == []


def test_one_token_each_has_no_time_between_tokens() -> None:
    one = bench.Measured([completion([1], 0.1, 0.0)], 0.1, DraftCounters(0, 0, 0, ()))
    [level] = bench.levels([1], [one], [one])
    assert level.drafter.inter_token is None
    assert level.recommended_k is None
    assert level.identical == 1


# ---- the report


def make_report(plain: bool = True) -> BenchReport:
    found = bench.levels([4, 1], [DRAFTER] * 2, [PLAIN] * 2 if plain else None)
    return BenchReport(
        command=["speculators", "bench"],
        versions=bench_report.BenchVersions(
            speculators="1.2", vllm="0.32.0", python="3.11", machine="x"
        ),
        draft="draft",
        verifier="some/[verifier]",
        settings=bench_report.BenchSettings(
            k=2, prompts="p.jsonl", requests=2, max_new_tokens=5, server_flags=["--enforce-eager"]
        ),
        levels=found,
        acceptance=bench.total_acceptance([DRAFTER] * 2),
    )


@pytest.mark.parametrize("plain", [True, False])
def test_a_report_there_and_back(plain: bool, tmp_path: pathlib.Path) -> None:
    report = make_report(plain)
    report.write(tmp_path / "new")
    assert BenchReport.read(tmp_path / "new") == report
    content = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert content["acceptance"]["drafts"] == 8
    assert (content["levels"][0]["plain"] is None) is not plain
    picture = image.imread(io.BytesIO((tmp_path / "new" / "bench.png").read_bytes()))
    assert picture.shape[:2] == (450, 1100)
    assert picture.std() > 0.05


@pytest.mark.parametrize("change", [{"format_version": 2}, {"levels": []}, {"surplus": 1}])
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
    assert "4 plain 5.0 1.00x 200.0 200.00 - - -" in rows
    assert "1 draft 20.0 4.00x 200.0 50.00 1.75 1/2 2" in rows
    assert "accepted up to each position, %: 50 25" in rows
