"""``speculators bench`` when a real server of vLLM does not come up."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from speculators.models import SpeculatorModel, find_algorithm
from speculators.models.verifier import Verifier

VERIFIER = pathlib.Path("examples/tiny_verifier/model").absolute()
PROMPTS = pathlib.Path("examples/tiny_verifier/prompts_eval.jsonl").absolute()
FLAGS = ["--enforce-eager", "--dtype=float32", "--max-model-len=512", "--max-num-seqs=4"]
START_SECONDS = 240


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A draft that has learned nothing."""
    directory = tmp_path_factory.mktemp("served") / "draft"
    verifier = Verifier.from_pretrained(VERIFIER)
    config = find_algorithm("eagle").new_config(
        verifier.config, str(VERIFIER), speculative_tokens=2
    )
    SpeculatorModel.from_config(config, verifier).save_pretrained(directory)
    return directory


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "speculators", *words]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


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
