"""How ``speculators bench`` works without vLLM: its load, its measurements, the command itself."""

import contextlib
import json
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import pytest
from tests.vllm import fake_server
from typer.testing import CliRunner

from speculators.cli.app import app
from speculators.integrations.vllm.bench import measurement, run
from speculators.integrations.vllm.bench.counters import DraftCounters
from speculators.integrations.vllm.bench.load import Load, complete
from speculators.integrations.vllm.bench.report import BenchReport
from speculators.integrations.vllm.serving import command
from speculators.integrations.vllm.serving.checks import ServedDraft
from speculators.integrations.vllm.serving.client import AnswerError, Client
from speculators.integrations.vllm.serving.server import ServerCommand


class Running(fake_server.Fake):
    """A fake server that runs in this process."""

    address: str


@pytest.fixture
def fake() -> Iterator[Running]:
    state = Running()
    with fake_server.running(state) as state.address:
        yield state


def test_a_prompt_is_continued_greedily(fake: Running) -> None:
    answer = complete(Client(fake.address), [1, 2, 4], 6, salt="s")
    assert answer.token_ids == [7, 8, 9, 10, 11, 12]
    assert answer.first_tokens == 1
    assert answer.first_seconds > 0
    assert answer.seconds_per_token == pytest.approx(answer.decode_seconds / 5)
    [request] = fake.requests
    assert request["temperature"] == 0
    assert request["cache_salt"] == "s"


def test_a_continuation_ends_when_it_is_told_to(fake: Running) -> None:
    answers = iter([False, False, True])
    answer = complete(Client(fake.address), [5], 100, salt="", stopped=lambda: next(answers))
    assert answer.token_ids == [5, 6, 7, 8, 9]


def test_so_many_at_a_time_and_in_order(fake: Running) -> None:
    prompts = [[100 + number] for number in range(12)]
    done: list[int] = []
    load = Load(
        Client(fake.address), prompts, 5, concurrency=3, salt="", done=lambda: done.append(1)
    )
    completions, seconds = load.run()
    assert [answer.token_ids[0] for answer in completions] == [100 + n for n in range(12)]
    assert max(request["running"] for request in fake.requests) == 3
    assert len(done) == 12
    assert seconds > 0


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("400", r"refuses \(400\): not now"),
        ("no tokens", "gave no token ids"),
        ("fail", "failed: out of memory"),
    ],
)
def test_a_request_that_fails_ends_the_measurement(fake: Running, fault: str, reason: str) -> None:
    prompts = [[200 + number] for number in range(100)]
    fake.plan = {"201": [fault]}
    with pytest.raises(AnswerError, match=reason):
        Load(Client(fake.address), prompts, 5, concurrency=2, salt="").run()
    time.sleep(0.2)
    asked = len(fake.requests)
    time.sleep(0.3)
    assert len(fake.requests) == asked < 100


class Told:
    """A ``Progress`` that keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def start(self, total: int, description: str) -> None:
        """Keeps both."""
        self.said.append((total, description))

    def advance(self, count: int) -> None:
        """Keeps it."""
        self.said.append(count)

    def message(self, text: str) -> None:
        """Keeps it."""
        self.said.append(text)


def test_each_level_reads_its_prompts_anew_and_has_its_own_counters(fake: Running) -> None:
    told = Told()
    prompts = [[100 + number] for number in range(4)]
    results = measurement.measure(
        Client(fake.address), prompts, 6, [1, 4], progress=told, name="with the draft"
    )
    assert told.said[0] == (4, "with the draft, 1 at a time")
    assert told.said.count(1) == 8
    # One request and four to warm up, then four for each level.
    salts = [request["cache_salt"] for request in fake.requests]
    assert len(salts) == 13
    assert len(set(salts[5:9])) == len(set(salts[9:])) == 1
    assert len({salts[0], salts[1], salts[5], salts[9]}) == 4
    assert [one.counters for one in results] == [DraftCounters(40, 80, 36, (24, 12))] * 2
    total = measurement.MeasuredDrafter(results, 2).acceptance
    assert total is not None
    assert (total.drafts, total.tau) == (80, 1.9)


# ---- the command, against servers that run


def served(directory: pathlib.Path, k: int | None) -> ServedDraft:
    return ServedDraft(directory, "eagle", "eagle", "some/verifier", k or 2)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> pathlib.Path:
    """A draft that fits, without one; its prompts are those of the file."""
    monkeypatch.setattr(
        "speculators.integrations.vllm.serving.checks.check_draft",
        lambda *_, num_draft_tokens, **__: served(tmp_path, num_draft_tokens),
    )
    monkeypatch.setattr(run, "AutoTokenizer", _NoTokenizer)
    rows = [json.dumps({"input_ids": [100 + number]}) for number in range(6)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    return tmp_path


class _NoTokenizer:
    @staticmethod
    def from_pretrained(name: str, **options: Any) -> None:
        assert name == "some/verifier"
        assert options == {"trust_remote_code": False, "revision": None}


def invoke(folder: pathlib.Path, *words: str) -> Any:
    prompts = f"--prompts={folder / 'prompts.jsonl'}"
    return CliRunner().invoke(app, ["bench", str(folder), prompts, "--concurrency=1,3", *words])


def test_running_servers_are_measured(fake: Running, checked: pathlib.Path) -> None:
    result = invoke(
        checked,
        f"--endpoint={fake.address}",
        f"--baseline-endpoint={fake.address}/v1",
        "--max-new-tokens=8",
        f"--output-dir={checked / 'out'}",
    )
    assert result.exit_code == 0, result.output
    assert str(checked / "out" / "bench.json") in result.stdout
    report = BenchReport.read(checked / "out")
    assert [level.concurrency for level in report.levels] == [1, 3]
    assert [level.drafters[0].identical for level in report.levels] == [6, 6]
    assert {level.best_k for level in report.levels} <= {0, 2}
    assert report.versions.vllm == "9.9"
    [drafter] = report.drafters
    assert drafter.k == 2  # as many positions as the server counts
    assert drafter.acceptance is not None
    assert drafter.acceptance.acceptance_by_position == [0.6, 0.3]
    assert (checked / "out" / "bench.png").is_file()


def test_one_running_server_is_not_compared(fake: Running, checked: pathlib.Path) -> None:
    result = invoke(checked, f"--endpoint={fake.address}", "--limit=4", "--max-new-tokens=4")
    assert result.exit_code == 0, result.output
    report = BenchReport.read(checked)
    assert report.settings.requests == 4
    assert report.levels[0].plain is None
    assert report.levels[0].best_k is None


def test_a_running_server_that_does_not_draft_is_of_no_k(
    fake: Running, checked: pathlib.Path
) -> None:
    fake.drafts = False
    words = [f"--endpoint={fake.address}", f"--baseline-endpoint={fake.address}"]
    result = invoke(checked, *words, "--max-new-tokens=4")
    assert result.exit_code == 0, result.output
    report = BenchReport.read(checked)
    assert (report.drafters[0].k, report.drafters[0].acceptance) == (None, None)
    assert report.levels[0].best_k is None


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--concurrency=1,x"], "--concurrency is '1,x'"),
        (["--concurrency=0"], "--concurrency is '0'"),
        (["--concurrency=2,2"], "--concurrency is '2,2'"),
        (["--concurrency=1,65"], "--limit for 64 prompts"),
        (["--k=1,0"], "--k is '1,0'; expected different numbers from 1 up, such as 1,3,5"),
        (["--max-new-tokens=1"], "--max-new-tokens is 1"),
        (["--baseline-endpoint=http://h:1"], "--baseline-endpoint is there alone"),
        (["--endpoint=http://h:1", "--enforce-eager"], "--enforce-eager: a server that runs has"),
        (["--endpoint=http://h:1", "--k=3"], "--k: a server that runs has"),
        (["--port", "80"], "--port: the servers listen on 127.0.0.1"),
        (["--speculative-config={}"], "is not for vLLM here"),
    ],
)
def test_commands_that_mean_nothing(checked: pathlib.Path, words: list[str], reason: str) -> None:
    result = invoke(checked, *words)
    assert result.exit_code == 2, result.output
    assert reason in result.stderr
    assert result.stderr.count("\n") == 1


def test_there_must_be_prompts(checked: pathlib.Path, fake: Running) -> None:
    result = CliRunner().invoke(app, ["bench", str(checked)])
    assert (result.exit_code, "give a file with --prompts" in result.stderr) == (2, True)
    result = invoke(checked, f"--endpoint={fake.address}", "--concurrency=7")
    assert (result.exit_code, "has 6 prompts; expected at least 7" in result.stderr) == (1, True)


def test_ctrl_c_is_one_line(
    checked: pathlib.Path, fake: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "measure", interrupted)
    result = invoke(checked, f"--endpoint={fake.address}")
    assert result.exit_code == 1
    assert result.stderr == "error: interrupted; the servers that it started are stopped\n"


@pytest.mark.parametrize(("flags", "ks"), [([], [2]), (["--k=5"], [5]), (["--k=1,4,3"], [1, 4, 3])])
def test_all_servers_are_started_one_after_the_other(
    flags: list[str],
    ks: list[int],
    checked: pathlib.Path,
    fake: Running,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[Any] = []

    @contextlib.contextmanager
    def running_server(command: ServerCommand, log: pathlib.Path, *, timeout: float) -> Any:
        events.append((command.words[4:], log.name, timeout))
        yield fake.address
        events.append("stopped")

    monkeypatch.setattr(run, "running_server", running_server)
    monkeypatch.setattr(command, "check_vllm", lambda _: ["another vLLM"])
    result = invoke(checked, "--start-timeout=7", "--max-new-tokens=4", "--enforce-eager", *flags)
    assert result.exit_code == 0, result.output
    assert "warning: another vLLM\n" in result.stderr
    assert events[1::2] == ["stopped"] * (1 + len(ks))
    plain, *drafters = events[::2]
    assert plain == (("serve", "some/verifier", "--enforce-eager"), "bench-plain.log", 7.0)
    for (words, log, _), k in zip(drafters, ks, strict=True):
        assert words[2] == "--speculative-config"
        assert json.loads(words[3])["num_speculative_tokens"] == k
        assert words[4:] == ("--enforce-eager",)
        assert log == f"bench-k{k}.log"
    report = BenchReport.read(checked)
    assert [drafter.k for drafter in report.drafters] == ks
    for level in report.levels:
        assert level.plain is not None
        assert [drafter.k for drafter in level.drafters] == ks
        rates = {one.k: one.speed.tokens_per_second for one in level.drafters}
        rates[0] = level.plain.tokens_per_second
        assert rates[level.best_k] == max(rates.values())
