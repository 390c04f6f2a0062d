"""The tensors of a draft's directory: read with everything checked, and written.

Shapes and types come first, from the headers, and everything that does not fit the model is in ONE
error, before any tensor is read: who converts or trains a draft sees at once how far off it is.

Writing makes a file of its own of each tensor, so that tensors that share memory keep their names.
It is atomic if the directory is: see :func:`speculators.atomic.atomic_directory`.
"""

import dataclasses
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from speculators.models.checkpoint_files import (
    SAFETENSORS,
    CheckpointError,
    StoredTensor,
    checkpoint_error,
    opened,
)

__all__ = ["CheckpointError", "TensorSpec", "read_tensors", "tensor_shapes", "write_tensors"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """What a model expects of a tensor.

    Attributes:
        shape: its shape.
        dtype: ``"float"`` for float16, bfloat16, float32 and float64; else the one that it must be.
    """

    shape: tuple[int, ...]
    dtype: Literal["float"] | torch.dtype = "float"

    def accepts(self, dtype: torch.dtype | str) -> bool:
        """Whether a stored tensor of this type will do."""
        return dtype in _FLOATS if self.dtype == "float" else dtype == self.dtype


def read_tensors(
    directory: str | os.PathLike[str],
    expected: Mapping[str, TensorSpec],
    *,
    optional: Collection[str] = (),
    ignored: Collection[str] = (),
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Reads a draft's tensors, once all of them are known to fit.

    Safetensors first, pickles where there are none: see :func:`.checkpoint_files.opened`.

    Args:
        directory: a draft's directory.
        expected: what the model needs, by name.
        optional: names of ``expected`` that may be missing.
        ignored: names beyond ``expected`` that may be there; they are not read.
        dtype: what floating-point tensors are converted to; None keeps what is stored.

    Returns:
        The tensors of ``expected`` that are there, on the CPU.

    Raises:
        CheckpointError: there are no weights, a file is damaged or wants to run code, or tensors
            are missing, unexpected, or of another shape or type; all of these are named at once.
        NotADirectoryError: there is no such directory.
    """
    with opened(Path(directory)) as stored:
        problems = _misfits(stored, expected, optional, ignored)
        if problems:
            advice = "expected weights that were saved with this config.json"
            raise checkpoint_error(
                f"the weights in {directory} do not fit the model; {advice}", problems
            )
        tensors = {name: stored[name].read() for name in expected if name in stored}
    return {
        name: tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def tensor_shapes(directory: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in a draft's directory; of safetensors, only headers are read.

    Raises:
        CheckpointError: there are no weights, or a file is damaged or wants to run code.
        NotADirectoryError: there is no such directory.
    """
    with opened(Path(directory)) as stored:
        return {name: tensor.shape for name, tensor in stored.items()}


def write_tensors(
    directory: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    max_shard_size: int | str = "5GB",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes ``model.safetensors``, or shards and ``model.safetensors.index.json``.

    Args:
        directory: a directory without weights.
        tensors: what to write, on any device.
        max_shard_size: bytes of tensors in a file, such as ``"5GB"``; a larger tensor is alone.
        metadata: of each file; by default ``{"format": "pt"}``, which transformers asks for.

    Raises:
        FileExistsError: the directory has weights; a reader might take them for the new ones.
        ValueError: there are no tensors, or one has no data (device meta) or is sparse.
    """
    directory = Path(directory)
    if present := sorted(path.name for path in directory.glob("model*.safetensors*")):
        raise FileExistsError(
            f"{directory} has {', '.join(present)}; expected a directory without weights"
        )
    if not tensors:
        raise ValueError("there are no tensors to write; expected at least one")
    state = _own_memory(tensors)
    split = split_torch_state_dict_into_shards(state, max_shard_size=max_shard_size)
    for file_name, names in split.filename_to_tensors.items():
        path = directory / file_name
        path.touch()
        mode = path.stat().st_mode  # safetensors gives its files to their owner alone
        shard = {name: state[name] for name in names}
        save_file(shard, path, metadata=dict(metadata or {"format": "pt"}))
        path.chmod(mode)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2) + "\n"
        (directory / f"{SAFETENSORS}.index.json").write_text(text, encoding="utf-8")


def _own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, contiguous, none in a part of another's memory."""
    state, seen = {}, set()
    for name, tensor in tensors.items():
        if tensor.is_meta or tensor.layout != torch.strided:
            raise ValueError(
                f"tensor {name!r} is {tensor.layout} on device {tensor.device}; expected a dense "
                "tensor with data"
            )
        own = tensor.detach().contiguous()
        memory = own.untyped_storage()
        if memory.data_ptr() in seen or memory.nbytes() != own.nbytes:
            own = own.clone()
        seen.add(own.untyped_storage().data_ptr())
        state[name] = own
    return state


def _misfits(
    stored: Mapping[str, StoredTensor],
    expected: Mapping[str, TensorSpec],
    optional: Collection[str],
    ignored: Collection[str],
) -> list[str]:
    problems = []
    for name, spec in expected.items():
        found = stored.get(name)
        if found is None:
            if name not in optional:
                problems.append(f"{name}: missing; expected {spec.dtype} {list(spec.shape)}")
            continue
        if found.shape != spec.shape:
            problems.append(f"{name}: found shape {list(found.shape)}; expected {list(spec.shape)}")
        if not spec.accepts(found.dtype):
            problems.append(f"{name}: found type {found.dtype}; expected {spec.dtype}")
    for name in stored.keys() - expected.keys() - set(ignored):
        found = stored[name]
        problems.append(f"{name}: unexpected; found {found.dtype} {list(found.shape)}")
    return sorted(problems)
