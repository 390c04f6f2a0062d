"""From prompts to a served draft, as a user goes: commands, files, HTTP; nothing is a stand-in.

The verifier, in a vLLM server, answers prompts and gives its hidden states; EAGLE-3 and HASS learn
these few texts nearly by heart; ``evaluate`` measures both; ``bench`` serves one, with and without
it, and ``serve`` the other. Then the server must say what it says without a draft, and its counters
what ``evaluate`` has counted.

All is in float32, so that both sides take the same decisions. The two drafts learn from one store:
the streams that HASS reads are among those of EAGLE-3.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest
import torch

from speculators.cli.app import app
from speculators.cli.job import Folders, Job
from speculators.cli.progress import ConsoleProgress
from speculators.cli.recipe import read_recipe
from speculators.data.store import HiddenStateStore
from speculators.decoding import GenerationSettings, generate
from speculators.evaluation.prompts import read_prompts
from speculators.evaluation.report import EvaluationReport
from speculators.integrations.vllm.bench.report import BenchReport
from speculators.models.verifier import Verifier

TINY = pathlib.Path("examples/tiny_verifier").absolute()
ALGORITHMS = ("eagle3", "hass")
PROMPTS = 24
NEW_TOKENS = 24
K = 3
# Of the first, second, third drafted token, accepted. Chance is 1/4096, the commonest token 0.1.
FLOORS = [0.3, 0.05, 0.02]
# Where a draft's two best logits are closer than float32 rounds, vLLM may draft another token. As
# in the contract of `evaluate --against-vllm`: at most in one verification of a hundred.
SHARE = 0.01
RECIPE = f"""
verifier: {{path: {TINY}/model, dtype: float32}}
data: prompts.jsonl
generate:
  source: vllm
  regenerate: true
  max_new_tokens: {NEW_TOKENS}
  vllm: {{max_requests: 8, flags: [--enforce-eager]}}
draft: {{speculative_tokens: {K}}}
objective: {{steps: {K}}}
training:
  epochs: 100  # max_steps ends the run
  max_steps: 80
  row_tokens: 256
  rows_per_batch: 2
  optimizer: {{name: muon, learning_rate: 4.0e-3}}
  validation: {{documents: 0}}
  tracker: {{name: none}}
"""
SERVER = ["--dtype=float32", "--enforce-eager", "--max-model-len=512", "--max-num-seqs=8"]
PATIENCE = 600  # seconds for a command, and for a server to start
COUNTER = re.compile(r"^vllm:spec_decode_num_(\w+?)_total\{(.*)\} (\S+)$", re.MULTILINE)


# ---- processes


@pytest.fixture(autouse=True, scope="module")
def ended_in_order() -> Iterator[None]:
    """A test that is told to end, as when its time is up, stops what it has started."""

    def leave(number: int, frame: FrameType | None) -> None:
        del frame
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    yield
    signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def running(
    words: list[str], log: pathlib.Path, **changes: str
) -> Iterator["subprocess.Popen[bytes]"]:
    """A process with all that it starts, stopped at the end; after a failure its log is shown."""
    path = os.pathsep.join(filter(None, sys.path))
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", *words],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": path, **changes},
            start_new_session=True,
        )
    try:
        yield process
    except BaseException:
        print(f"---- {' '.join(words)}\n{log.read_text(errors='replace')}")
        raise
    finally:
        process.terminate()  # `generate` stops its server then
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def speculators(*words: str | pathlib.Path, log: pathlib.Path) -> None:
    """Runs a command to its end."""
    with running(["speculators", *map(str, words)], log) as process:
        assert process.wait(PATIENCE) == 0


@contextlib.contextmanager
def serving(words: list[str], log: pathlib.Path, **changes: str) -> Iterator[str]:
    """A server, once it answers; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"127.0.0.1:{port}"
    with running([*words, "--host=127.0.0.1", f"--port={port}"], log, **changes) as process:
        end = time.monotonic() + PATIENCE
        while not _is_healthy(address):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.5)
        yield address


def _is_healthy(address: str) -> bool:
    try:
        ask(address, "/health")
    except OSError:  # as are urllib's errors
        return False
    return True


def ask(address: str, path: str, body: Any = None) -> str:
    """What a server answers."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://{address}{path}", data, headers)
    try:
        with direct.open(request, timeout=PATIENCE) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{path}: {error.read().decode()}") from error


def completions(address: str, prompts: list[list[int]]) -> list[list[int]]:
    """The greedy continuation of each prompt, all asked for at once."""
    model = json.loads(ask(address, "/v1/models"))["data"][0]["id"]
    body = {
        "model": model,
        "prompt": prompts,
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "return_token_ids": True,
    }
    choices = json.loads(ask(address, "/v1/completions", body))["choices"]
    assert sorted(choice["index"] for choice in choices) == list(range(len(prompts)))
    return [choice["token_ids"] for choice in sorted(choices, key=lambda one: one["index"])]


@dataclasses.dataclass(frozen=True)
class Counters:
    """What a server, or ``evaluate``, has counted."""

    drafts: int
    draft_tokens: int
    accepted_tokens: int
    accepted_by_position: list[int]

    @classmethod
    def read(cls, address: str) -> "Counters":
        """A server's."""
        positions = [0] * K
        sums = {}
        for name, labels, value in COUNTER.findall(ask(address, "/metrics")):
            position = re.search(r'position="(\d+)"', labels)
            if position is None:
                sums[name] = int(float(value))
            else:
                assert name == "accepted_tokens_per_pos"
                positions[int(position[1])] = int(float(value))
        return cls(sums["drafts"], sums["draft_tokens"], sums["accepted_tokens"], positions)


# ---- what is made once


@dataclasses.dataclass(frozen=True)
class Work:
    """The drafts, in folders by their names, and all that they were made from."""

    root: pathlib.Path
    prompts: list[list[int]]
    plain: list[list[int]]
    report: EvaluationReport

    def counted(self, draft: str) -> "Counters":
        """What ``evaluate`` has counted."""
        found = self.report.drafters[draft].acceptance
        return Counters(
            found.drafts,
            sum(found.drafted_by_position),
            sum(found.accepted_by_position),
            found.accepted_by_position,
        )


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """Prepares, generates, trains and evaluates."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("work")
    file, recipe = root / "prompts.jsonl", root / "recipe.yaml"
    lines = (TINY / "prompts_eval.jsonl").read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:PROMPTS]))
    recipe.write_text(RECIPE)
    data = root / "data"
    words = ["train", "--algo=eagle3", f"--output-dir={root / 'eagle3'}", "--skip-evaluation"]
    words += [f"--recipe={recipe}", f"--data-dir={data}"]
    speculators(*words, log=root / "eagle3.log")
    made = (data / "hidden_states/index.json").stat().st_mtime_ns
    hass = read_recipe(recipe, {"algorithm": "hass"})
    job = Job(hass, Folders(root / "hass", data), ConsoleProgress())
    job.prepare()
    job.generate()  # it reads fewer streams, so nothing is left to do
    job.train()
    assert (data / "hidden_states/index.json").stat().st_mtime_ns == made
    speculators(
        "evaluate",
        *(root / name for name in ALGORITHMS),
        f"--prompts={file}",
        "--dtype=float32",
        f"--evaluate.max-new-tokens={NEW_TOKENS}",
        f"--evaluate.batch-size={PROMPTS}",
        f"--output-dir={root / 'report'}",
        log=root / "evaluate.log",
    )
    verifier = Verifier.from_pretrained(TINY / "model", dtype=torch.float32)
    prompts = [prompt.ids.tolist() for prompt in read_prompts(file, verifier.tokenizer)]
    plain = generate(verifier, None, prompts, GenerationSettings(NEW_TOKENS)).sequences
    report = EvaluationReport.read(root / "report/report.json")
    return Work(root, prompts, plain, report)


# ---- the tests


def test_the_drafts_learned_from_the_verifiers_own_answers(work: Work) -> None:
    store = HiddenStateStore.open(work.root / "data/hidden_states")
    found = [store[number].input_ids.tolist() for number in range(len(store))]
    expected = [[*prompt, *new] for prompt, new in zip(work.prompts, work.plain, strict=True)]
    assert sorted(found) == sorted(expected)


def test_the_evaluation_finds_drafts_that_have_learned(work: Work) -> None:
    report = work.report
    assert report.verifier_dtype == "float32"
    assert report.prompts == PROMPTS
    assert list(report.drafters) == list(ALGORITHMS)
    for name, result in report.drafters.items():
        assert result.kind == name
        assert result.comparison is not None
        assert result.comparison.identical
        rates = result.acceptance.acceptance_by_position
        assert all(rate >= floor for rate, floor in zip(rates, FLOORS, strict=True)), rates


def test_a_served_draft_changes_no_token_and_is_accepted_as_evaluated(work: Work) -> None:
    words = ["speculators", "serve", str(work.root / "hass"), *SERVER]
    words.append("--per-request-spec-decode-metrics=detailed")
    # The plugin must reach each of vLLM's processes: so many as users have.
    changes = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with serving(words, work.root / "serve.log", **changes) as address:
        assert Counters.read(address) == Counters(0, 0, 0, [0] * K)
        tokens = completions(address, work.prompts)
        found = Counters.read(address)
        assert tokens == work.plain
        check_same(found, work.counted("hass"))
        assert found.accepted_by_position[0] >= FLOORS[0] * found.drafts
        # The prompt's own pass gives the first token of a text, without a draft. What a
        # verification accepts behind a text's end is counted, but not said.
        said = sum(map(len, tokens)) - PROMPTS
        assert 0 <= found.drafts + found.accepted_tokens - said <= K * PROMPTS
        # And step by step.
        status = app(
            [
                *["evaluate", str(work.root / "hass"), f"--prompts={work.root / 'prompts.jsonl'}"],
                *["--dtype=float32", f"--evaluate.max-new-tokens={NEW_TOKENS}"],
                *["--against-vllm", f"--endpoint=http://{address}"],
                f"--output-dir={work.root / 'contract'}",
            ],
            standalone_mode=False,
        )
        assert not status


def test_a_bench_finds_the_same(work: Work) -> None:
    speculators(
        "bench",
        work.root / "eagle3",
        f"--prompts={work.root / 'prompts.jsonl'}",
        "--concurrency=4,24",
        f"--max-new-tokens={NEW_TOKENS}",
        f"--output-dir={work.root / 'bench'}",
        *SERVER,
        log=work.root / "bench.log",
    )
    report = BenchReport.read(work.root / "bench")
    assert report.versions.vllm is not None
    assert (work.root / "bench/bench.png").is_file()
    assert not list((work.root / "bench").glob("*.log"))
    assert [level.concurrency for level in report.levels] == [4, 24]
    [whole] = report.drafters
    assert whole.k == K
    for level in report.levels:
        [drafted] = level.drafters
        assert level.plain is not None
        assert level.best_k in {0, K}
        assert drafted.identical == drafted.speed.requests == level.plain.requests == PROMPTS
        assert drafted.speed.tokens == level.plain.tokens == sum(map(len, work.plain))
        assert drafted.speed.first_token.median > 0
        assert drafted.acceptance is not None
        rates = drafted.acceptance.acceptance_by_position
        found = Counters(
            drafted.acceptance.drafts,
            drafted.acceptance.draft_tokens,
            drafted.acceptance.accepted_tokens,
            [round(rate * drafted.acceptance.drafts) for rate in rates],
        )
        check_same(found, work.counted("eagle3"))


def check_same(found: Counters, expected: Counters) -> None:
    """Whether a server has counted what ``evaluate`` has."""
    assert found.draft_tokens == K * found.drafts
    assert found.accepted_tokens == sum(found.accepted_by_position)
    slack = SHARE * expected.drafts
    assert abs(found.drafts - expected.drafts) <= slack, (found, expected)
    assert abs(found.draft_tokens - expected.draft_tokens) <= K * slack, (found, expected)
    assert abs(found.accepted_tokens - expected.accepted_tokens) <= K * slack, (found, expected)
    pairs = zip(found.accepted_by_position, expected.accepted_by_position, strict=True)
    assert all(abs(one - other) <= slack for one, other in pairs), (found, expected)
