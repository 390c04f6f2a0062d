"""Packed batches for training: whole documents, several in a row, in a new order every epoch.

An epoch shows every document once. Documents are shuffled, and windows of the shuffled order are
packed into rows so that little is padding; rows are shuffled again in their window, since packing
begins with the longest documents. All of it follows from (seed, epoch): a run that goes on at batch
i sees the batches that it would have seen.
"""

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch

from speculators.data.batch import PackedBatch
from speculators.data.ordering import derived_seed
from speculators.data.store import HiddenStateStore
from speculators.ops.host import pack_documents

PACKING_WINDOW = 4096

_Item = TypeVar("_Item")


def packing(
    lengths: Sequence[int], row_tokens: int, seed: int, epoch: int, window: int = PACKING_WINDOW
) -> list[list[int]]:
    """Which documents share a row in an epoch.

    Args:
        lengths: the documents' lengths; longer ones than a row count as a whole row.
        row_tokens: tokens that a row holds.
        seed: of the run.
        epoch: its number.
        window: how many documents of the shuffled order are packed together.

    Returns:
        For each row, in the order of training, places in ``lengths``; each place in one row.
    """
    generator = torch.Generator().manual_seed(derived_seed(seed, epoch))
    order = torch.randperm(len(lengths), generator=generator).tolist()
    rows: list[list[int]] = []
    for begin in range(0, len(order), window):
        places = order[begin : begin + window]
        packed = pack_documents([min(lengths[place], row_tokens) for place in places], row_tokens)
        shuffled = torch.randperm(len(packed), generator=generator).tolist()
        rows += [[places[document] for document in packed[row]] for row in shuffled]
    return rows


def split(store: HiddenStateStore, validation: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Divides a store's documents into those to train on and those to validate with.

    Args:
        store: the documents.
        validation: how many to validate with; as a float in (0, 1) which part (at least one).
        seed: of the choice.

    Returns:
        Numbers of documents for training and for validation, sorted.

    Raises:
        ValueError: nothing would be left to train on, or the number is negative.
    """
    if isinstance(validation, int):
        count = validation
    else:
        count = max(1, round(validation * len(store))) if 0 < validation < 1 else -1
    if not 0 <= count < len(store):
        raise ValueError(
            f"validation is {validation}, and there are {len(store)} documents; expected a part "
            "between 0.0 and 1.0, or a number that leaves documents to train on"
        )
    generator = torch.Generator().manual_seed(derived_seed("split", seed))
    order: list[int] = torch.randperm(len(store), generator=generator).tolist()
    return sorted(order[count:]), sorted(order[:count])


class PackedBatches:
    """The batches of a store's documents, epoch by epoch.

    Documents longer than a row are truncated to it; ``truncated_documents`` and
    ``truncated_tokens`` say how many documents, and how many tokens are not seen.

    Args:
        store: the documents.
        row_tokens: T, tokens of a row.
        rows_per_batch: B; the last batch of an epoch may have fewer rows.
        seed: of the order.
        documents: the numbers of the documents to use; all by default.
        rank: which of the processes this is.
        world_size: among how many processes the rows are dealt out, B to each at a time. All get
            equally many batches; one that is left without rows gets a row of padding.
        prefetch: how many batches a thread reads ahead; 0 reads when asked.

    Raises:
        ValueError: a size is not positive, or there are no documents.
        IndexError: the store lacks a document.
    """

    def __init__(
        self,
        store: HiddenStateStore,
        *,
        row_tokens: int,
        rows_per_batch: int,
        seed: int = 0,
        documents: Iterable[int] | None = None,
        rank: int = 0,
        world_size: int = 1,
        prefetch: int = 2,
    ) -> None:
        self.documents = list(range(len(store)) if documents is None else documents)
        if row_tokens < 1 or rows_per_batch < 1 or prefetch < 0 or not self.documents:
            raise ValueError(
                f"row_tokens is {row_tokens}, rows_per_batch {rows_per_batch}, prefetch {prefetch},"
                f" and there are {len(self.documents)} documents; expected at least 1 of each "
                "(prefetch: 0)"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank} of {world_size}; expected 0 to {world_size - 1}")
        if not 0 <= min(self.documents) <= max(self.documents) < len(store):
            raise IndexError(
                f"documents {min(self.documents)} to {max(self.documents)} of a store of "
                f"{len(store)}; expected 0 to {len(store) - 1}"
            )
        self.store = store
        self.row_tokens = row_tokens
        self.rows_per_batch = rows_per_batch
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self._prefetch = prefetch
        self._lengths = [store.lengths[document] for document in self.documents]
        longer = [length - row_tokens for length in self._lengths if length > row_tokens]
        self.truncated_documents = len(longer)
        self.truncated_tokens = sum(longer)

    def rows(self, epoch: int) -> list[list[int]]:
        """The numbers of the documents in each row of an epoch, in order, of all processes."""
        rows = packing(self._lengths, self.row_tokens, self.seed, epoch)
        return [[self.documents[place] for place in row] for row in rows]

    def num_batches(self, epoch: int) -> int:
        """How many batches an epoch has; epochs can differ by a few."""
        return len(self._begins(len(self.rows(epoch))))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[PackedBatch]:
        """The batches of an epoch.

        Args:
            epoch: its number, from 0.
            start: the number of the first batch to give, to go on in the middle.
        """
        rows = self.rows(epoch)
        begins = self._begins(len(rows))
        groups = (rows[begin : begin + begins.step] for begin in begins[start:])
        batches = (self._batch(group[self.rank :: self.world_size] or [[]]) for group in groups)
        return batches if self._prefetch == 0 else _ahead(batches, self._prefetch)

    def _begins(self, rows: int) -> range:
        """The first rows of the batches of all processes together."""
        return range(0, rows, self.rows_per_batch * self.world_size)

    def _batch(self, rows: Sequence[Sequence[int]]) -> PackedBatch:
        shape = (len(rows), self.row_tokens)
        width, dtype = self.store.hidden_size, self.store.dtype
        batch = PackedBatch(
            input_ids=torch.zeros(shape, dtype=torch.int64),
            loss_mask=torch.zeros(shape, dtype=torch.bool),
            position_ids=torch.zeros(shape, dtype=torch.int64),
            document_ids=torch.full(shape, -1),
            hidden_states={
                k: torch.zeros(*shape, width, dtype=dtype) for k in self.store.layer_ids
            },
        )
        for row, documents in enumerate(rows):
            begin = 0
            for place, number in enumerate(documents):
                document = self.store.stored(number, self.row_tokens)
                length = len(document.input_ids)
                slots = (row, slice(begin, begin + length))
                batch.input_ids[slots] = document.input_ids
                batch.loss_mask[slots] = document.loss_mask
                batch.position_ids[slots] = torch.arange(length)
                batch.document_ids[slots] = place
                document.unpack_into(batch.hidden_states, row * self.row_tokens + begin)
                begin += length
        return batch


def _ahead(items: Iterator[_Item], count: int) -> Iterator[_Item]:
    """The same items, computed by a thread that is at most ``count`` ahead.

    An error of the thread is raised where its item would have come. The thread ends when the
    iterator is exhausted, closed or collected.
    """
    ready: queue.Queue[tuple[_Item | None, BaseException | None]] = queue.Queue(count)
    stopped = threading.Event()

    def work() -> None:
        error: BaseException | None = None
        try:
            for item in items:
                ready.put((item, None))
                if stopped.is_set():
                    return
        except BaseException as caught:  # raised again by the consumer
            error = caught
        ready.put((None, error))

    thread = threading.Thread(target=work, name="packed-batches", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        stopped.set()
        with contextlib.suppress(queue.Empty):
            while True:  # room for the thread, which may be waiting for it
                ready.get_nowait()
        thread.join()
