"""The main job as a user runs it: any verifier, any data, by stages, again, and with mistakes."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
import yaml
from tests.models.verifier_models import BASE, make
from transformers import AutoTokenizer
from typer.testing import CliRunner

from speculators.cli import commands
from speculators.cli.app import app
from speculators.evaluation.report import EvaluationReport
from speculators.models import SpeculatorModel
from speculators.models.verifier import Verifier

TINY = pathlib.Path("examples/tiny_verifier")
PREPARED = ["data-00000-of-00001.arrow", "dataset_info.json", "prepare.json", "state.json"]
BUDGET = [
    "--training.max-steps=3",
    "--training.row-tokens=64",
    "--training.rows-per-batch=2",
    "--training.validation.documents=3",
    "--training.validation.prompts=1",
    "--training.validation.max-new-tokens=4",
    "--evaluate.max-new-tokens=6",
]


def run(*arguments: str | pathlib.Path) -> Any:
    torch.manual_seed(0)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A random Qwen3 with the tiny verifier's tokenizer."""
    folder = tmp_path_factory.mktemp("verifier")
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    changes = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    before = dict(BASE)
    try:
        BASE.update(changes | {"num_hidden_layers": 8, "max_position_embeddings": 512})
        model = make("qwen3")
    finally:
        BASE.update(before)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("data") / "conversations.jsonl"
    rows = [
        [
            {"role": "user", "content": f"Count to {number}."},
            {"role": "assistant", "content": " ".join(str(i) for i in range(number))},
        ]
        for number in range(5, 25)
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("algorithm", ["hass", "eagle3"])
def test_it_makes_and_measures_a_draft_for_any_verifier(
    algorithm: str, verifier: pathlib.Path, data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    out = tmp_path / "out"
    command: list[Any] = ["train", f"--algo={algorithm}", "--verifier", verifier, "--data", data]
    options = [*BUDGET, "--draft.draft-vocab-size=500"] if algorithm == "eagle3" else BUDGET
    options = [*options, "--evaluate.suffix=true"]
    result = run(*command, "--output-dir", out, *options)
    assert result.exit_code == 0, result.output
    assert "tau" in result.output
    draft = SpeculatorModel.from_pretrained(out, verifier=verifier)
    assert draft.spec.name == algorithm
    assert draft.config.speculators_config.verifier.name_or_path == str(verifier)
    report = json.loads((out / "report.json").read_text())
    assert report["identical"] is True
    assert report["prompts"] == 3, "the documents that training held back"
    assert report["tau"] >= 1
    assert report["tokens_per_second"] > 0
    assert report["baseline_tokens_per_second"] > 0
    assert len(report["acceptance_by_position"]) == 5
    assert list(report["drafters"]) == [algorithm, "n-gram", "suffix"]
    assert (out / "acceptance.png").read_bytes().startswith(b"\x89PNG")
    assert str(report["tau"])[:4] in (out / "report.md").read_text()
    made = yaml.safe_load((out / "run.yaml").read_text())
    assert made["training"]["max_steps"] == 3
    assert made["verifier"]["path"] == str(verifier)


def test_stages_find_what_the_others_left(
    verifier: pathlib.Path, data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    shared: list[Any] = ["--verifier", verifier, "--output-dir", tmp_path / "out"]
    assert run("prepare", *shared, "--data", data).exit_code == 0
    result = run("generate", *shared, "--algo=hass")
    assert result.exit_code == 0, result.output
    shard = tmp_path / "out/data/hidden_states/shard-00000.safetensors"
    made = shard.stat().st_mtime_ns
    command: list[Any] = ["train", "--algo=hass", *shared, "--data", data]
    assert run(*command, *BUDGET, "--skip-evaluation").exit_code == 0
    assert shard.stat().st_mtime_ns == made, "hidden states are not computed again"
    assert not (tmp_path / "out/report.json").exists()
    weights = (tmp_path / "out/model.safetensors").read_bytes()
    again = run(*command, *BUDGET, "--skip-evaluation")
    assert again.exit_code == 0, again.output
    assert (tmp_path / "out/model.safetensors").read_bytes() == weights, "training was complete"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Count to 9."}\n{"prompt": "Count."}\n')
    result = run(
        "evaluate", tmp_path / "out", "ngram", f"{tmp_path}/out+suffix", "--draft=suffix",
        "--prompts", prompts, "--k=2", "--dtype=float32", "--evaluate.max-new-tokens=5",
        "--suffix-corpus", tmp_path / "out/data/hidden_states", "--output-dir", tmp_path / "report",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = EvaluationReport.read(tmp_path / "report/report.json")
    assert [(name, drafter.kind) for name, drafter in report.drafters.items()] == [
        ("out", "hass"),
        ("n-gram", "NgramDrafter"),
        ("out+suffix", "hass + suffix"),
        ("suffix", "SuffixDrafter"),
    ]
    comparisons = [drafter.comparison for drafter in report.drafters.values()]
    assert all(found is not None and found.identical for found in comparisons)
    assert len(report.acceptance_by_position) == 2


def test_the_verifier_writes_the_answers_to_prompts(
    verifier: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    row: dict[str, Any] = {"messages": [{"role": "user", "content": "Count."}]}
    prompts.write_text((json.dumps(row) + "\n") * 4)
    shared: list[Any] = ["--verifier", verifier, "--data", prompts, "--output-dir", tmp_path / "o"]
    refused = run("prepare", *shared)
    assert refused.exit_code == 1
    assert "no token of the 4 rows is learnable" in refused.output
    settings = ["--generate.regenerate=true", "--generate.max-new-tokens=7"]
    result = run("train", "--algo=eagle", *shared, *settings, *BUDGET, "--skip-evaluation")
    assert result.exit_code == 0, result.output
    from speculators.data.store import HiddenStateStore

    store = HiddenStateStore.open(tmp_path / "o/data/hidden_states")
    tokenizer: Any = Verifier.from_pretrained(verifier).tokenizer
    prompt = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True)["input_ids"]
    document = store[0]
    assert document.input_ids[: len(prompt)].tolist() == list(prompt)
    assert document.loss_mask.tolist() == [False] * len(prompt) + [True] * 7


def test_other_settings_are_told_and_replace_data_only_if_asked(
    verifier: pathlib.Path, data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    shared: list[Any] = ["--verifier", verifier, "--data", data, "--output-dir", tmp_path / "o"]
    assert run("prepare", *shared).exit_code == 0
    stale = run("prepare", *shared, "--prepare.max-length=32")
    assert stale.exit_code == 1
    assert "error: " in stale.output
    assert "prepared" in stale.output
    assert run("prepare", *shared, "--prepare.max-length=32", "--overwrite").exit_code == 0
    shared = [*shared, "--prepare.max-length=32", "--algo=eagle"]
    assert run("generate", *shared, "--generate.dtype=bfloat16").exit_code == 0
    stale = run("generate", *shared, "--generate.dtype=float32")
    assert stale.exit_code == 1
    assert "hidden_states" in stale.output


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--algo=has"], 2, "no algorithm 'has'; expected one of eagle, eagle3, hass"),
        (["--recipe=no.yaml"], 2, "there is no recipe no.yaml"),
        (["--training.epoch=3"], 2, "did you mean training.epochs?"),
        (["--verifier=/no/such/folder", "--data=x"], 2, "/no/such/folder"),
        (["--data=/no/such/file.jsonl"], 1, "/no/such/file.jsonl"),
        (["--verifier=examples/tiny_verifier/model"], 2, "there is no data; give some with --data"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], status: int, message: str, tmp_path: pathlib.Path
) -> None:
    result = run("train", "--output-dir", tmp_path / "out", *arguments)
    assert result.exit_code == status, result.output
    line = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert len(line) == 1
    assert message in result.output
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts=x"], "there is no draft; name folders, Hub names, ngram or suffix"),
        (["suffix"], "no draft names its verifier; give it with --verifier"),
        (["ngram", "--against-vllm"], "vLLM could read no directory of ngram; leave it out"),
        (["a+suffix", "--against-vllm"], "vLLM could read no directory of a+suffix"),
    ],
)
def test_a_mistake_in_what_to_evaluate_is_one_line(arguments: list[str], message: str) -> None:
    result = run("evaluate", *arguments)
    assert result.exit_code == 2, result.output
    assert f"error: {message}" in " ".join(result.output.split())


def test_empty_data_and_a_draft_of_another_verifier_are_mistakes(
    verifier: pathlib.Path, data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    shared: list[Any] = ["--verifier", verifier, "--output-dir", tmp_path / "o"]
    result = run("train", *shared, "--data", empty)
    assert result.exit_code == 1
    assert "no row can be used" in result.output
    assert run("train", *shared, "--data", data, *BUDGET, "--skip-evaluation").exit_code == 0
    prompts: list[Any] = ["--prompts", TINY / "prompts_eval.jsonl", "--verifier", TINY / "model"]
    result = run("evaluate", tmp_path / "o", *prompts)
    assert result.exit_code == 1
    assert "the verifier's embedding is [4096, 192]" in result.output


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["prepare"], "interrupted; the same command goes on from here"),
        (["generate"], "interrupted; the same command goes on from here"),
        (["train"], "interrupted; the same command goes on from here"),
        (["evaluate", "draft"], "interrupted"),
    ],
)
def test_only_what_can_go_on_says_so(
    command: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "_recipe", interrupted)
    result = run(*command)
    assert result.exit_code == 1
    assert result.output == f"error: {says}\n"


def test_ctrl_c_ends_with_one_line() -> None:
    program = (
        "import typer\n"
        "from speculators.cli.failures import one_line_errors\n"
        "app = typer.Typer()\n"
        "@app.command()\n"
        "def work():\n"
        "    with one_line_errors():\n"
        "        raise KeyboardInterrupt\n"
        "app()\n"
    )
    command = [sys.executable, "-c", program]
    process = subprocess.run(command, check=False, capture_output=True, text=True)
    assert process.returncode == 1
    assert process.stderr == "error: interrupted\n"


def test_a_killed_job_ends_as_one_that_was_not(
    verifier: pathlib.Path, data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    words: list[Any] = ["train", "--algo=hass", "--verifier", verifier, "--data", data, *BUDGET]
    words += ["--training.max-steps=12", "--training.checkpoints.every-steps=2"]
    words += ["--training.epochs=12", "--skip-evaluation"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    # How sums are split over threads decides about their last bit.
    here = {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": f"{torch.get_num_threads()}",
    }
    for sign in ("data/hidden_states/*.safetensors", "training/checkpoint-*/trainer.json"):
        process = subprocess.Popen(
            [sys.executable, "-m", "speculators", *map(str, words), "--output-dir", killed],
            env=os.environ | here,
            stdout=subprocess.DEVNULL,
        )
        while not list(killed.glob(sign)):
            assert process.poll() is None, f"ended before there was {sign}"
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not (killed / "config.json").exists()
    for folder in (killed, whole):
        result = run(*words, "--output-dir", folder)
        assert result.exit_code == 0, result.output
    weights = [(folder / "model.safetensors").read_bytes() for folder in (killed, whole)]
    assert weights[0] == weights[1]


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path: pathlib.Path) -> None:
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*namespace, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this system lets no user mount a file system of their own")
    program = pathlib.Path(__file__).with_name("full_disk.py")
    verifier = (TINY / "model").absolute()
    process = subprocess.run(
        [*namespace, sys.executable, program, tmp_path, verifier],
        check=False, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    attempts = [json.loads(line) for line in process.stdout.splitlines()]
    assert [(found["command"], found["status"], found["left"]) for found in attempts] == [
        ("prepare", 1, []),
        ("prepare", 0, []),
        ("generate", 1, [f"data/prepared/{name}" for name in PREPARED]),
        ("train", 0, []),
        ("train", 1, []),
        ("evaluate", 1, ["ballast"]),
        ("save", 1, []),
    ]
    for found, message in zip(
        [found for found in attempts if found["status"]],
        [
            "No space left on device: {}/disk/out/data/prepared is as it was; free some space",
            "and {}/disk/data/hidden_states has 1.0 MB free; free some space",
            "and {}/disk/out/training has 1.0 MB free; free some space",
            "the disk of {}/disk/report/acceptance.png is full",
            "the disk of {}/disk/draft is full; what was there before is as it was: free some",
        ],
        strict=True,
    ):
        (line,) = [line for line in found["output"].splitlines() if line.startswith("error: ")]
        assert message.format(tmp_path) in line
