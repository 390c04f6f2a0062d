"""Work on the host that needs no torch: packing documents into rows of a token budget.

Compiled (``_host``, pybind11) where the wheel or the build has it for this Python, else the Python
twin below: the same results, slower. This module does not import torch.
"""

import bisect
import importlib
from collections.abc import Callable, Sequence

_Pack = Callable[[Sequence[int], int], list[list[int]]]


def pack_documents(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Chooses which documents share a row of a token budget, so that few rows are needed.

    Best-fit decreasing: documents from the longest to the shortest (ties: the lower number first),
    each into the row with the least room that still holds it (ties: the lower row), else into a new
    row. At most 11/9 of the fewest possible rows, plus four (D. S. Johnson, "Near-optimal bin
    packing algorithms", 1973).

    Args:
        lengths: the documents' lengths in tokens, each in ``[1, budget]``.
        budget: tokens that a row holds, at least 1.

    Returns:
        For each row the numbers of its documents, in the order of placement. Every document is in
        exactly one row.

    Raises:
        ValueError: the budget or a length is out of its range.
    """
    return _pack(lengths, budget)


def pack_documents_python(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """The Python twin of the compiled :func:`pack_documents`; same results, same errors."""
    if budget < 1:
        raise ValueError(f"budget is {budget} tokens, expected at least 1")
    for document, length in enumerate(lengths):
        if not 1 <= length <= budget:
            raise ValueError(
                f"document {document} has {length} tokens, expected between 1 and the budget of "
                f"{budget}: truncate or drop it, or raise the budget"
            )
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row) of every row that is not full, sorted
    for document in sorted(range(len(lengths)), key=lambda document: -lengths[document]):
        length = lengths[document]
        best = bisect.bisect_left(room, (length, 0))
        if best < len(room):
            left, row = room.pop(best)
        else:
            left, row = budget, len(rows)
            rows.append([])
        rows[row].append(document)
        if left > length:
            bisect.insort(room, (left - length, row))
    return rows


def _load() -> tuple[_Pack, str]:
    try:
        module = importlib.import_module("speculators.ops._host")
    except ImportError as error:
        return pack_documents_python, f"not loaded: {error}; the Python twin serves instead"
    return module.pack_documents, f"loaded: {module.__file__}"


_pack, _detail = _load()


def report() -> str:
    """Whether the compiled module serves, and if not, why."""
    return f"_host: {_detail}"
