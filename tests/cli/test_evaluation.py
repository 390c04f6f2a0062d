"""``speculators evaluate``: what a search tries, where reports go, and how failures end."""

import json
import pathlib
import shutil
import types
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from speculators.cli import evaluation, job
from speculators.cli.app import app
from speculators.cli.job import Folders, Job
from speculators.cli.progress import ConsoleProgress
from speculators.cli.recipe import read_recipe
from speculators.evaluation import EvaluationReport
from speculators.models import SpeculatorModel, find_algorithm
from speculators.models.verifier import UnsupportedVerifierError, Verifier

HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
TINY = pathlib.Path("examples/tiny_verifier/model").absolute()


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """An untrained draft that names the tiny verifier as its own."""
    verifier = Verifier.from_pretrained(TINY)
    torch.manual_seed(0)
    config = find_algorithm("eagle").new_config(verifier.config, str(TINY), speculative_tokens=2)
    folder = tmp_path_factory.mktemp("drafts") / "draft"
    SpeculatorModel.from_config(config, verifier).save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Count to {n}."}) + "\n" for n in (3, 4)))
    return path


def run(*arguments: str | pathlib.Path) -> Any:
    words = [*arguments, "--evaluate.max-new-tokens=2"]
    return CliRunner().invoke(app, ["evaluate", *map(str, words)])


def test_a_search_for_a_verifier_that_reads_no_trees_says_so_and_tries_chains(
    draft: pathlib.Path, prompts: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_: Verifier) -> None:
        raise UnsupportedVerifierError("its cache cannot branch")

    monkeypatch.setattr(Verifier, "check_trees", refused)
    result = run(draft, "--prompts", prompts, "--search", "--output-dir", prompts.parent)
    assert result.exit_code == 0, result.output
    assert result.output.count("no trees are tried: llama cannot read them\n") == 1
    report = EvaluationReport.read(prompts.parent)
    assert list(report.drafters) == [report.main, "draft"]
    assert report.main.startswith("draft, chain, k=")
    assert all(result.tree is None for result in report.drafters.values())


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--k=3"], "evaluate.k"),
        (["--tree=dynamic", "--nodes=9"], "evaluate.nodes, evaluate.tree"),
        (["--evaluate.tree=4,2"], "evaluate.tree"),
    ],
)
def test_a_search_for_what_is_given_is_a_mistake(flags: list[str], named: str) -> None:
    result = run("draft", "--prompts=x", "--search", *flags)
    assert result.exit_code == 2, result.output
    assert f"error: --search finds the number of tokens or the tree itself, and {named}" in (
        result.output
    )


@pytest.mark.parametrize("flag", ["--against-vllm", "--endpoint=http://127.0.0.1:1"])
def test_a_search_does_not_ask_vllm(flag: str) -> None:
    result = run("draft", "--prompts=x", "--search", flag)
    assert result.exit_code == 2, result.output
    assert "error: --search times our own decoder" in result.output


def test_the_report_of_a_draft_of_the_hub_is_not_written_into_the_hubs_cache(
    draft: pathlib.Path,
    prompts: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = tmp_path / "cache/models--someone--small/snapshots/0a1b"
    shutil.copytree(draft, cache)
    before = sorted(cache.iterdir())
    monkeypatch.setattr(evaluation, "local_directory", {"someone/small": cache}.__getitem__)
    monkeypatch.chdir(tmp_path)
    result = run("someone/small", "--prompts", prompts)
    assert result.exit_code == 0, result.output
    assert sorted(cache.iterdir()) == before
    assert EvaluationReport.read("outputs/small").main == "small"
    assert f"{tmp_path}/outputs/small/report.md" in result.output


def test_the_report_of_a_draft_here_is_beside_it(
    draft: pathlib.Path, prompts: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    here = tmp_path / "drafts/small"
    shutil.copytree(draft, here)
    result = run(here, "ngram", "--prompts", prompts)
    assert result.exit_code == 0, result.output
    assert EvaluationReport.read(here).main == "small"
    assert f"{here}/report.md" in result.output


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """What rich takes for a terminal, on which it draws bars and hides the cursor."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")


@pytest.mark.usefixtures("terminal")
def test_a_failure_takes_the_bar_away_and_gives_the_cursor_back(
    draft: pathlib.Path, prompts: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr("speculators.evaluation.evaluate.take_turns", failing)
    for search in ([], ["--search"]):
        result = run(draft, "--prompts", prompts, *search)
        assert result.exit_code == 1
        assert "error: planted" in result.output
        assert result.output.count(HIDE_CURSOR) == result.output.count(SHOW_CURSOR) > 0


@pytest.mark.usefixtures("terminal")
def test_so_does_a_stage_that_fails(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(some: Job, **_: Any) -> None:
        some.progress.start(3, "a stage")
        raise RuntimeError("planted")

    for stage in ("prepare", "generate", "train"):
        monkeypatch.setattr(Job, "prepare" if stage == "train" else stage, failing)
        words = [stage, f"--verifier={TINY}", f"--output-dir={tmp_path}"]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 1
        assert "error: planted" in result.output
        assert result.output.count(HIDE_CURSOR) == result.output.count(SHOW_CURSOR) == 1


@pytest.mark.parametrize(
    ("positions", "longest"), [({"max_position_embeddings": 30}, 10), ({}, 99)]
)
def test_prompts_that_training_held_back_are_as_long_as_the_verifier_takes(
    positions: dict[str, int], longest: int, tmp_path: pathlib.Path, monkeypatch: Any
) -> None:
    lengths = [99, 10, 11, 5]

    def begun(_: Any, documents: list[int], count: int, max_tokens: int) -> list[list[int]]:
        assert count == len(documents)
        return [[7] * lengths[n] for n in documents if lengths[n] <= max_tokens]

    monkeypatch.setattr("speculators.data.store.HiddenStateStore.open", lambda *_, **__: None)
    monkeypatch.setattr(job, "documents_of", lambda *_: ([], list(range(len(lengths)))))
    monkeypatch.setattr(job, "validation_prompts", begun)
    config = types.SimpleNamespace(**positions)
    monkeypatch.setattr(Job, "verifier", types.SimpleNamespace(config=config))
    flags = {"verifier.path": "x", "evaluate.max_new_tokens": 20, "evaluate.limit": None}
    some = Job(read_recipe(None, flags), Folders(tmp_path, tmp_path), ConsoleProgress())
    assert max(len(prompt.ids) for prompt in some._held_back_prompts()) == longest
