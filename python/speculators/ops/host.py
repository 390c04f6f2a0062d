"""Work on the host that needs no torch: packing documents into rows, and the suffix index.

Compiled (``_host``, pybind11) where the wheel or the build has it for this Python, else Python
twins: the same results, slower. This module does not import torch.
"""

import bisect
import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from speculators.ops import suffix_index_python

_Pack = Callable[[Sequence[int], int], list[list[int]]]
TokenIds = Sequence[int] | NDArray[np.int32] | NDArray[np.int64]


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


@dataclasses.dataclass(frozen=True)
class SuffixDraft:
    """Tokens that a :class:`SuffixIndex` drafts: a tree, in a chain each the child of the last.

    Attributes:
        tokens: int32 ``[N]``, parents before their children.
        parents: int32 ``[N]``, the number of the token before each, -1 for the first ones.
        probabilities: float64 ``[N]``, estimates that a token is accepted and all before it on its
            path; they do not rise along the array.
        score: their sum: how many tokens are expected to be accepted.
        match_length: how many tokens of the context the draft relies on; 0 if there is no draft.
    """

    tokens: NDArray[np.int32]
    parents: NDArray[np.int32]
    probabilities: NDArray[np.float64]
    score: float
    match_length: int


class SuffixIndex:
    """What followed the same last tokens before, and how often.

    The index of SuffixDecoding (Oliaro et al., 2024, arXiv:2411.04975), as sorted places in place
    of a tree: at most 12 bytes per token of the capacity, and nothing before it is needed. It holds
    sequences of tokens, the last of which can grow. Several threads may use one.

    Args:
        capacity: how many tokens are kept, the newest ones, at most 2**29. Every end of a sequence
            takes the place of one.
        max_match: the longest match that is looked for, in tokens, at most 2**16.

    Raises:
        ValueError: a number is out of its range.

    Example::

        index = SuffixIndex()
        index.extend([1, 2, 3, 4, 1, 2])
        index.propose(5).tokens  # 3, 4
    """

    def __init__(self, capacity: int = 2**20, max_match: int = 32) -> None:
        self._index: Any = _index_class(capacity, max_match)

    def extend(self, tokens: TokenIds) -> None:
        """Continues the last sequence.

        Raises:
            ValueError: a token is not in [0, 2**31), or they are no list; then nothing is added.
            TypeError: they are no integers.
        """
        self._index.extend(_array(tokens))

    def end_sequence(self) -> None:
        """The next tokens begin another sequence; what precedes them is no context of theirs."""
        self._index.end_sequence()

    def longest_match(self, context: TokenIds) -> tuple[int, int]:
        """How many of the last tokens occur with a token after them, and how often.

        Args:
            context: token ids; the last ``max_match`` count.

        Returns:
            Length and occurrences, (0, 0) if not even the last token occurs so.
        """
        length, count = self._index.longest_match(_array(context))
        return length, count

    def propose(
        self,
        max_tokens: int,
        *,
        context: TokenIds | None = None,
        factor: float = 1.0,
        min_match: int = 1,
        min_probability: float = 0.0,
        doubt: float = 0.0,
        max_occurrences: int = 1024,
        tree: bool = False,
    ) -> SuffixDraft:
        """Drafts what comes after a context, or after the last sequence.

        Every length of match gives a draft, and the one with the highest score is returned; on ties
        the longer match. A draft grows by the token with the highest estimated probability, on ties
        the one nearer to the root, then the one that was seen last. The probability of a token that
        follows c of the n occurrences that go on is ``c / (n + doubt / (match + depth))`` times
        that of the token before it. Occurrences that reach the end of the last sequence, if it is
        that which is continued, go on with what is drafted, so that a repetition does so too.

        Args:
            max_tokens: of the draft, at most 2**16.
            context: token ids, the last ``max_match`` count; None: the last sequence.
            factor: a match of m tokens drafts at most ``factor * m`` (the paper's alpha).
            min_match: shorter matches draft nothing.
            min_probability: tokens that are less likely are left out.
            doubt: what is held back for tokens that were not seen, in occurrences of a match of one
                token; the longer the match the less. With 0, as in the paper, a single occurrence
                is certain.
            max_occurrences: of a match that are looked at, evenly chosen.
            tree: whether the draft may branch; else it is the chain of likeliest children.

        Raises:
            ValueError: a number or a token is out of its range.
        """
        limits = _limits_class(
            max_tokens=max_tokens,
            factor=factor,
            min_match=min_match,
            min_probability=min_probability,
            doubt=doubt,
            max_occurrences=max_occurrences,
            tree=tree,
        )
        if context is None:
            return SuffixDraft(*self._index.propose(limits))
        return SuffixDraft(*self._index.propose_after(_array(context), limits))

    def __len__(self) -> int:
        """Tokens that are kept."""
        return len(self._index)

    @property
    def bytes(self) -> int:
        """Memory of the index, as allocated."""
        return int(self._index.bytes)

    @property
    def max_bytes(self) -> int:
        """What ``bytes`` never exceeds."""
        return int(self._index.max_bytes)


def _array(tokens: TokenIds) -> NDArray[np.int64]:
    array = np.asarray(tokens)
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"got tokens of dtype {array.dtype}; expected integers")
    return np.ascontiguousarray(array, dtype=np.int64) if array.ndim else array.astype(np.int64)


def _load() -> tuple[_Pack, Any, Any, str]:
    twin = suffix_index_python
    try:
        module = importlib.import_module("speculators.ops._host")
        found = module.pack_documents, module.SuffixIndex, module.SuffixDraftLimits
    except (ImportError, AttributeError) as error:  # none, or one of older sources
        detail = f"not loaded: {error}; the Python twins serve instead"
        return pack_documents_python, twin.SuffixIndexPython, twin.SuffixDraftLimits, detail
    return *found, f"loaded: {module.__file__}"


_pack, _index_class, _limits_class, _detail = _load()


def report() -> str:
    """Whether the compiled module serves, and if not, why."""
    return f"_host: {_detail}"
