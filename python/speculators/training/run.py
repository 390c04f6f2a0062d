"""``train``: checks that draft, data and settings fit, and puts the parts of a run together.

All that can be wrong is looked at before the first update, and before anything is written.
"""

import dataclasses
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any, Literal

import torch

from speculators.data.generate import Progress
from speculators.data.loader import PackedBatches, split
from speculators.data.store import HiddenStateStore
from speculators.models.speculator_model import SpeculatorModel
from speculators.models.verifier.verifier import Verifier
from speculators.training.checkpoints import BEST, DRAFT, Checkpoints, TrainerState
from speculators.training.optimizers import OPTIMIZERS, Parameters
from speculators.training.schedules import Schedule
from speculators.training.settings import TrainingSettings
from speculators.training.trackers import open_tracker
from speculators.training.trainer import Trainer
from speculators.training.update import Objective, Updater
from speculators.training.update_batches import UpdateBatches
from speculators.training.validation import Validator, real_drafting, validation_prompts


@dataclasses.dataclass(frozen=True)
class TrainingReport:
    """What a run did.

    Attributes:
        directory: the run's folder.
        draft: the directory of the draft to use: the best one where there was a validation.
        checkpoint: the last checkpoint.
        stopped: ``"finished"`` or ``"early stop"``.
        updates: made in all.
        resumed_from: updates that were made before this call.
        tokens: read in all.
        metrics: the last numbers of training and of validation.
        best_score: of the best validation, more is better; None without one.
        best_update: after which it was.
        seconds: what this call took.
    """

    directory: pathlib.Path
    draft: pathlib.Path
    checkpoint: pathlib.Path
    stopped: str
    updates: int
    resumed_from: int
    tokens: int
    metrics: dict[str, float]
    best_score: float | None
    best_update: int | None
    seconds: float


def train(
    draft: SpeculatorModel,
    objective: Objective,
    store: HiddenStateStore,
    settings: TrainingSettings,
    output_dir: str | os.PathLike[str],
    *,
    verifier: Verifier | None = None,
    resume: bool | Literal["auto"] = False,
    made_from: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> TrainingReport:
    """Trains a draft.

    Args:
        draft: with its verifier, or that one's parts, attached, on the device to train on. Its
            weights become float32 and are changed in place; at the end they are the last ones.
        objective: made for this draft.
        store: the verifier's hidden states.
        settings: of the run.
        output_dir: the run's folder.
        verifier: for validation by real drafting, on the same device; without it there is none.
        resume: True goes on from the last checkpoint in the folder, ``"auto"`` does where there is
            one, False wants a folder without.
        made_from: what else the result depends on, such as where the draft's first weights come
            from; plain values. A run is resumed only with the same ones.
        progress: shows the progress; None for silence.

    Raises:
        FileExistsError: the folder has checkpoints, and ``resume`` is False.
        FileNotFoundError: it has none, and ``resume`` is True.
        StaleArtifactError: its last checkpoint is of a run with other data or settings.
        RuntimeError: this is one of several processes.
        ValueError: draft, objective, store and settings do not fit each other.
        DiskSpaceError: the disk is full, or would be.
        KeyboardInterrupt: see :meth:`Trainer.run`, which has some more.
    """
    begin = time.monotonic()
    _one_process()
    draft.to(torch.float32)
    if verifier is not None:
        draft.attach_verifier(verifier)
    store = _with_needed_streams(draft, objective, store, verifier)
    all_of_it = {**_made_from(draft, objective, store, settings), "caller": dict(made_from or {})}
    checkpoints = Checkpoints(output_dir, all_of_it, settings.checkpoints.keep_last)
    latest = _to_resume(checkpoints, resume)
    documents, held_back = documents_of(store, settings)
    validator = _validator(draft, objective, store, settings, held_back, verifier)
    parameters = Parameters.of(draft)
    optimizer = OPTIMIZERS[settings.optimizer.name](parameters, settings.optimizer)
    checkpoints.clean()
    state = TrainerState()
    if latest is not None:
        state = checkpoints.load(latest, draft, optimizer)
    resumed_from = state.update
    checkpoints.check_space(draft)
    batches = UpdateBatches(_packed(store, settings, documents), settings.accumulation)
    total = batches.total(settings.epochs, settings.max_steps)
    config = {"training": settings.model_dump(mode="json"), **_made_from_objective(objective)}
    tracker = open_tracker(settings.tracker, checkpoints.directory, config, state.update)
    trainer = Trainer(
        draft=draft,
        updater=Updater(objective, parameters.all, optimizer, settings),
        batches=batches,
        schedule=Schedule(settings.schedule, total),
        total=total,
        checkpoints=checkpoints,
        state=state,
        settings=settings,
        validator=validator,
        tracker=tracker,
        progress=progress,
    )
    try:
        trainer.run()
    finally:
        tracker.close()
        draft.eval()
    return _report(trainer, checkpoints, resumed_from, time.monotonic() - begin)


def _report(
    trainer: Trainer, checkpoints: Checkpoints, resumed_from: int, seconds: float
) -> TrainingReport:
    state = trainer.state
    last = checkpoints.all()[-1]
    best = checkpoints.directory / BEST
    return TrainingReport(
        directory=checkpoints.directory,
        draft=best if state.best_update is not None and best.is_dir() else last / DRAFT,
        checkpoint=last,
        stopped=str(state.stopped),
        updates=state.update,
        resumed_from=resumed_from,
        tokens=state.tokens,
        metrics=trainer.metrics,
        best_score=state.best_score,
        best_update=state.best_update,
        seconds=seconds,
    )


def _one_process() -> None:
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size != "1":
        raise RuntimeError(
            f"WORLD_SIZE is {world_size}: this version trains in one process; start it without "
            "torchrun, or with --nproc-per-node 1"
        )


def _with_needed_streams(
    draft: SpeculatorModel,
    objective: Objective,
    store: HiddenStateStore,
    verifier: Verifier | None,
) -> HiddenStateStore:
    """The store, reading just the residual streams that are needed."""
    if store.hidden_size != draft.verifier_hidden_size:
        raise ValueError(
            f"{store.directory} has hidden states of width {store.hidden_size}; the draft was made "
            f"for a verifier of width {draft.verifier_hidden_size}"
        )
    num_layers = max(store.layer_ids) if verifier is None else verifier.num_layers
    wanted = objective.capture_layers(num_layers)
    return HiddenStateStore.open(store.directory, layer_ids=wanted)


def _made_from_objective(objective: Objective) -> dict[str, Any]:
    return {"objective": objective.settings.model_dump(mode="json")}


def _made_from(
    draft: SpeculatorModel,
    objective: Objective,
    store: HiddenStateStore,
    settings: TrainingSettings,
) -> dict[str, Any]:
    """What the result depends on, but for the weights that a run begins with."""
    # Neither what saving writes down nor where the verifier lies changes anything.
    written = {"dtype", "torch_dtype", "transformers_version"}
    config = {name: v for name, v in draft.config.to_dict().items() if name not in written}
    drafting = {n: v for n, v in config["speculators_config"].items() if n != "verifier"}
    return {
        "store": store.content_hash,
        "draft": {**config, "speculators_config": drafting},
        "training": settings.deciding(),
        **_made_from_objective(objective),
    }


def _to_resume(checkpoints: Checkpoints, resume: bool | Literal["auto"]) -> pathlib.Path | None:
    found = checkpoints.all()
    if found and resume is False:
        raise FileExistsError(
            f"{checkpoints.directory} has a run, up to {found[-1].name}; resume it, or choose "
            "another folder"
        )
    if not found and resume is True:
        raise FileNotFoundError(
            f"{checkpoints.directory} has no checkpoint to resume from; expected the folder of a "
            "run, or no resuming"
        )
    return found[-1] if found else None


def documents_of(
    store: HiddenStateStore, settings: TrainingSettings
) -> tuple[list[int], list[int]]:
    """The documents to train on, and those to validate with."""
    count = settings.validation.documents
    held = settings.validation.fraction if count is None else count
    documents, held_back = split(store, held, settings.seed)
    if not any(store.learnable[number] for number in documents):
        raise ValueError(
            f"none of the {len(documents)} documents of {store.directory} to train on has a "
            "learnable token; prepare the data with the assistant's turns marked"
        )
    return documents, held_back


def _packed(
    store: HiddenStateStore, settings: TrainingSettings, documents: list[int]
) -> PackedBatches:
    return PackedBatches(
        store,
        row_tokens=settings.row_tokens,
        rows_per_batch=settings.rows_per_batch,
        seed=settings.seed,
        documents=documents,
        prefetch=settings.prefetch,
    )


def _validator(
    draft: SpeculatorModel,
    objective: Objective,
    store: HiddenStateStore,
    settings: TrainingSettings,
    documents: list[int],
    verifier: Verifier | None,
) -> Validator | None:
    if not documents:
        return None
    wanted = settings.validation
    drafting = None
    if verifier is not None and wanted.prompts:
        positions = getattr(verifier.config, "max_position_embeddings", None)
        longest = settings.row_tokens
        if positions is not None:
            longest = min(longest, positions - wanted.max_new_tokens)
        prompts = validation_prompts(store, documents, wanted.prompts, longest)
        if prompts:
            drafting = real_drafting(verifier, prompts, wanted.max_new_tokens)
    batches = _packed(store, settings, documents)
    return Validator(draft, objective, batches, drafting, wanted.metric, settings.autocast)
