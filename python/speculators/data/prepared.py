"""The folder that ``prepare`` writes, read back: token ids and loss masks, memory-mapped.

A ``datasets`` Arrow dataset with the columns ``input_ids`` (lists of int32) and ``loss_mask``
(lists of bool), and ``prepare.json`` with what it was made from and the counts. Counts over all
rows go through Arrow's flat columns, without a Python object for each token.
"""

import pathlib
from collections.abc import Iterator
from typing import Any, Protocol

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pydantic
import torch
from torch import Tensor

from speculators.data import artifact
from speculators.data.records import MalformedRow

MANIFEST = "prepare.json"
_FIRST = 20


class PrepareCounts(pydantic.BaseModel):
    """What became of the rows.

    Attributes:
        rows: rows looked at.
        kept: rows in the prepared dataset.
        malformed: rows that could not be used.
        malformed_by_kind: the same by kind of reason.
        first_malformed: the first 20 of them.
        without_tokens: rows left out because they have no token.
        below_min_learnable: rows left out because too few of their tokens are to be learned.
        truncated: kept rows that were cut to the maximal length.
        learnable_rows: kept rows with at least one token that is to be learned.
        tokens: tokens of the kept rows.
        learnable_tokens: those of them that are to be learned.
    """

    rows: int = 0
    kept: int = 0
    malformed: int = 0
    malformed_by_kind: dict[str, int] = {}
    first_malformed: list[MalformedRow] = []
    without_tokens: int = 0
    below_min_learnable: int = 0
    truncated: int = 0
    learnable_rows: int = 0
    tokens: int = 0
    learnable_tokens: int = 0

    def count_malformed(self, row: MalformedRow) -> None:
        """Counts one malformed row, and keeps it if it is among the first."""
        self.malformed += 1
        self.malformed_by_kind[row.kind] = self.malformed_by_kind.get(row.kind, 0) + 1
        if len(self.first_malformed) < _FIRST:
            self.first_malformed.append(row)

    def add(self, other: "PrepareCounts") -> None:
        """Adds the counts of rows that come after these."""
        for name in PrepareCounts.model_fields:
            mine, its = getattr(self, name), getattr(other, name)
            if isinstance(mine, dict):
                setattr(self, name, {k: mine.get(k, 0) + its.get(k, 0) for k in {**mine, **its}})
            else:
                setattr(self, name, mine + its)
        self.first_malformed = self.first_malformed[:_FIRST]


class PrepareReport(PrepareCounts):
    """What ``prepare`` did, with the hashes of what it made.

    Attributes:
        content_hash: of the input's content, the tokenizer, its template and the settings.
        tokenizer_hash: of what turns text into ids, without the chat template.
        reused: whether the folder was there already, made from the same content.
    """

    content_hash: str
    tokenizer_hash: str
    reused: bool = False


class PreparedDataset:
    """A prepared dataset; ``dataset[i]`` is a row, ``len(dataset)`` their number.

    Attributes:
        report: the counts, and the hashes.
        settings: the settings of ``prepare`` that it was made with.
    """

    def __init__(
        self, dataset: datasets.Dataset, report: PrepareReport, settings: dict[str, Any]
    ) -> None:
        self._dataset = dataset.with_format("numpy")
        self._table = dataset.data
        self.report = report
        self.settings = settings

    @classmethod
    def open(cls, directory: artifact.Path) -> "PreparedDataset":
        """Opens what ``prepare`` wrote; nothing is read into memory but the manifest.

        Raises:
            FileNotFoundError: there is no such folder.
            FileExistsError: the folder is none that ``prepare`` wrote.
        """
        manifest = artifact.read_manifest(directory, MANIFEST)
        report = PrepareReport.model_validate(manifest["report"])
        return cls(
            datasets.load_from_disk(str(pathlib.Path(directory))), report, manifest["settings"]
        )

    @property
    def content_hash(self) -> str:
        """The hash of what it was made from, for what is made from it."""
        return self.report.content_hash

    @property
    def tokenizer_hash(self) -> str:
        """The hash of the tokenizer, as ``artifact.hash_tokenizer`` gives it."""
        return self.report.tokenizer_hash

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """A row: ``input_ids`` int64 ``[L]`` and ``loss_mask`` bool ``[L]``."""
        row = self._dataset[index]
        input_ids = torch.from_numpy(row["input_ids"].astype(np.int64))
        return input_ids, torch.from_numpy(row["loss_mask"].astype(bool))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> Tensor:
        """int64 ``[len(self)]``, the tokens of each row."""
        found = [lengths for lengths, _, _ in self._flat()]
        return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *found]))

    @property
    def learnable(self) -> Tensor:
        """int64 ``[len(self)]``, the tokens of each row that are to be learned."""
        found = [np.zeros(0, np.int64)]
        for lengths, _, mask in self._flat():
            before = np.concatenate([[0], np.cumsum(mask, dtype=np.int64)])
            ends = np.cumsum(lengths)
            found.append(before[ends] - before[ends - lengths])
        return torch.from_numpy(np.concatenate(found))

    def learnable_ids(self) -> Iterator[npt.NDArray[np.int32]]:
        """All ids that are to be learned, in pieces, in the order of the rows."""
        for _, input_ids, mask in self._flat():
            yield input_ids[mask]

    def _flat(
        self,
    ) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.bool_]]]:
        """Pieces of the dataset: tokens per row, and ids and mask of all rows in one."""
        for batch in self._table.to_batches():
            ids, mask = batch["input_ids"], batch["loss_mask"]
            lengths = pa.compute.list_value_length(ids).to_numpy(zero_copy_only=False)
            yield (
                lengths.astype(np.int64),
                ids.flatten().to_numpy(zero_copy_only=False),
                mask.flatten().to_numpy(zero_copy_only=False),
            )


class LearnableTokens(Protocol):
    """A dataset that tells which tokens are to be learned: prepared, or with hidden states."""

    def learnable_ids(self) -> Iterator[npt.NDArray[Any]]:
        """All ids that are to be learned, in pieces."""


def token_counts(dataset: LearnableTokens, vocab_size: int) -> Tensor:
    """How often each token is to be learned, from which a draft's vocabulary is chosen.

    Args:
        dataset: a prepared dataset, or a store of hidden states.
        vocab_size: the size V of the verifier's vocabulary.

    Returns:
        int64 ``[V]``.

    Raises:
        ValueError: a token's id is V or more.
    """
    counts = np.zeros(vocab_size, np.int64)
    for ids in dataset.learnable_ids():
        if ids.size and ids.max() >= vocab_size:
            raise ValueError(
                f"the dataset has token id {ids.max()}; expected ids below the vocabulary's size "
                f"{vocab_size}. Was it prepared with this verifier's tokenizer?"
            )
        counts += np.bincount(ids, minlength=vocab_size)
    return torch.from_numpy(counts)
