"""Checkpoints: whole or not there, the last ones kept, and nothing else resumed from them."""

import errno
import io
import pathlib
import shutil
from typing import Any

import pytest
import torch
from tests.training.tiny_runs import (
    make_draft,
    make_objective,
    make_store,
    make_verifier,
    run,
    settings_of,
    weights,
)

from speculators.configs.errors import ConfigError
from speculators.data.artifact import StaleArtifactError
from speculators.data.disk import DiskSpaceError
from speculators.data.store import HiddenStateStore
from speculators.models.verifier import Verifier
from speculators.training import train
from speculators.training.checkpoints import Checkpoints, TrainerState
from speculators.training.optimizers import OPTIMIZERS, Optimizer, Parameters
from speculators.training.settings import OptimizerSettings


@pytest.fixture(scope="module")
def verifier() -> Verifier:
    return make_verifier()


@pytest.fixture(scope="module")
def store(verifier: Verifier, tmp_path_factory: pytest.TempPathFactory) -> HiddenStateStore:
    return make_store(tmp_path_factory.mktemp("store"), verifier)


def _trained(verifier: Verifier, seed: int) -> tuple[Any, Optimizer]:
    """A draft after one update, and its optimizer."""
    draft = make_draft("eagle3", verifier, seed)
    parameters = Parameters.of(draft)
    optimizer = OPTIMIZERS["muon"](parameters, OptimizerSettings(learning_rate=0.01))
    for parameter in parameters.all:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step(1.0)
    return draft, optimizer


def _bits(optimizer: Optimizer) -> bytes:
    """The whole state as a file has it."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    return file.getvalue()


def test_what_is_saved_is_loaded(verifier: Verifier, tmp_path: pathlib.Path) -> None:
    draft, optimizer = _trained(verifier, seed=1)
    state = TrainerState(update=7, epoch=1, batch=3, tokens=99, best_score=0.1 + 0.2, best_update=5)
    checkpoints = Checkpoints(tmp_path, {"store": "a"}, 2)
    path = checkpoints.save(state, draft, optimizer)
    assert path == tmp_path / "checkpoint-000007"
    other, other_optimizer = _trained(verifier, seed=2)
    assert checkpoints.load(path, other, other_optimizer) == state
    torch.testing.assert_close(other.state_dict(), draft.state_dict(), rtol=0, atol=0)
    assert _bits(other_optimizer) == _bits(optimizer)
    assert not torch.equal(draft.fc.weight, make_draft("eagle3", verifier).fc.weight)
    torch.testing.assert_close(weights(path / "draft"), draft.state_dict(), rtol=0, atol=0)


def test_the_last_ones_are_kept_by_number(verifier: Verifier, tmp_path: pathlib.Path) -> None:
    draft, optimizer = _trained(verifier, seed=1)
    checkpoints = Checkpoints(tmp_path, {}, keep_last=2)
    (tmp_path / "checkpoint-final").mkdir()
    for update in (9, 10, 999_999, 1_000_000):
        checkpoints.save(TrainerState(update=update), draft, optimizer)
    names = [path.name for path in checkpoints.all()]
    assert names == ["checkpoint-999999", "checkpoint-1000000"]
    assert {path.name for path in tmp_path.iterdir()} == {*names, "checkpoint-final"}


def test_what_killed_runs_left_is_removed(verifier: Verifier, tmp_path: pathlib.Path) -> None:
    draft, optimizer = _trained(verifier, seed=1)
    checkpoints = Checkpoints(tmp_path, {}, 2)
    path = checkpoints.save(TrainerState(update=1), draft, optimizer)
    for name in (".checkpoint-000002.abc", ".best.x1", ".best.old.x2", ".others"):
        shutil.copytree(path, tmp_path / name)
    checkpoints.clean()
    assert {child.name for child in tmp_path.iterdir()} == {path.name, ".others"}
    assert checkpoints.all() == [path]


def test_a_kill_while_an_old_checkpoint_is_removed(
    verifier: Verifier, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft, optimizer = _trained(verifier, seed=1)
    checkpoints = Checkpoints(tmp_path, {}, keep_last=1)
    first = checkpoints.save(TrainerState(update=1), draft, optimizer)

    def killed(path: pathlib.Path, **_: Any) -> None:
        (path / "trainer.json").unlink()
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(SystemExit):
            checkpoints.save(TrainerState(update=2), draft, optimizer)
    assert not first.exists()
    assert [path.name for path in checkpoints.all()] == ["checkpoint-000002"]


@pytest.mark.parametrize("part", ["draft", "optimizer", "best"])
def test_a_full_disk_leaves_what_was_there(
    part: str, verifier: Verifier, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft, optimizer = _trained(verifier, seed=1)
    checkpoints = Checkpoints(tmp_path, {}, keep_last=1)
    checkpoints.save(TrainerState(update=1), draft, optimizer)
    checkpoints.save_best(draft)
    before = {
        path.relative_to(tmp_path): path.read_bytes()
        for path in tmp_path.rglob("*")
        if path.is_file()
    }
    write = torch.save

    def full(*args: Any, **_: Any) -> None:
        if part == "optimizer":
            write(*args)
        raise OSError(errno.ENOSPC, "No space left on device")

    target = "torch.save" if part == "optimizer" else "speculators.models.speculator_model"
    target += "" if part == "optimizer" else ".write_tensors"
    monkeypatch.setattr(target, full)
    other, optimizer = _trained(verifier, seed=2)

    def save() -> None:
        if part == "best":
            checkpoints.save_best(other)
        else:
            checkpoints.save(TrainerState(update=2), other, optimizer)

    with pytest.raises(DiskSpaceError, match="keeps its earlier checkpoints; free some space"):
        save()
    after = {
        path.relative_to(tmp_path): path.read_bytes()
        for path in tmp_path.rglob("*")
        if path.is_file()
    }
    assert after == before


def test_too_little_space_is_said_before(
    verifier: Verifier,
    store: HiddenStateStore,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("speculators.data.disk.free_bytes", lambda _: 1000)
    with pytest.raises(DiskSpaceError, match=r"checkpoints\.keep_last"):
        run(tmp_path / "run", store, verifier)
    assert not (tmp_path / "run").exists()


def test_resuming_what_is_not_there_and_starting_where_something_is(
    verifier: Verifier, store: HiddenStateStore, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume from"):
        run(tmp_path, store, verifier, resume=True)
    changes = {"max_steps": 2}
    assert run(tmp_path, store, verifier, changes, resume="auto").resumed_from == 0
    with pytest.raises(FileExistsError, match="up to checkpoint-000002; resume it"):
        run(tmp_path, store, verifier, changes)
    assert run(tmp_path, store, verifier, changes, resume="auto").resumed_from == 2


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"seed": 1}, "training.seed: 0 there, 1 now"),
        ({"optimizer.learning_rate": 0.5}, "training.optimizer.learning_rate: 0.01 there, 0.5 now"),
        ({"epochs": 3}, "training.epochs: 2 there, 3 now"),
    ],
)
def test_other_settings_are_not_resumed(
    changes: dict[str, Any],
    line: str,
    verifier: Verifier,
    store: HiddenStateStore,
    tmp_path: pathlib.Path,
) -> None:
    run(tmp_path, store, verifier, {"max_steps": 2})
    run(tmp_path, store, verifier, {"max_steps": 2, "log_every": 1}, resume=True)
    with pytest.raises(StaleArtifactError) as caught:
        run(tmp_path, store, verifier, {"max_steps": 2, **changes}, resume=True)
    assert line in str(caught.value).split("\n  ")[1:][0]
    hashes = [word for word in str(caught.value).replace(";", " ").split() if len(word) > 60]
    assert len({word.strip(":") for word in hashes if "/" not in word}) == 2


def test_other_data_drafts_and_objectives_are_not_resumed(
    verifier: Verifier, store: HiddenStateStore, tmp_path: pathlib.Path
) -> None:
    changes = {"max_steps": 2}
    run(tmp_path / "run", store, verifier, changes)
    other_store = make_store(tmp_path / "store", verifier, name="other")
    with pytest.raises(StaleArtifactError, match="store: 'store-tiny-12' there, 'store-other-12'"):
        run(tmp_path / "run", other_store, verifier, changes, resume=True)
    draft = make_draft("hass", verifier)
    objective = make_objective(draft, verifier, steps=2)
    with pytest.raises(StaleArtifactError, match=r"objective\.steps: 3 there, 2 now"):
        train(draft, objective, store, settings_of(changes), tmp_path / "run", resume=True)
    init_from = {"init_from": "other"}
    with pytest.raises(StaleArtifactError, match=r"caller\.init_from: None there, 'other' now"):
        run(tmp_path / "run", store, verifier, changes, resume=True, made_from=init_from)
    eagle = make_draft("eagle", verifier)
    with pytest.raises(StaleArtifactError, match="speculators_model_type: 'hass' there, 'eagle'"):
        run(tmp_path / "run", store, verifier, changes, draft=eagle, resume=True)


def test_a_damaged_checkpoint_is_named(
    verifier: Verifier, store: HiddenStateStore, tmp_path: pathlib.Path
) -> None:
    changes = {"max_steps": 2}
    report = run(tmp_path, store, verifier, changes)
    manifest = report.checkpoint / "trainer.json"
    manifest.write_text(manifest.read_text().replace('"update": 2', '"update": "two"'))
    with pytest.raises(ConfigError, match=r"trainer\.json is not valid:\n  state\.update"):
        run(tmp_path, store, verifier, changes, resume=True)
