"""Rows out of JSON, JSON lines, Parquet and datasets, each with the place where it stands.

A row that cannot be read is handed on with the reason, since one bad line in a million is for the
caller to judge. A file that cannot be read beyond some point is an error: what follows is lost.
Rows are read as they are asked for; of a ``.json`` file its text is held, of the rest a batch.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

import datasets
import pyarrow.parquet

from speculators.data import artifact

SUFFIXES = (".json", ".jsonl", ".parquet")
ROW_KEYS = frozenset({"messages", "conversations", "conversation", "text", "input_ids"})
_SAVED = ("dataset_info.json", "dataset_dict.json")  # what save_to_disk leaves
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
_BATCH = 1000
_DECODER = json.JSONDecoder()
_WHITESPACE = re.compile(r"[ \t\n\r]*")


@dataclasses.dataclass(frozen=True)
class RawRow:
    """One row as it was read.

    Attributes:
        file: the file's path, or a dataset's id.
        line: the line it begins on, from 1; in Parquet and datasets the row's number, from 1.
        value: what stands there, None if it cannot be read.
        problem: why it cannot be read, else None.
    """

    file: str
    line: int
    value: Any = None
    problem: str | None = None


class RowSource:
    """The rows of files or of one dataset, and the hash of their content.

    Args:
        data: a file, a folder of files, a folder that ``datasets`` saved, the id of a dataset on
            the Hub as ``owner/name`` or ``owner/name:config``, or several of these.
        split: the split to take where there are several.

    Raises:
        FileNotFoundError: a path does not exist, or a folder holds none of the known files.
        ValueError: a file is of another kind, or a dataset has no such split.
    """

    def __init__(
        self, data: artifact.Path | Iterable[artifact.Path], *, split: str = "train"
    ) -> None:
        named = [data] if isinstance(data, (str, os.PathLike)) else list(data)
        self._parts = [part for item in named for part in _resolve(os.fspath(item), split)]

    def __iter__(self) -> Iterator[RawRow]:
        for name, part in self._parts:
            if isinstance(part, datasets.Dataset):
                for line, row in enumerate(part, start=1):
                    yield RawRow(name, line, _without_nulls(row))
            elif part.suffix == ".parquet":
                yield from _parquet_rows(part)
            else:
                yield from _json_lines(part) if part.suffix == ".jsonl" else _json_rows(part)

    def content_hash(self) -> str:
        """SHA-256 of all that is read; it reads all files once."""
        return artifact.hash_json([_content(part) for _, part in self._parts])


def _resolve(name: str, split: str) -> list[tuple[str, pathlib.Path | datasets.Dataset]]:
    path = pathlib.Path(name)
    if path.is_dir() and any((path / saved).exists() for saved in _SAVED):
        return [(name, _one_split(datasets.load_from_disk(name), name, split))]
    if path.is_dir():
        files = sorted(child for child in path.iterdir() if child.suffix in SUFFIXES)
        if not files:
            raise FileNotFoundError(f"{path} holds no file ending in {', '.join(SUFFIXES)}")
        return [(str(file), file) for file in files]
    if path.suffix in SUFFIXES or path.exists():
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path} is of an unknown kind; expected {', '.join(SUFFIXES)}")
        return [(name, path)]
    if not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"{name} does not exist, and is no id of a dataset (owner/name)")
    # datasets from 4.0 on runs no code of a repository, and has no option to.
    repository, _, config = name.partition(":")
    dataset = datasets.load_dataset(repository, config or None, split=split)
    return [(name, _one_split(dataset, name, split))]


def _one_split(dataset: Any, name: str, split: str) -> datasets.Dataset:
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise ValueError(f"{name} has no split {split!r}; it has {', '.join(dataset)}")
        dataset = dataset[split]
    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(f"{name} is a {type(dataset).__name__}; expected a datasets.Dataset")
    return dataset


def _content(part: pathlib.Path | datasets.Dataset) -> str:
    if isinstance(part, pathlib.Path):
        return artifact.hash_files([part])
    if part.cache_files:
        return artifact.hash_files(file["filename"] for file in part.cache_files)
    return artifact.hash_json(part._fingerprint)  # noqa: SLF001 - has no public name


def _parquet_rows(path: pathlib.Path) -> Iterator[RawRow]:
    line = 0
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=_BATCH):
            for number in range(batch.num_rows):
                line += 1
                try:
                    row = batch.slice(number, 1).to_pylist()[0]
                except UnicodeDecodeError as error:
                    yield RawRow(str(path), line, problem=f"invalid UTF-8: {error}")
                    continue
                yield RawRow(str(path), line, _without_nulls(row))


def _json_lines(path: pathlib.Path) -> Iterator[RawRow]:
    with path.open("rb") as file:
        for line, content in enumerate(file, start=1):
            try:
                text = content.decode("utf-8-sig" if line == 1 else "utf-8")
                if text.strip():
                    yield RawRow(str(path), line, json.loads(text))
            except UnicodeDecodeError as error:
                yield RawRow(str(path), line, problem=f"invalid UTF-8: {error}")
            except (ValueError, RecursionError) as error:
                yield RawRow(str(path), line, problem=f"invalid JSON: {error}")


def _json_rows(path: pathlib.Path) -> Iterator[RawRow]:
    """A list of rows, an object with one list of rows, one row, or JSON lines under that name."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        start = _skip(text, 0)
        if text[start : start + 1] != "[":
            value, end = _DECODER.raw_decode(text, start)
            if _skip(text, end) < len(text):
                yield from _json_lines(path)
                return
            inside = _rows_of(value)
            if inside is None:
                yield RawRow(str(path), text.count("\n", 0, start) + 1, value)
                return
            start = _find_member(text, start, inside)
        line, counted = 1, 0
        for position, row in _elements(text, start):
            line += text.count("\n", counted, position)
            counted = position
            yield RawRow(str(path), line, row)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def _rows_of(value: Any) -> str | None:
    """The key of an object's one list of rows; None if it is a row itself, or something else."""
    if not isinstance(value, dict) or not ROW_KEYS.isdisjoint(value):
        return None
    lists = [key for key, member in value.items() if isinstance(member, list)]
    return lists[0] if len(lists) == 1 else None


def _find_member(text: str, position: int, key: str) -> int:
    """Where the value of ``key`` begins in the valid object that begins at ``position``."""
    while True:
        found, position = _DECODER.raw_decode(text, _skip(text, position + 1))
        position = _skip(text, _skip(text, position) + 1)  # past the colon
        if found == key:
            return position
        _, position = _DECODER.raw_decode(text, position)
        position = _skip(text, position)  # at the comma


def _elements(text: str, position: int) -> Iterator[tuple[int, Any]]:
    """The elements of the list that begins at ``position``, and where each begins."""
    position = _skip(text, position + 1)
    if text[position : position + 1] == "]":
        return
    while True:
        value, end = _DECODER.raw_decode(text, position)
        yield position, value
        end = _skip(text, end)
        if text[end : end + 1] == "]":
            return
        if text[end : end + 1] != ",":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
        position = _skip(text, end + 1)


def _skip(text: str, position: int) -> int:
    match = _WHITESPACE.match(text, position)
    assert match is not None  # noqa: S101 - it matches nothing, too
    return match.end()


def _without_nulls(value: Any) -> Any:
    """Arrow gives each row the keys of all rows, with null where a row has none."""
    if isinstance(value, dict):
        return {key: _without_nulls(member) for key, member in value.items() if member is not None}
    if isinstance(value, list):
        return [_without_nulls(member) for member in value]
    return value
