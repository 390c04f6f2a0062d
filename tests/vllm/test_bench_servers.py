"""How ``speculators bench`` works without vLLM: its client, its servers, the command itself."""

import collections
import contextlib
import dataclasses
import http.server
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from typer.testing import CliRunner

from speculators.cli.app import app
from speculators.integrations.vllm import bench, bench_run, serve, server
from speculators.integrations.vllm.bench_client import (
    BenchError,
    DraftCounters,
    Load,
    Server,
)
from speculators.integrations.vllm.bench_report import BenchReport
from speculators.integrations.vllm.serve_checks import ServedDraft
from speculators.integrations.vllm.server import ServerCommand

# ---- a server that is none of vLLM's


@dataclasses.dataclass
class State:
    """What the server below has seen."""

    running: int = 0
    most: int = 0
    requests: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    headers: list[dict[str, str]] = dataclasses.field(default_factory=list)


class Handler(http.server.BaseHTTPRequestHandler):
    """Continues with the prompt's sum and what follows it, two tokens at a time, as vLLM does."""

    protocol_version = "HTTP/1.1"
    state: ClassVar[State]
    lock: ClassVar[Any] = threading.Lock()
    drafts: ClassVar[bool] = True

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:  # noqa: D102 - http.server's
        requests = len(self.state.requests)
        metrics = (
            f"vllm:spec_decode_num_drafts_total {10 * requests}\n"
            f"vllm:spec_decode_num_draft_tokens_total {20 * requests}\n"
            f"vllm:spec_decode_num_accepted_tokens_total {9 * requests}\n"
            f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{position="0"}} {6 * requests}\n'
            f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{position="1"}} {3 * requests}\n'
        )
        answers = {
            "/v1/models": '{"data": [{"id": "the model"}]}',
            "/version": '{"version": "9.9"}',
            "/metrics": metrics if self.drafts else "",
        }
        self._send(200, answers[self.path])

    def do_POST(self) -> None:  # noqa: D102 - http.server's
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        state = self.state
        with self.lock:
            state.requests.append(body)
            state.headers.append(dict(self.headers))
            state.running += 1
            state.most = max(state.most, state.running)
        start = sum(body["prompt"])
        if start == 13:
            self._send(400, '{"error": {"message": "an unlucky\\nprompt"}}')
        elif start == 26:
            self._stream(['{"choices": []}'])
        elif start == 39:
            self._stream(['{"error": {"message": "out of memory"}}'])
        else:
            tokens = list(range(start, start + body["max_tokens"]))
            pairs = [tokens[:1], *(tokens[i : i + 2] for i in range(1, len(tokens), 2))]
            self._stream([json.dumps({"choices": [{"token_ids": pair}]}) for pair in pairs])

    def _send(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def _stream(self, events: list[str]) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in [*events, "[DONE]"]:
            line = f"data: {event}\n\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
            self.wfile.flush()
            time.sleep(0.005)
        with self.lock:  # before the client knows, who asks for the next at once
            self.state.running -= 1
        self.wfile.write(b"0\r\n\r\n")


Fake = collections.namedtuple("Fake", ["address", "state"])  # noqa: PYI024 - for one fixture


@pytest.fixture
def fake() -> Iterator[Fake]:
    state = State()
    handler = type("Handler", (Handler,), {"state": state})
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield Fake(f"http://127.0.0.1:{httpd.server_port}", state)
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.parametrize("suffix", ["", "/", "/v1"])
def test_a_prompt_is_continued_greedily(
    fake: Fake, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "key")
    found = Server(fake.address + suffix)
    assert (found.model, found.version) == ("the model", "9.9")
    answer = found.complete([1, 2, 4], 6, salt="s")
    assert answer.token_ids == [7, 8, 9, 10, 11, 12]
    assert answer.first_tokens == 1
    assert answer.first_seconds > 0
    assert answer.seconds_per_token == pytest.approx(answer.decode_seconds / 5)
    [request] = fake.state.requests
    assert request["temperature"] == 0
    assert request["cache_salt"] == "s"
    assert fake.state.headers[0]["Authorization"] == "Bearer key"


def test_so_many_at_a_time_and_in_order(fake: Fake) -> None:
    prompts = [[100 + number] for number in range(12)]
    done: list[int] = []
    load = Load(
        Server(fake.address), prompts, 5, concurrency=3, salt="", done=lambda: done.append(1)
    )
    completions, seconds = load.run()
    assert [answer.token_ids[0] for answer in completions] == [100 + n for n in range(12)]
    assert fake.state.most == 3
    assert len(done) == 12
    assert seconds > 0


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ([13], r"refuses \(400\): an unlucky prompt"),
        ([26], "gave no token ids"),
        ([39], "the server failed: out of memory"),
    ],
)
def test_a_request_that_fails_ends_the_measurement(
    fake: Fake, prompt: list[int], reason: str
) -> None:
    prompts = [[200 + number] for number in range(100)]
    prompts[1] = prompt
    with pytest.raises(BenchError, match=reason):
        Load(Server(fake.address), prompts, 5, concurrency=2, salt="").run()
    time.sleep(0.2)
    asked = len(fake.state.requests)
    time.sleep(0.3)
    assert len(fake.state.requests) == asked < 100


def test_nobody_answers() -> None:
    with pytest.raises(BenchError, match="does not answer"):
        Server(f"http://127.0.0.1:{server.free_port()}")
    with pytest.raises(BenchError, match="is no server's address"):
        Server("localhost:8000")


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


def test_each_level_reads_its_prompts_anew_and_has_its_own_counters(fake: Fake) -> None:
    told = Told()
    prompts = [[100 + number] for number in range(4)]
    results = bench.measure(
        Server(fake.address), prompts, 6, [1, 4], progress=told, name="with the draft"
    )
    assert told.said[0] == (4, "with the draft, 1 at a time")
    assert told.said.count(1) == 8
    # One request and four to warm up, then four for each level.
    salts = [request["cache_salt"] for request in fake.state.requests]
    assert len(salts) == 13
    assert len(set(salts[5:9])) == len(set(salts[9:])) == 1
    assert len({salts[0], salts[1], salts[5], salts[9]}) == 4
    assert [one.counters for one in results] == [DraftCounters(40, 80, 36, (24, 12))] * 2
    total = bench.total_acceptance(results)
    assert total is not None
    assert (total.drafts, total.tau) == (80, 1.9)


# ---- the command, against servers that run


def served(directory: pathlib.Path) -> ServedDraft:
    return ServedDraft(directory, "eagle", "eagle", "some/verifier", 2)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> pathlib.Path:
    """A draft that fits, without one; its prompts are those of the file."""
    monkeypatch.setattr(
        "speculators.integrations.vllm.serve_checks.check_draft", lambda *_, **__: served(tmp_path)
    )
    monkeypatch.setattr(bench_run, "AutoTokenizer", _NoTokenizer)
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


def test_running_servers_are_measured(fake: Fake, checked: pathlib.Path) -> None:
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
    assert [level.identical for level in report.levels] == [6, 6]
    assert report.settings.k == 2  # as many positions as the server counts
    assert report.versions.vllm == "9.9"
    assert report.acceptance is not None
    assert report.acceptance.acceptance_by_position == [0.6, 0.3]
    assert (checked / "out" / "bench.png").is_file()


def test_one_running_server_is_not_compared(fake: Fake, checked: pathlib.Path) -> None:
    result = invoke(checked, f"--endpoint={fake.address}", "--limit=4", "--max-new-tokens=4")
    assert result.exit_code == 0, result.output
    report = BenchReport.read(checked)
    assert report.settings.requests == 4
    assert report.levels[0].plain is None


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--concurrency=1,x"], "--concurrency is '1,x'"),
        (["--concurrency=0"], "--concurrency is '0'"),
        (["--concurrency=2,2"], "--concurrency is '2,2'"),
        (["--concurrency=1,65"], "--limit for 64 prompts"),
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


def test_there_must_be_prompts(checked: pathlib.Path, fake: Fake) -> None:
    result = CliRunner().invoke(app, ["bench", str(checked)])
    assert (result.exit_code, "give a file with --prompts" in result.stderr) == (2, True)
    result = invoke(checked, f"--endpoint={fake.address}", "--concurrency=7")
    assert (result.exit_code, "has 6 prompts; expected at least 7" in result.stderr) == (1, True)


# ---- servers of our own

PROGRAM = """
import http.server, os, subprocess, sys, time
port = int(sys.argv[sys.argv.index("--port") + 1])
mode = sys.argv[1]
print("started with", sys.argv[2], flush=True)
if mode == "fails":
    raise SystemExit("no memory left")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
with open(sys.argv[2], "w") as file:
    file.write(str(child.pid))
begin = time.monotonic()
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def do_GET(self):
        healthy = mode == "serves" and time.monotonic() > begin + 0.3
        self.send_response(200 if healthy else 503)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def command(mode: str, note: pathlib.Path) -> ServerCommand:
    return ServerCommand((sys.executable, "-c", PROGRAM, mode, str(note)))


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody waits for does not."""
    try:
        status = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def ends(pid: int) -> bool:
    for _ in range(100):
        if not alive(pid):
            return True
        time.sleep(0.05)
    return False


def test_a_server_runs_and_is_stopped_with_its_children(tmp_path: pathlib.Path) -> None:
    log, note = tmp_path / "logs" / "server.log", tmp_path / "child"
    with server.running_server(command("serves", note), log, timeout=30) as address:
        assert address.startswith("http://127.0.0.1:")
        assert log.is_file()
        child = int(note.read_text())
        assert alive(child)
    assert ends(child)
    assert not log.exists()


def test_a_server_that_fails_leaves_its_log(tmp_path: pathlib.Path) -> None:
    log = tmp_path / "server.log"
    with pytest.raises(server.ServerError, match=r"status 1(?s:.*)no memory left") as caught:
        with server.running_server(command("fails", tmp_path / "x"), log, timeout=30):
            pass
    assert str(log) in str(caught.value)
    assert "no memory left" in log.read_text()


def test_a_server_that_does_not_answer_in_time_is_stopped(tmp_path: pathlib.Path) -> None:
    log, note = tmp_path / "server.log", tmp_path / "child"
    with pytest.raises(server.ServerError, match="did not answer within 2 s"):
        with server.running_server(command("hangs", note), log, timeout=2):
            pass
    assert log.is_file()
    assert ends(int(note.read_text()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_the_servers(number: int, tmp_path: pathlib.Path) -> None:
    note = tmp_path / "child"
    program = textwrap.dedent(f"""
        import pathlib, sys, time
        from speculators.integrations.vllm.server import ServerCommand, running_server
        command = ServerCommand((sys.executable, "-c", {PROGRAM!r}, "serves", {str(note)!r}))
        with running_server(command, pathlib.Path({str(tmp_path / "log")!r}), timeout=30):
            print("running", flush=True)
            time.sleep(60)
    """)
    path = os.pathsep.join(sys.path)
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode in {128 + number, -number, 1}, errors
    assert ends(int(note.read_text()))


def test_ctrl_c_is_one_line(
    checked: pathlib.Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_run, "measure", interrupted)
    result = invoke(checked, f"--endpoint={fake.address}")
    assert result.exit_code == 1
    assert result.stderr == "error: interrupted; the servers that it started are stopped\n"


def test_both_servers_are_started_one_after_the_other(
    checked: pathlib.Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Any] = []

    @contextlib.contextmanager
    def running_server(command: ServerCommand, log: pathlib.Path, *, timeout: float) -> Any:
        events.append((command.words[4:], log.name, timeout))
        yield fake.address
        events.append("stopped")

    monkeypatch.setattr(bench_run, "running_server", running_server)
    monkeypatch.setattr(serve, "check_vllm", lambda _: ["another vLLM"])
    result = invoke(checked, "--start-timeout=7", "--max-new-tokens=4", "--enforce-eager")
    assert result.exit_code == 0, result.output
    assert "warning: another vLLM\n" in result.stderr
    plain, stopped, drafter, stopped_too = events
    assert stopped == stopped_too == "stopped"
    assert plain == (("serve", "some/verifier", "--enforce-eager"), "bench-plain.log", 7.0)
    words, log, _ = drafter
    assert words[2] == "--speculative-config"
    assert json.loads(words[3])["num_speculative_tokens"] == 2
    assert words[4:] == ("--enforce-eager",)
    assert log == "bench-with-the-draft.log"
