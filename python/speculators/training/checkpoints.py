"""Checkpoints: what a run needs to go on bit for bit, in folders that are whole or not there.

``checkpoint-000123`` holds the draft after 123 updates as a directory like any draft's, the
optimizer's state, and ``trainer.json``: where the run stands and what it was made from. Noise and
data follow from the seed and these numbers, so no generator's state is kept. A folder is made under
another name and renamed when complete, and renamed back before it is removed: whenever a run is
killed, what is called a checkpoint is one.
"""

import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import pydantic
import torch

from speculators.atomic import atomic_directory
from speculators.configs.errors import validate
from speculators.data.artifact import StaleArtifactError, hash_json, read_manifest
from speculators.data.disk import check_free, full_disk
from speculators.models.speculator_model import SpeculatorModel
from speculators.models.weights import TensorSpec, read_tensors
from speculators.training.optimizers import Optimizer

MANIFEST = "trainer.json"
DRAFT = "draft"
OPTIMIZER = "optimizer.pt"
BEST = "best"
_NAME = re.compile(r"checkpoint-(\d{6,})")


class TrainerState(pydantic.BaseModel):
    """Where a run stands.

    Attributes:
        update: updates made.
        epoch: the number of the epoch in which the next update begins.
        batch: the number of its first batch.
        tokens: read so far.
        best_score: of the validations so far; more is better.
        best_loss: of the validation with that score.
        best_update: after which it was reached.
        stale_validations: since then.
        stopped: why the run is over; None while it goes on.
    """

    update: int = 0
    epoch: int = 0
    batch: int = 0
    tokens: int = 0
    best_score: float | None = None
    best_loss: float = 0.0
    best_update: int | None = None
    stale_validations: int = 0
    stopped: Literal["finished", "early stop"] | None = None


class _Manifest(pydantic.BaseModel):
    format_version: Literal[1] = 1
    content_hash: str
    made_from: dict[str, Any]
    state: TrainerState


class Checkpoints:
    """The checkpoints of a run.

    Args:
        directory: the run's folder; made if need be.
        made_from: everything that the result depends on, as plain values.
        keep_last: how many checkpoints stay.
    """

    def __init__(
        self, directory: str | os.PathLike[str], made_from: Mapping[str, Any], keep_last: int
    ) -> None:
        self.directory = pathlib.Path(directory)
        self.content_hash = hash_json(made_from)
        self._made_from = dict(made_from)
        self._keep_last = keep_last

    def all(self) -> list[pathlib.Path]:
        """The checkpoints that are there, the latest last."""
        if not self.directory.is_dir():
            return []
        named = ((_NAME.fullmatch(path.name), path) for path in self.directory.iterdir())
        return [path for _, path in sorted((int(m[1]), path) for m, path in named if m)]

    def clean(self) -> None:
        """Removes what killed runs left half done."""
        for pattern in (".checkpoint-*", f".{BEST}.*"):
            for leftover in self.directory.glob(pattern):
                shutil.rmtree(leftover)

    def check_space(self, draft: SpeculatorModel) -> None:
        """Refuses a run whose checkpoints would not fit.

        Raises:
            DiskSpaceError: the disk has too little space.
        """
        tensors = draft.state_dict().values()
        weights = sum(tensor.nbytes for tensor in tensors)
        trained = sum(p.nbytes for p in draft.parameters() if p.requires_grad)
        # The one being written is there beside the others, and an old best draft beside the new.
        new = self._keep_last + 1 - min(len(self.all()), self._keep_last)
        check_free(
            self.directory,
            new * (weights + 2 * trained) + 2 * weights,
            f"{self._keep_last + 1} checkpoints and the best draft",
            "free some space, choose another folder, or keep fewer checkpoints "
            "(checkpoints.keep_last)",
        )

    def save(
        self, state: TrainerState, draft: SpeculatorModel, optimizer: Optimizer
    ) -> pathlib.Path:
        """Writes a checkpoint, then removes the oldest.

        Raises:
            DiskSpaceError: the disk is full; earlier checkpoints stay.
        """
        path = self.directory / f"checkpoint-{state.update:06d}"
        manifest = _Manifest(content_hash=self.content_hash, made_from=self._made_from, state=state)
        with self._full_disk(), atomic_directory(path) as new:
            draft.save_pretrained(new / DRAFT)
            with (new / OPTIMIZER).open("wb") as file:
                torch.save(optimizer.state_dict(), file)
            (new / MANIFEST).write_text(manifest.model_dump_json(indent=2), encoding="utf-8")
        for old in self.all()[: -self._keep_last]:
            self._remove(old)
        return path

    def save_best(self, draft: SpeculatorModel) -> None:
        """Writes the draft to the folder ``best``, in place of the one before.

        Raises:
            DiskSpaceError: the disk is full; the one before stays.
        """
        with self._full_disk():
            draft.save_pretrained(self.directory / BEST, overwrite=True)

    def load(
        self, path: pathlib.Path, draft: SpeculatorModel, optimizer: Optimizer
    ) -> TrainerState:
        """Puts draft and optimizer where a checkpoint has them.

        Raises:
            StaleArtifactError: the checkpoint is of a run with other data or settings.
            ConfigError: its ``trainer.json`` is damaged.
            CheckpointError: its weights are.
        """
        manifest = validate(_Manifest, read_manifest(path, MANIFEST), str(path / MANIFEST))
        if manifest.content_hash != self.content_hash:
            changes = "\n  ".join(_differences(manifest.made_from, self._made_from))
            raise StaleArtifactError(
                f"{path} is of a run made from content {manifest.content_hash}; the data and "
                f"settings given now have content {self.content_hash}:\n  {changes}\nGo on with "
                "the same ones, or begin another run in another folder, from this one's draft"
            )
        own = draft.state_dict()
        expected = {
            name: TensorSpec(tuple(t.shape), "float" if t.is_floating_point() else t.dtype)
            for name, t in own.items()
        }
        draft.load_state_dict(read_tensors(path / DRAFT, expected))
        state = torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state)
        return manifest.state

    def _remove(self, path: pathlib.Path) -> None:
        """Takes its name from a checkpoint first, so that no half of one has it."""
        aside = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=self.directory))
        path.replace(aside)
        shutil.rmtree(aside)

    def _full_disk(self) -> Any:
        return full_disk(
            f"{self.directory} keeps its earlier checkpoints; free some space and resume"
        )


def _differences(
    before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> Iterator[str]:
    """One line for each plain value that differs."""
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            yield f"{prefix}{name}: {old!r} there, {new!r} now"
