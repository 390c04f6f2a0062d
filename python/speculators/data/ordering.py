"""In which order and in which groups documents are computed: by length, and reproducibly.

A batch of documents of one length has no padding. All of them sorted would do, but the first hour
would then tell nothing about the last, so documents are sorted within windows. The longest come
first: a batch that does not fit in memory fails at once. Order and seeds depend on the documents
and on numbers that are given, never on the time or on where an earlier run stopped.
"""

import hashlib
from collections.abc import Iterator, Sequence

WINDOW = 2048


def processing_order(lengths: Sequence[int], window: int = WINDOW) -> list[int]:
    """The numbers of all documents; in each window of neighbours from the longest to the shortest.

    Args:
        lengths: the documents' lengths.
        window: how many neighbours are sorted together.
    """
    order: list[int] = []
    for begin in range(0, len(lengths), window):
        numbers = range(begin, min(begin + window, len(lengths)))
        order += sorted(numbers, key=lambda number: -lengths[number])
    return order


def length_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[range]:
    """Cuts a sequence of documents into batches, from its begin on.

    Args:
        lengths: the documents' lengths, in the order in which they are to be computed.
        batch_tokens: the most that a batch may hold, padding to its longest document included; a
            longer document is a batch of its own.

    Yields:
        Ranges of places in ``lengths``: all of them, in order.
    """
    begin, longest = 0, 0
    for place, length in enumerate(lengths):
        longest = max(longest, length)
        if place > begin and longest * (place - begin + 1) > batch_tokens:
            yield range(begin, place)
            begin, longest = place, length
    if begin < len(lengths):
        yield range(begin, len(lengths))


def derived_seed(*parts: int | str) -> int:
    """A seed for one part of the work, such as ``(seed, epoch)``: 63 bits that look unrelated."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
