"""``speculators serve`` and ``speculators bench`` with vLLM: real servers, real counters."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from speculators.integrations.vllm.bench.counters import DraftCounters, parse_counters
from speculators.integrations.vllm.bench.load import complete
from speculators.integrations.vllm.bench.report import BenchReport
from speculators.integrations.vllm.serving.client import Client
from speculators.integrations.vllm.serving.server import free_port
from speculators.models import SpeculatorModel, find_algorithm
from speculators.models.verifier import Verifier

VERIFIER = pathlib.Path("examples/tiny_verifier/model").absolute()
PROMPTS = pathlib.Path("examples/tiny_verifier/prompts_eval.jsonl").absolute()
K = 2
FLAGS = ["--enforce-eager", "--dtype=float32", "--max-model-len=512", "--max-num-seqs=4"]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
START_SECONDS = 240


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """An EAGLE draft that repeats the last token's state: some of its tokens are accepted."""
    directory = tmp_path_factory.mktemp("served") / "draft"
    verifier = Verifier.from_pretrained(VERIFIER)
    torch.manual_seed(0)
    config = find_algorithm("eagle").new_config(
        verifier.config, str(VERIFIER), speculative_tokens=K
    )
    made: Any = SpeculatorModel.from_config(config, verifier)
    with torch.no_grad():
        width = made.hidden_size
        made.fusion_fc.weight.zero_()
        made.fusion_fc.weight[:, width:] = torch.eye(width)
        for module in (made.transformer.self_attn.o_proj, made.transformer.mlp.down_proj):
            module.weight.zero_()
    made.save_pretrained(directory)
    return directory


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "speculators", *words]


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, sys.path))
    return {**os.environ, **ENVIRONMENT, "PYTHONPATH": path}


@contextlib.contextmanager
def running(words: list[str], log: pathlib.Path) -> Iterator["subprocess.Popen[bytes]"]:
    with log.open("wb") as file:
        process = subprocess.Popen(
            words, stdout=file, stderr=subprocess.STDOUT, env=environment(), start_new_session=True
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_bench_of_servers_of_its_own(draft: pathlib.Path, tmp_path: pathlib.Path) -> None:
    process = subprocess.run(
        command(
            "bench",
            str(draft),
            f"--prompts={PROMPTS}",
            f"--k={K},1",
            "--concurrency=1,4",
            "--limit=6",
            "--max-new-tokens=16",
            f"--output-dir={tmp_path}",
            f"--start-timeout={START_SECONDS}",
            *FLAGS,
        ),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    report = BenchReport.read(tmp_path)
    assert [level.concurrency for level in report.levels] == [1, 4]
    assert [drafter.k for drafter in report.drafters] == [K, 1]
    for level in report.levels:
        assert level.plain is not None
        assert level.best_k in {0, 1, K}
        for drafter, k in zip(level.drafters, (K, 1), strict=True):
            found = drafter.acceptance
            assert found is not None
            # In float32, greedily, a draft changes nothing.
            assert drafter.identical == drafter.speed.requests == level.plain.requests == 6
            assert drafter.speed.tokens == level.plain.tokens
            assert drafter.speed.first_token.median > 0
            assert found.draft_tokens <= k * found.drafts
            assert len(found.acceptance_by_position) == k
            assert sum(found.acceptance_by_position) * found.drafts == pytest.approx(
                found.accepted_tokens
            )
            # Each request's first token is the prompt's. What a verification emits behind the limit
            # of tokens is counted as accepted, and is at most k tokens of a request.
            emitted = found.drafts + found.accepted_tokens
            assert 0 <= emitted - (drafter.speed.tokens - 6) <= 6 * k
    for drafted in report.drafters:
        assert drafted.acceptance is not None
        assert drafted.acceptance.accepted_tokens > 0
    assert report.versions.vllm is not None
    assert (tmp_path / "bench.png").is_file()
    assert not list(tmp_path.glob("*.log"))


def test_a_draft_is_served(draft: pathlib.Path, tmp_path: pathlib.Path) -> None:
    port, log = free_port(), tmp_path / "log"
    flags = ["--host=127.0.0.1", f"--port={port}", "--per-request-spec-decode-metrics=detailed"]
    with running(command("serve", str(draft), "--k=3", *FLAGS, *flags), log) as process:
        _wait(process, port, log)
        client = Client(f"http://127.0.0.1:{port}")
        prompt = [5, 17, 300, 44]
        said = client.complete(
            {
                "prompt": prompt,
                "max_tokens": 12,
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
            }
        )
        tokens = said["choices"][0]["token_ids"]
        steps = said["metrics"]["speculative_decoding"]
        counters = parse_counters(client.text("/metrics"))
        verifier = Verifier.from_pretrained(VERIFIER, dtype=torch.float32)
        assert tokens == _greedy(verifier, prompt, 12)
        assert set(steps["per_step_drafted"]) == {3}
        assert counters is not None
        assert counters.drafts == len(steps["per_step_accepted"])
        assert counters.accepted_tokens == sum(steps["per_step_accepted"])
        # A stream is the same, in pieces.
        streamed = complete(client, prompt, 12, salt="other")
        assert streamed.token_ids == tokens[: len(streamed.token_ids)]
        after = parse_counters(client.text("/metrics"))
        assert after is not None
        assert after.since(counters) != DraftCounters()
        process.terminate()  # the process itself is vLLM's by now
        process.wait(60)


def _greedy(verifier: Verifier, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        logits = verifier.prefill(torch.tensor([tokens]), use_cache=False).logits
        assert logits is not None
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_an_interrupted_bench_leaves_no_server(draft: pathlib.Path, tmp_path: pathlib.Path) -> None:
    words = command("bench", str(draft), f"--prompts={PROMPTS}", f"--output-dir={tmp_path}", *FLAGS)
    with running(words, tmp_path / "log") as process:
        end = time.monotonic() + START_SECONDS
        while not (tmp_path / "bench-plain.log").exists():
            assert process.poll() is None
            assert time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.2)
        time.sleep(2)  # vLLM is on its way
        children = _descendants(process.pid)
        assert children
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 1
    assert "error: interrupted" in (tmp_path / "log").read_text()
    assert not [pid for pid in children if _runs(pid)]


def test_a_flag_that_vllm_refuses_is_told_with_its_log(
    draft: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    words = command("bench", str(draft), f"--prompts={PROMPTS}", f"--output-dir={tmp_path}")
    process = subprocess.run(
        [*words, "--no-such-flag"], env=environment(), capture_output=True, text=True, check=False
    )
    assert process.returncode == 1
    assert "error: the server ended with status 2" in process.stderr
    assert "no-such-flag" in (tmp_path / "bench-plain.log").read_text()


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for file in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = file.read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(file.parent.name))
    found: list[int] = []
    for child in children.get(pid, []):
        found += [child, *_descendants(child)]
    return found


def _runs(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody waits for does not."""
    try:
        status = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def _wait(process: "subprocess.Popen[bytes]", port: int, log: pathlib.Path) -> None:
    end = time.monotonic() + START_SECONDS
    client = Client(f"http://127.0.0.1:{port}", timeout=2)
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()
        if client.healthy():
            return
        time.sleep(0.5)
    raise AssertionError(log.read_text())
