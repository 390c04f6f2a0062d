"""The files that hold a draft's tensors, opened without trusting them.

A checkpoint is a stranger's file. A pickle is opened with ``weights_only``, which refuses to run
code, and a file that an index names must lie in the directory. Only names are checked for that: in
the Hub's cache every file is a link to somewhere else. What the index and the headers say must
agree, because a reader that trusts one of them gets tensors that the other does not have.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SAFETENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"

_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
}


class CheckpointError(ValueError):
    """Weights that cannot be read, or do not fit the model; the message lists all that is wrong."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in an open file.

    Attributes:
        shape: as the header has it.
        dtype: the type; the file's own word where no draft has a use for it.
        read: reads the tensor, to the CPU.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | str
    read: Callable[[], Tensor]


@contextlib.contextmanager
def opened(directory: Path) -> Iterator[dict[str, StoredTensor]]:
    """Opens a draft's weights; the files stay open, so what was checked is what is read.

    Args:
        directory: with ``model.safetensors``; or ``model.safetensors.index.json`` and its shards,
            ``pytorch_model.bin``, ``pytorch_model.bin.index.json`` and its shards, or one ``*.pt``,
            the first of these that is there.

    Yields:
        Every tensor, by name. Of safetensors, only headers have been read; of pickles, all.

    Raises:
        CheckpointError: there are no weights, a file is damaged or wants to run code, or an index
            names a file outside the directory or does not agree with its files.
        NotADirectoryError: there is no such directory.
    """
    if not directory.is_dir():
        raise NotADirectoryError(f"{directory} is not a directory; expected a draft's directory")
    with contextlib.ExitStack() as files:
        yield _stored(directory, files)


def _stored(directory: Path, files: contextlib.ExitStack) -> dict[str, StoredTensor]:
    for single, suffix in ((SAFETENSORS, ".safetensors"), (PICKLE, ".bin")):
        if (directory / single).is_file():
            return _open(directory / single, files)
        if (directory / f"{single}.index.json").is_file():
            return _open_shards(directory / f"{single}.index.json", suffix, files)
    pickles = sorted(directory.glob("*.pt"))
    if len(pickles) == 1:
        return _open(pickles[0], files)
    names = ", ".join(sorted(path.name for path in directory.iterdir()))
    raise CheckpointError(
        f"{directory} has {'no weights' if not pickles else 'several files of weights'}: found "
        f"{names or 'nothing'}; expected {SAFETENSORS}, {SAFETENSORS}.index.json with its shards, "
        f"{PICKLE} or one *.pt"
    )


def _open_shards(path: Path, suffix: str, files: contextlib.ExitStack) -> dict[str, StoredTensor]:
    shards: dict[str, set[str]] = {}
    for name, file_name in _weight_map(path).items():
        shards.setdefault(file_name, set()).add(name)
    problems = []
    for file_name in shards:
        # As Windows sees it, / and \ and a drive's letter all lead elsewhere.
        plain = PureWindowsPath(file_name).name == file_name and file_name.isprintable()
        if not plain or file_name == ".." or not file_name.endswith(suffix):
            problems.append(f"{file_name!r}: expected the plain name of a {suffix} file beside it")
        elif not (path.parent / file_name).is_file():
            problems.append(f"{file_name}: missing; copy or download it again")
    if problems:
        raise checkpoint_error(f"{path} names files that cannot be read", problems)
    stored: dict[str, StoredTensor] = {}
    for file_name, names in shards.items():
        shard = _open(path.parent / file_name, files)
        problems += [f"{name}: not in {file_name}" for name in names - shard.keys()]
        problems += [f"{name}: in {file_name} only" for name in shard.keys() - names]
        stored |= shard
    if problems:
        raise checkpoint_error(
            f"{path} does not agree with its files; write them anew", sorted(problems)
        )
    return stored


def _weight_map(path: Path) -> dict[str, str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); write the weights anew") from None
    found = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise CheckpointError(f"{path} has no weight_map; expected tensors' names and their files")
    return found


def _open(path: Path, files: contextlib.ExitStack) -> dict[str, StoredTensor]:
    return _open_safetensors(path, files) if path.suffix == ".safetensors" else _open_pickle(path)


def _open_safetensors(path: Path, files: contextlib.ExitStack) -> dict[str, StoredTensor]:
    try:
        opened = files.enter_context(safe_open(path, framework="pt"))
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); expected a whole safetensors file. Download or copy it "
            "again (of a git clone, git lfs pull fetches the files)"
        ) from None
    stored = {}
    for name in opened.keys():  # noqa: SIM118 - it is no mapping
        header = opened.get_slice(name)
        word = header.get_dtype()
        stored[name] = StoredTensor(
            tuple(header.get_shape()),
            _TYPES.get(word, word),
            functools.partial(opened.get_tensor, name),
        )
    return stored


def _open_pickle(path: Path) -> dict[str, StoredTensor]:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a pickle's opcodes can fail in any way
        raise CheckpointError(
            f"{path} cannot be read as tensors alone ({_reason(error)}), and nothing that a "
            "checkpoint wants is run; expected a whole file with a dict of tensors, or safetensors"
        ) from None  # torch's own message tells how to run it all the same
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}; expected a dict of tensors"
        )
    others = [
        f"{name!r}: {type(value).__name__}"
        for name, value in content.items()
        if not isinstance(name, str)
        or not isinstance(value, Tensor)
        or value.layout != torch.strided
    ]
    if others:
        raise checkpoint_error(f"{path} does not hold dense tensors alone, by name", others)

    def own(tensor: Tensor) -> Tensor:
        return tensor.detach().clone(memory_format=torch.contiguous_format)

    return {
        name: StoredTensor(tuple(tensor.shape), tensor.dtype, functools.partial(own, tensor))
        for name, tensor in content.items()
    }


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    telling = [line for line in lines if "GLOBAL" in line or "Unsupported" in line]
    return (telling or lines)[0].partition(". Please")[0].strip()


def checkpoint_error(summary: str, problems: list[str]) -> CheckpointError:
    """One error for all the problems, each in a line of its own."""
    return CheckpointError("\n  ".join([f"{summary}:", *problems]))
