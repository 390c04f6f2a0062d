"""``HiddenStateStore``: the verifier's residual streams of many documents, on a disk.

A folder with ``index.json`` and ``shard-00000.safetensors``, ... A shard holds the tokens of its
documents one after the other (``input_ids``, ``loss_mask``, ``hidden_states``), ``offsets`` where
documents begin and end, and ``documents``, their numbers in the dataset: they are stored in the
order in which they were computed. The index has all that can be asked without reading a tensor.

A row of ``hidden_states`` has all streams of a token side by side, in the order of the index's
``layer_ids``; in int8 and float8 (e4m3) ``scales`` has a number for each of them, as
``speculators.ops.hidden_state_packing`` defines it. In format 1, which is still read and finished,
each stream is a tensor of its own, ``hidden_states.K``.

A shard is complete or not there, and the index names only complete ones. So a writer that is killed
goes on after the last shard, and a reader maps files instead of reading them: a document costs the
pages that it lies on.
"""

import collections
import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pydantic
import torch
from safetensors import safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from speculators.atomic import atomic_file
from speculators.configs.errors import validate
from speculators.data.artifact import read_manifest
from speculators.ops.hidden_state_packing import PackedStates, pack, unpack, unpack_into

INDEX = "index.json"
DTypeName = Literal["bfloat16", "float32", "int8", "fp8"]

# No float16: residual streams of common models have entries beyond its largest number, 65504.
_DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
_WITH_SCALES = {"int8", "fp8"}
_OPEN_SHARDS = 64


def bytes_per_token(layers: int, hidden_size: int, dtype: DTypeName) -> int:
    """What a token takes in a shard: the streams and their scales, its id and its loss mask."""
    scale = 4 if dtype in _WITH_SCALES else 0
    return layers * (hidden_size * _DTYPES[dtype].itemsize + scale) + 4 + 1


class Shard(pydantic.BaseModel):
    """One file: its documents' numbers, tokens and learnable tokens, and its size."""

    documents: list[int]
    lengths: list[int]
    learnable: list[int]
    file_bytes: int


class StoreIndex(pydantic.BaseModel):
    """``index.json``. ``made_from`` is what ``content_hash`` was computed from."""

    format_version: Literal[1, 2] = 2
    content_hash: str
    made_from: dict[str, Any]
    verifier: str
    layer_ids: list[int]
    hidden_size: int
    dtype: DTypeName
    num_documents: int
    shards: list[Shard] = []
    complete: bool = False

    @property
    def stored(self) -> list[int]:
        """The numbers of the stored documents, in the order of their storing."""
        return [number for shard in self.shards for number in shard.documents]


def read_index(directory: str | os.PathLike[str]) -> StoreIndex:
    """Reads ``index.json`` and looks whether the shards it names are there.

    Raises:
        FileNotFoundError: the folder is absent.
        FileExistsError: the folder has no index.
        ConfigError: the index is damaged, or of another format version.
        ValueError: a shard is missing or has another size, or documents are not as they must be.
    """
    directory = pathlib.Path(directory)
    index = validate(StoreIndex, read_manifest(directory, INDEX), str(directory / INDEX))
    for number, shard in enumerate(index.shards):
        path = directory / shard_name(number)
        size = path.stat().st_size if path.is_file() else None
        if size != shard.file_bytes:
            raise ValueError(
                f"{path} has {'no file' if size is None else f'{size} bytes'}; {INDEX} expects "
                f"{shard.file_bytes} bytes: copy the store again, or generate it anew"
            )
    stored = index.stored
    unique = len(set(stored)) == len(stored) and set(stored) <= set(range(index.num_documents))
    if not unique or (index.complete and len(stored) != index.num_documents):
        raise ValueError(
            f"{directory / INDEX} lists {len(stored)} documents ({len(set(stored))} different) of "
            f"{index.num_documents}; expected each once: generate the store anew"
        )
    return index


def shard_name(number: int) -> str:
    """The file name of a shard."""
    return f"shard-{number:05d}.safetensors"


def encode(index: StoreIndex, hidden_states: Mapping[int, Tensor]) -> dict[str, Tensor]:
    """The tensors that stand for a document's residual streams in a shard.

    Args:
        index: the store's.
        hidden_states: residual stream id to ``[L, H]``, any device and float dtype.

    Returns:
        Name in the shard to a tensor whose first dimension is L.
    """
    streams = [hidden_states[k] for k in index.layer_ids]
    dtype = functools.reduce(torch.promote_types, (states.dtype for states in streams))
    dtype = torch.float32 if dtype == torch.float64 else dtype
    packed = pack([states.to(dtype) for states in streams], dtype=_DTYPES[index.dtype])
    if index.format_version == 1:
        parts = packed.data.split(index.hidden_size, dim=1)
        return {f"hidden_states.{k}": part for k, part in zip(index.layer_ids, parts, strict=True)}
    tensors = {"hidden_states": packed.data}
    return tensors if packed.scales is None else tensors | {"scales": packed.scales}


def decode(
    index: StoreIndex, layer_ids: Sequence[int], read: Callable[[str], Tensor]
) -> dict[tuple[int, ...], PackedStates]:
    """The inverse of ``encode``, for some streams, which stay packed.

    Args:
        index: the store's.
        layer_ids: the streams wanted.
        read: gives the wanted rows of a shard's tensor by name.

    Returns:
        Streams that lie side by side, and their packed rows.
    """
    if index.format_version == 1:
        return {(k,): PackedStates(read(f"hidden_states.{k}")) for k in layer_ids}
    if not layer_ids:
        return {}
    scales = read("scales") if index.dtype in _WITH_SCALES else None
    packed = PackedStates(read("hidden_states"), scales)
    if list(layer_ids) == index.layer_ids:
        return {tuple(layer_ids): packed}
    places = {k: place for place, k in enumerate(index.layer_ids)}
    return {(k,): packed.layer(places[k], len(places)) for k in layer_ids}


@dataclasses.dataclass(frozen=True)
class Document:
    """One document of a store.

    Attributes:
        input_ids: int64 ``[L]``.
        loss_mask: bool ``[L]``, true where the token is to be learned.
        hidden_states: residual stream id to ``[L, H]``, in the store's dtype. Without scales they
            map the file: what is written into them is lost.
    """

    input_ids: Tensor
    loss_mask: Tensor
    hidden_states: dict[int, Tensor]


@dataclasses.dataclass(frozen=True)
class StoredDocument:
    """One document as it lies in its shard, mapped.

    Attributes:
        input_ids: int64 ``[L]``.
        loss_mask: bool ``[L]``, true where the token is to be learned.
        packed: residual streams that lie side by side, and their packed rows.
    """

    input_ids: Tensor
    loss_mask: Tensor
    packed: dict[tuple[int, ...], PackedStates]

    def unpack(self, dtype: torch.dtype) -> dict[int, Tensor]:
        """Residual stream id to ``[L, H]``; those without scales as they lie in the file."""
        states: dict[int, Tensor] = {}
        for layer_ids, packed in self.packed.items():
            if packed.scales is None:
                parts: Sequence[Tensor] = packed.data.chunk(len(layer_ids), dim=1)
            else:
                parts = unpack(packed, len(layer_ids), dtype=dtype)
            states |= zip(layer_ids, parts, strict=True)
        return states

    def unpack_into(self, outputs: Mapping[int, Tensor], first_row: int) -> None:
        """Puts the residual streams into rows of larger tensors.

        Args:
            outputs: residual stream id to ``[B, T, H]`` or ``[N, H]``.
            first_row: where the document begins, rows counted through the batch.
        """
        rows = torch.arange(first_row, first_row + len(self.input_ids))
        for layer_ids, packed in self.packed.items():
            unpack_into([outputs[k] for k in layer_ids], packed, rows)


class HiddenStateStore:
    """Reads a store; ``store[i]`` is document i of the dataset that it was made from.

    Attributes:
        directory: where it lies.
        index: what ``index.json`` says.
        layer_ids: the residual streams that are read.
        lengths: tokens of each document.
        learnable: learnable tokens of each document.
    """

    def __init__(
        self, directory: pathlib.Path, index: StoreIndex, layer_ids: tuple[int, ...]
    ) -> None:
        self.directory = directory
        self.index = index
        self.layer_ids = layer_ids
        self.lengths: Sequence[int] = [0] * index.num_documents
        self.learnable: Sequence[int] = [0] * index.num_documents
        self._places = [(0, 0)] * index.num_documents  # (shard, first row in it)
        for number, shard in enumerate(index.shards):
            row = 0
            listed = zip(shard.documents, shard.lengths, shard.learnable, strict=True)
            for document, length, learnable in listed:
                self.lengths[document] = length
                self.learnable[document] = learnable
                self._places[document] = (number, row)
                row += length
        self._files: collections.OrderedDict[int, Any] = collections.OrderedDict()

    @classmethod
    def open(
        cls, directory: str | os.PathLike[str], *, layer_ids: Iterable[int] | None = None
    ) -> "HiddenStateStore":
        """Opens a complete store.

        Args:
            directory: what ``generate`` wrote.
            layer_ids: the residual streams to read, where not all are wanted.

        Raises:
            ValueError: the store is not complete or damaged, or lacks a stream.
            FileNotFoundError: the folder is absent.
            FileExistsError: the folder has no index.
        """
        directory = pathlib.Path(directory)
        index = read_index(directory)
        if not index.complete:
            raise ValueError(
                f"{directory} has {len(index.stored)} of {index.num_documents} documents: its "
                "generation was interrupted; run generate with the same settings to go on"
            )
        wanted = tuple(index.layer_ids if layer_ids is None else layer_ids)
        if not set(wanted) <= set(index.layer_ids):
            raise ValueError(
                f"{directory} has the residual streams {index.layer_ids}; {list(wanted)} are "
                "wanted: generate a store with these layer ids"
            )
        return cls(directory, index, wanted)

    @property
    def content_hash(self) -> str:
        """The hash of what the store was made from."""
        return self.index.content_hash

    @property
    def hidden_size(self) -> int:
        """H, the width of the residual streams."""
        return self.index.hidden_size

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the residual streams as they are read: of those with scales bfloat16."""
        return torch.bfloat16 if self.index.dtype in _WITH_SCALES else _DTYPES[self.index.dtype]

    def __len__(self) -> int:
        return self.index.num_documents

    def __getitem__(self, number: int) -> Document:
        return self.read(number)

    def read(self, number: int, max_tokens: int | None = None) -> Document:
        """A document, or its first ``max_tokens`` tokens.

        Raises:
            IndexError: there is no such document.
        """
        stored = self.stored(number, max_tokens)
        return Document(stored.input_ids, stored.loss_mask, stored.unpack(self.dtype))

    def stored(self, number: int, max_tokens: int | None = None) -> StoredDocument:
        """A document, or its first ``max_tokens`` tokens, with its states still packed.

        Raises:
            IndexError: there is no such document.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"document {number} of {len(self)}; expected 0 to {len(self) - 1}")
        shard, begin = self._places[number]
        length = self.lengths[number]
        rows = slice(begin, begin + (length if max_tokens is None else min(length, max_tokens)))
        file = self._file(shard)

        def read(name: str) -> Tensor:
            tensor: Tensor = file.get_slice(name)[rows]
            return tensor

        packed = decode(self.index, self.layer_ids, read)
        return StoredDocument(read("input_ids").long(), read("loss_mask"), packed)

    def learnable_ids(self) -> Iterator[npt.NDArray[np.int64]]:
        """All ids that are to be learned, document by document; no states are read."""
        tokens_only = HiddenStateStore(self.directory, self.index, ())
        for number in range(len(self)):
            document = tokens_only[number]
            yield document.input_ids[document.loss_mask].numpy()

    def _file(self, shard: int) -> Any:
        """The mapped shard; as many as a process may hold are kept, the last used ones."""
        if shard not in self._files:
            path = self.directory / shard_name(shard)
            self._files[shard] = safe_open(path, framework="pt")
            if len(self._files) > _OPEN_SHARDS:
                self._files.popitem(last=False)
        self._files.move_to_end(shard)
        return self._files[shard]


class StoreWriter:
    """Writes a store, shard by shard; what is added is on the disk after ``write_shard``.

    Args:
        directory: the store's folder; leftovers of a writer that was killed are removed.
        index: a new index, or that of the store to continue.
        replaces: whether the folder has another store. It stays whole until the first shard of the
            new one is to be written, so that a verifier that cannot be read costs nothing.
    """

    def __init__(
        self, directory: str | os.PathLike[str], index: StoreIndex, *, replaces: bool = False
    ) -> None:
        self.directory = pathlib.Path(directory)
        self.index = index
        self._added: dict[str, list[Tensor]] = collections.defaultdict(list)
        self._documents: list[int] = []
        self._replaces = replaces
        if not replaces:
            self._begin()

    def add(
        self, number: int, input_ids: Tensor, loss_mask: Tensor, hidden_states: dict[int, Tensor]
    ) -> None:
        """Adds a document to the shard being made, in memory.

        Args:
            number: its number in the dataset.
            input_ids: integers ``[L]``.
            loss_mask: bool ``[L]``.
            hidden_states: residual stream id to ``[L, H]``, any device and float dtype.

        Raises:
            ValueError: a shape or the ids of the streams are not the store's, or a state is not
                finite.
        """
        length, width = len(input_ids), self.index.hidden_size
        if set(hidden_states) != set(self.index.layer_ids):
            raise ValueError(
                f"document {number} came with the residual streams {sorted(hidden_states)}; "
                f"expected {self.index.layer_ids}"
            )
        for k in self.index.layer_ids:
            states = hidden_states[k]
            if states.shape != (length, width) or loss_mask.shape != (length,):
                raise ValueError(
                    f"document {number} has {length} tokens, a loss mask {list(loss_mask.shape)} "
                    f"and residual stream {k} of {list(states.shape)}; expected [{length}] and "
                    f"[{length}, {width}]"
                )
        encoded = encode(self.index, hidden_states)
        self._check_finite(number, hidden_states, encoded.get("scales"))
        encoded |= {"input_ids": input_ids.int(), "loss_mask": loss_mask.bool()}
        for name, tensor in encoded.items():
            self._added[name].append(tensor.cpu())
        self._documents.append(number)

    def _check_finite(
        self, number: int, hidden_states: Mapping[int, Tensor], scales: Tensor | None
    ) -> None:
        """A scale is finite if its row is, and there are far fewer of them."""
        for place, k in enumerate(self.index.layer_ids):
            values = hidden_states[k] if scales is None else scales[:, place]
            if not bool(values.isfinite().all()):
                raise ValueError(
                    f"residual stream {k} of document {number} is not finite; a verifier in "
                    "float16 may overflow: load it in bfloat16 or float32"
                )

    def write_shard(self) -> None:
        """Writes what was added as one shard, then the index that names it."""
        if self._replaces:
            _remove_store(self.directory)
            self._replaces = False
            self._begin()
        masks = self._added["loss_mask"]
        lengths = [len(mask) for mask in masks]
        learnable = [int(mask.sum()) for mask in masks]
        tensors = {
            "documents": torch.tensor(self._documents),
            "offsets": torch.tensor([0, *lengths]).cumsum(0),
        }
        while self._added:  # one after the other, so that a shard is in memory about once
            name, parts = self._added.popitem()
            tensors[name] = torch.cat(parts)
        path = self.directory / shard_name(len(self.index.shards))
        with atomic_file(path) as file:
            file.write(to_safetensors(tensors, {"content_hash": self.index.content_hash}))
        shard = Shard(
            documents=self._documents,
            lengths=lengths,
            learnable=learnable,
            file_bytes=path.stat().st_size,
        )
        self._documents = []
        self.index.shards.append(shard)
        self._write_index()

    def finish(self) -> None:
        """Marks the store as complete."""
        self.index.complete = True
        self._write_index()

    def _begin(self) -> None:
        for leftover in self.directory.glob(".shard-*"):
            leftover.unlink()
        self._write_index()

    def _write_index(self) -> None:
        with atomic_file(self.directory / INDEX, "w") as file:
            file.write(self.index.model_dump_json())


def _remove_store(directory: pathlib.Path) -> None:
    """Removes a store, its index first, so that what is left is never taken for one."""
    (directory / INDEX).unlink()
    for number in itertools.count():
        shard = directory / shard_name(number)
        if not shard.exists():
            break
        shard.unlink()
