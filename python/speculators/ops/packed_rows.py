"""Which rows of packed documents attend, and to which rows of step 0: worked out once per batch.

In training every layer of every step asks the same: where documents begin and end, which of their
rows go on drafting, and, where there is a sliding window, how far back they see. The answers are
lists on the host, masks and index tensors; here they are made when first asked for, and kept.
"""

import dataclasses
import itertools
from functools import cached_property
from typing import Final

import torch
from torch import Tensor

QUERIES_PER_PIECE: Final = 256
"""Rows of a piece that has a mask. Fewer let early rows skip more of the keys behind them; more
make larger matrix products."""


_Index = tuple[int, slice, slice, slice]


@dataclasses.dataclass(frozen=True)
class Piece:
    """Queries of one document that lie side by side, and the keys that they see.

    Attributes:
        queries: what picks them from ``[B, Nkv, Nq / Nkv, R, ...]``.
        keys: what picks them from ``[B, Nkv, Nq / Nkv, T, ...]``.
        num_keys: how many of the T rows.
        is_first: whether no piece before it has keys of the same document.
        mask: float32 ``[queries, keys]``, 0 where a query sees a key, else -inf. None: query i sees
            the first i + 1 keys, of which there are as many as queries.
    """

    queries: _Index
    keys: _Index
    num_keys: int
    is_first: bool
    mask: Tensor | None

    @classmethod
    def of(
        cls, batch: int, queries: range, keys: range, is_first: bool, mask: Tensor | None
    ) -> "Piece":
        """From ranges of the R queries and of the T rows of one of the B rows of documents."""
        every = slice(None)
        return cls(
            (batch, every, every, slice(queries.start, queries.stop)),
            (batch, every, every, slice(keys.start, keys.stop)),
            len(keys),
            is_first,
            mask,
        )


@dataclasses.dataclass(frozen=True)
class _Run:
    """Queries of one document that lie side by side, in rising order, and its first row.

    Attributes:
        is_first: whether no run before it is of the same document.
    """

    batch: int
    first_query: int
    rows: list[int]
    document_start: int
    is_first: bool

    def is_the_documents_beginning(self) -> bool:
        start = self.document_start
        return self.rows == list(range(start, start + len(self.rows)))


class PackedRows:
    """Rows of packed documents: all of them, or some.

    The rows of a document lie side by side, at positions that rise by 1. Padding sees nothing and
    is seen by nobody.

    Args:
        document_ids: int64 ``[B, T]``, the number of the document; negative for padding.
        selected: int64 ``[B, R]``, which of the T rows, in any order; repeats are allowed. Rising
            order is the quickest. None: each row.

    Raises:
        ValueError: a shape or device is wrong, or (on CPU) a document is in two places.
        TypeError: ids or rows are not int64.
        IndexError: a row is out of range (on CPU).
    """

    def __init__(self, document_ids: Tensor, selected: Tensor | None = None) -> None:
        _check_type("document_ids", document_ids)
        if document_ids.dim() != 2:
            found = list(document_ids.shape)
            raise ValueError(f"document_ids has the shape {found}, expected [B, T]")
        self.document_ids = document_ids
        self.selected = selected
        self._pieces: dict[int | None, list[Piece]] = {}
        self._masks: dict[int | None, Tensor] = {}
        if selected is not None:
            _check_selected(selected, document_ids)
        elif document_ids.device.type == "cpu":
            _check_documents(document_ids, self._starts)

    def select(self, rows: Tensor) -> "PackedRows":
        """Some of the rows, in place of those that are selected so far; see the class."""
        return PackedRows(self.document_ids, rows)

    @property
    def shape(self) -> tuple[int, int, int]:
        """B, R and T."""
        batch, width = self.document_ids.shape
        return batch, width if self.selected is None else self.selected.shape[1], width

    def mask(self, reach: int | None) -> Tensor:
        """Which rows see which of step 0, the whole matrix: bool ``[B, 1, R, T]``.

        Padding sees padding here, so that no row sees nothing and becomes NaN.

        Args:
            reach: how many rows back a row sees, itself included; None for all.
        """
        if reach not in self._masks:
            documents = self.document_ids
            columns = torch.arange(documents.shape[1], device=documents.device)
            rows = columns.expand_as(documents) if self.selected is None else self.selected
            same = documents.gather(1, rows)[..., None] == documents[:, None]
            visible = same & (columns <= rows[..., None])
            if reach is not None:
                visible &= columns > rows[..., None] - reach
            self._masks[reach] = visible[:, None]
        return self._masks[reach]

    def pieces(self, reach: int | None) -> list[Piece]:
        """The same as ranges of queries and keys, without padding; a query is in at most one.

        Args:
            reach: as in :meth:`mask`; where it is less than 1 there are no pieces.
        """
        if reach not in self._pieces:
            seeing = self._runs if reach is None or reach > 0 else []
            self._pieces[reach] = [piece for run in seeing for piece in _split(run, reach)]
        return self._pieces[reach]

    @cached_property
    def covers_all(self) -> bool:
        """Whether no query is padding."""
        return sum(len(run.rows) for run in self._runs) == self.shape[0] * self.shape[1]

    @cached_property
    def _starts(self) -> Tensor:
        return _starts(self.document_ids.cpu())

    @cached_property
    def _runs(self) -> list[_Run]:
        batch, count, width = self.shape
        starts, documents = self._starts, self.document_ids.cpu()
        if self.selected is None:
            rows = torch.arange(width).expand(batch, -1)
        else:
            rows = self.selected.cpu()
            starts, documents = starts.gather(1, rows), documents.gather(1, rows)
        begins = torch.ones(batch, count, dtype=torch.bool)
        begins[:, 1:] = (starts[:, 1:] != starts[:, :-1]) | (rows[:, 1:] < rows[:, :-1])
        borders = begins.nonzero().tolist()
        runs: list[_Run] = []
        documents_of_runs: set[tuple[int, int]] = set()
        for (b, first), after in zip(borders, [*borders[1:], [batch, 0]], strict=False):
            end = after[1] if after[0] == b else count
            if int(documents[b, first]) >= 0:
                start, part = int(starts[b, first]), rows[b, first:end].tolist()
                runs.append(_Run(b, first, part, start, (b, start) not in documents_of_runs))
                documents_of_runs.add((b, start))
        return runs

    @cached_property
    def cumulative_lengths(self) -> tuple[Tensor, int]:
        """Documents (and runs of padding) one after the other, as kernels with them want it.

        Returns:
            int32 ``[documents + 1]`` on the device: where each of them begins among all B T rows;
            and the greatest length.
        """
        starts = self._starts
        begins = starts == torch.arange(starts.shape[1])
        borders = [*begins.flatten().nonzero()[:, 0].tolist(), starts.numel()]
        longest = max((b - a for a, b in itertools.pairwise(borders)), default=0)
        device = self.document_ids.device
        return torch.tensor(borders, dtype=torch.int32, device=device), longest

    @cached_property
    def places(self) -> Tensor:
        """Where the queries are among all B T rows: int64 ``[B R]``, on the device."""
        batch, _, width = self.shape
        device = self.document_ids.device
        rows = self.selected
        if rows is None:
            return torch.arange(batch * width, device=device)
        return (rows + width * torch.arange(batch, device=device)[:, None]).flatten()

    @cached_property
    def are_distinct(self) -> bool:
        """Whether no row is selected twice."""
        return self.selected is None or len(self.places.unique()) == len(self.places)


def _split(run: _Run, reach: int | None) -> list[Piece]:
    first, start = run.first_query, run.document_start
    if reach is None and run.is_the_documents_beginning():
        count = len(run.rows)
        queries, keys = range(first, first + count), range(start, start + count)
        return [Piece.of(run.batch, queries, keys, run.is_first, None)]
    pieces = []
    for begin in range(0, len(run.rows), QUERIES_PER_PIECE):
        rows = run.rows[begin : begin + QUERIES_PER_PIECE]
        first_key = start if reach is None else max(start, rows[0] - reach + 1)
        keys = range(first_key, rows[-1] + 1)
        keys_, queries_ = torch.arange(keys.start, keys.stop), torch.tensor(rows)[:, None]
        hidden = keys_ > queries_
        if reach is not None:
            hidden |= keys_ <= queries_ - reach
        mask = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
        queries = range(first + begin, first + begin + len(rows))
        is_first = run.is_first and begin == 0
        pieces.append(Piece.of(run.batch, queries, keys, is_first, mask))
    return pieces


def _starts(documents: Tensor) -> Tensor:
    """The first row of each row's document (or of its run of padding): int64 ``[B, T]``."""
    columns = torch.arange(documents.shape[1]).expand_as(documents)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    if not documents.numel():
        return columns
    return torch.where(begins, columns, 0).cummax(1).values


def _check_type(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.int64:
        raise TypeError(f"{name} is {tensor.dtype}, expected torch.int64")


def _check_selected(rows: Tensor, documents: Tensor) -> None:
    _check_type("rows", rows)
    batch, width = documents.shape
    if rows.dim() != 2 or rows.shape[0] != batch:
        raise ValueError(f"rows has the shape {list(rows.shape)}, expected [{batch}, R]")
    if rows.device != documents.device:
        raise ValueError(f"rows is on {rows.device}, expected {documents.device}, as document_ids")
    if rows.device.type == "cpu" and rows.numel():
        least, most = int(rows.min()), int(rows.max())
        if least < 0 or most >= width:
            found = least if least < 0 else most
            raise IndexError(f"rows has {found}, expected 0 <= row < {width}")


def _check_documents(documents: Tensor, starts: Tensor) -> None:
    begins = (starts == torch.arange(starts.shape[1])) & (documents >= 0)
    found: dict[tuple[int, int], int] = {}
    for b, first in begins.nonzero().tolist():
        number = int(documents[b, first])
        if found.setdefault((b, number), first) != first:
            raise ValueError(
                f"document_ids: document {number} of row {b} begins at {found[b, number]} and "
                f"again at {first}; expected its rows side by side"
            )
