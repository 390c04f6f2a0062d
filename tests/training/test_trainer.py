"""Runs: a draft learns, runs end when they should, and leave what they should."""

import json
import os
import pathlib
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.training.tiny_runs import (
    PROMPT,
    make_draft,
    make_objective,
    make_store,
    make_verifier,
    run,
    settings_of,
    weights,
)

from speculators.data.store import HiddenStateStore
from speculators.decoding import GenerationSettings, generate
from speculators.models import SpeculatorModel
from speculators.models.verifier import Verifier
from speculators.training import TrainingReport, train
from speculators.training.validation import Validation, Validator


@pytest.fixture(scope="module")
def verifier() -> Verifier:
    return make_verifier()


@pytest.fixture(scope="module")
def store(verifier: Verifier, tmp_path_factory: pytest.TempPathFactory) -> HiddenStateStore:
    return make_store(tmp_path_factory.mktemp("store"), verifier)


class Shown:
    """What a user is shown; does something at each update."""

    def __init__(self, at_update: Callable[[int], None] = lambda _: None) -> None:
        self.total = self.done = 0
        self.messages: list[str] = []
        self._at_update = at_update

    def start(self, total: int, description: str) -> None:
        """See ``Progress``."""
        assert description
        self.total = total

    def advance(self, count: int) -> None:
        """See ``Progress``."""
        self.done += count
        self._at_update(self.done)

    def message(self, text: str) -> None:
        """See ``Progress``."""
        self.messages.append(text)


def same(one: pathlib.Path, other: pathlib.Path) -> None:
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "optimizer", "rate", "epochs"),
    [("eagle", "adamw", 0.01, 250), ("hass", "adamw", 0.01, 150), ("eagle3", "muon", 0.02, 120)],
)
def test_a_draft_learns_its_sample_by_heart(
    name: str,
    optimizer: str,
    rate: float,
    epochs: int,
    verifier: Verifier,
    tmp_path: pathlib.Path,
) -> None:
    """What finds shifted rows: not only the loss, drafting must become all but perfect."""
    store = make_store(tmp_path / "store", verifier, documents=3)
    draft = make_draft(name, verifier)
    if name == "eagle3":  # which tokens it knows must not be what limits it
        config = draft.spec.new_config(verifier.config, aux_layer_ids=[1, 2, 3])
        draft = SpeculatorModel.from_config(config, verifier)
    documents = [store[number].input_ids.tolist() for number in range(3)]
    prompts = [document[:PROMPT] for document in documents]
    length = min(len(document) for document in documents) - PROMPT
    settings = GenerationSettings(max_new_tokens=length, eos_token_ids=())
    assert generate(verifier, draft, prompts, settings).acceptance.tau < 2
    shown = Shown()
    changes = {
        "epochs": epochs,
        "row_tokens": 56,  # one row
        "optimizer.name": optimizer,
        "optimizer.learning_rate": rate,
        "validation.documents": 0,
        "log_every": epochs // 5,
    }
    report = run(tmp_path / "run", store, verifier, changes, draft=draft, progress=shown)
    assert (report.stopped, report.updates, shown.done, shown.total) == ("finished", *[epochs] * 3)
    assert report.draft == report.checkpoint / "draft"
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in shown.messages]
    assert len(losses) == 5
    assert losses == sorted(losses, reverse=True)
    assert shown.messages[-1].endswith("0:00:00 left")
    trained = SpeculatorModel.from_pretrained(report.draft, verifier=verifier)
    assert generate(verifier, trained, prompts, settings).acceptance.tau > 4


def test_validation_and_what_is_left(
    verifier: Verifier, store: HiddenStateStore, tmp_path: pathlib.Path
) -> None:
    changes = {
        "epochs": 3,
        "validation.prompts": 2,
        "checkpoints.every_steps": 1,
        "checkpoints.keep_last": 3,
        "log_every": 1,
        "tracker.name": "tensorboard",
    }
    shown = Shown()
    report = run(tmp_path, store, verifier, changes, drafting=True, progress=shown)
    assert report.updates % 3 == 0  # all epochs alike
    names = sorted(path.name for path in tmp_path.iterdir())
    last = [f"checkpoint-{report.updates - k:06d}" for k in (2, 1, 0)]
    assert names == ["best", *last, "tensorboard"]
    assert report.checkpoint == tmp_path / last[-1]
    assert report.draft == tmp_path / "best"
    assert {"validation/tau", "validation/acceptance_1", "validation/alpha_3"} <= set(
        report.metrics
    )
    assert {"train/loss", "train/alpha_1", "train/agreement_3", "train/smooth_l1_2"} <= set(
        report.metrics
    )
    assert report.metrics["train/learning_rate"] < 1e-2
    assert report.metrics["train/tokens_per_second"] > 0
    assert report.tokens > 0
    said = [line for line in shown.messages if line.startswith("validation")]
    results = [
        (float(line.split("tau ")[1]), -float(line.split("loss ")[1].split(",")[0]))
        for line in said
    ]
    assert len(results) == 3
    best = max(results)
    assert report.best_score == pytest.approx(best[0], rel=1e-3)
    assert report.best_update == report.updates // 3 * (1 + results.index(best))


class _Scores:
    """Gives the scores of validations, one after the other."""

    def __init__(self, *scores: float) -> None:
        self._scores = iter(scores)

    def __call__(self) -> Validation:
        score = next(self._scores)
        loss = score % 0.01  # the third digit on
        return Validation({"validation/alpha": score}, "alpha", round(score, 1), loss)


@pytest.mark.parametrize(
    ("scores", "updates", "best"),
    [
        ((1.0, 2.0, 2.0, 1.5), 4, 2),  # the same is not better
        ((1.0, 0.5, 2.0, float("nan"), 1.0), 5, 3),
        ((1.005, 1.004, 1.006, 1.003, 1.004, 1.003), 6, 4),  # of equals, the lower loss
        ((float("nan"), float("nan")), 2, None),
    ],
)
def test_early_stop(
    scores: tuple[float, ...],
    updates: int,
    best: int | None,
    verifier: Verifier,
    store: HiddenStateStore,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = _Scores(*scores)
    monkeypatch.setattr(Validator, "__call__", made)
    changes = {
        "early_stop_patience": 2,
        "validation.every_steps": 1,
        "epochs": 5,
        "checkpoints.every_steps": 1,
        "checkpoints.keep_last": 9,
    }
    report = run(tmp_path, store, verifier, changes)
    assert (report.stopped, report.updates, report.best_update) == ("early stop", updates, best)
    if best is None:
        assert report.draft == report.checkpoint / "draft"
    else:
        same(report.draft, tmp_path / f"checkpoint-{best:06d}" / "draft")
    again = run(tmp_path, store, verifier, changes, resume=True)  # it is over
    assert (again.updates, again.resumed_from, again.stopped) == (updates, updates, "early stop")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_a_checkpoint_and_goes_on(
    number: signal.Signals, verifier: Verifier, store: HiddenStateStore, tmp_path: pathlib.Path
) -> None:
    changes = {"epochs": 4}
    whole = run(tmp_path / "whole", store, verifier, changes)
    stop = 3

    def interrupt(update: int) -> None:
        if update == stop:
            os.kill(os.getpid(), number)

    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    error = KeyboardInterrupt if number == signal.SIGINT else SystemExit
    with pytest.raises(error) as caught:
        run(tmp_path / "run", store, verifier, changes, progress=Shown(interrupt))
    if number == signal.SIGTERM:
        assert caught.value.args == (143,)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    manifest = json.loads((tmp_path / "run/checkpoint-000003/trainer.json").read_text())
    assert manifest["state"]["update"] == stop
    report = run(tmp_path / "run", store, verifier, changes, resume=True)
    assert (report.resumed_from, report.updates) == (stop, whole.updates)
    same(report.checkpoint / "draft", whole.checkpoint / "draft")


def test_a_second_interrupt_does_not_wait(
    verifier: Verifier, store: HiddenStateStore, tmp_path: pathlib.Path
) -> None:
    def interrupt(update: int) -> None:
        if update == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, store, verifier, progress=Shown(interrupt))
    assert list(tmp_path.glob("checkpoint-*")) == []


def test_a_run_in_another_thread_leaves_signals_alone(
    verifier: Verifier, store: HiddenStateStore, tmp_path: pathlib.Path
) -> None:
    reports: list[TrainingReport] = []
    thread = threading.Thread(
        target=lambda: reports.append(run(tmp_path, store, verifier, {"max_steps": 2}))
    )
    thread.start()
    thread.join()
    assert reports[0].updates == 2


def test_weights_become_float32(
    verifier: Verifier, store: HiddenStateStore, tmp_path: pathlib.Path
) -> None:
    draft = make_draft("hass", verifier).to(torch.bfloat16)
    run(tmp_path, store, verifier, {"max_steps": 1}, draft=draft)
    assert {parameter.dtype for parameter in draft.parameters()} == {torch.float32}
    assert not draft.training


def test_several_processes_are_refused(
    verifier: Verifier,
    store: HiddenStateStore,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="WORLD_SIZE is 2: this version trains in one process"):
        run(tmp_path / "run", store, verifier)
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert run(tmp_path / "run", store, verifier, {"max_steps": 1}).updates == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation.documents": 12}, "leaves documents to train on"),
        ({"validation.metric": "tau"}, "verifier and prompts"),
        ({"tracker.name": "paper"}, "there is no tracker 'paper'"),
    ],
)
def test_settings_that_do_not_fit(
    changes: dict[str, Any],
    message: str,
    verifier: Verifier,
    store: HiddenStateStore,
    tmp_path: pathlib.Path,
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", store, verifier, changes)
    assert not (tmp_path / "run").exists()


def test_a_store_that_does_not_fit(verifier: Verifier, tmp_path: pathlib.Path) -> None:
    store = make_store(tmp_path / "store", verifier, documents=4)
    draft = make_draft("eagle3", verifier)
    objective = make_objective(draft, verifier)
    narrow = HiddenStateStore(
        store.directory, store.index.model_copy(update={"hidden_size": 16}), store.layer_ids
    )
    with pytest.raises(ValueError, match=r"width 16; the draft was made for .* width 32"):
        train(draft, objective, narrow, settings_of(), tmp_path / "run")
    index = json.loads((tmp_path / "store/index.json").read_text())
    index["layer_ids"] = [1, 2, 4]
    (tmp_path / "store/index.json").write_text(json.dumps(index))
    fewer = HiddenStateStore.open(tmp_path / "store")
    with pytest.raises(ValueError, match=r"\[1, 2, 3, 4\] are wanted"):
        train(draft, objective, fewer, settings_of(), tmp_path / "run", verifier=verifier)


def test_nothing_to_learn(
    verifier: Verifier, store: HiddenStateStore, tmp_path: pathlib.Path
) -> None:
    (shard,) = store.index.shards
    masked = shard.model_copy(update={"learnable": [0] * len(shard.documents)})
    index = store.index.model_copy(update={"shards": [masked]})
    (tmp_path / "index.json").write_text(index.model_dump_json())
    name = "shard-00000.safetensors"
    (tmp_path / name).symlink_to(store.directory / name)
    with pytest.raises(ValueError, match="has a learnable token"):
        run(tmp_path / "run", HiddenStateStore.open(tmp_path), verifier)
