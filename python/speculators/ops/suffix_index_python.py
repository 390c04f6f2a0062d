"""The Python twin of the compiled suffix index, for Python versions that have none.

The same results from an obvious search, and so the reference in the tests: of every place where the
last token stands, it looks how far what precedes it agrees. That is fast enough for the text of one
request. A corpus wants the compiled index.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]
Draft = tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float64], float, int]

_END = -1
_MAX_TOKEN = 2**31 - 1
_MAX_CAPACITY = 2**29
_MAX_MATCH = 2**16


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuffixDraftLimits:
    """See :meth:`speculators.ops.host.SuffixIndex.propose`."""

    max_tokens: int
    factor: float
    min_match: int
    min_probability: float
    doubt: float
    max_occurrences: int
    tree: bool

    def check(self) -> None:
        """Raises ``ValueError`` where a number is out of its range."""
        _check_range("max_tokens", self.max_tokens, _MAX_MATCH)
        _check_range("min_match", self.min_match, _MAX_MATCH)
        _check_range("max_occurrences", self.max_occurrences, _MAX_TOKEN)
        if not self.factor > 0.0:
            raise ValueError(f"factor is {self.factor:f}, expected more than 0")
        if not self.doubt >= 0.0:
            raise ValueError(f"doubt is {self.doubt:f}, expected at least 0")
        if not 0.0 <= self.min_probability <= 1.0:
            raise ValueError(
                f"min_probability is {self.min_probability:f}, expected between 0 and 1"
            )


@dataclasses.dataclass
class _Node:
    """A token that could be drafted, and the occurrences that it follows."""

    path: list[int]  # of the draft, itself included
    parent: int
    probability: float
    places: list[int]

    @property
    def rank(self) -> tuple[float, int, int]:
        return self.probability, -len(self.path), max(self.places)


class SuffixIndexPython:
    """See :class:`speculators.ops.host.SuffixIndex`."""

    def __init__(self, capacity: int, max_match: int) -> None:
        _check_range("capacity", capacity, _MAX_CAPACITY)
        _check_range("max_match", max_match, _MAX_MATCH)
        self._capacity = capacity
        self._max_match = max_match
        self._text = [_END]
        self._dropped = 0  # entries that stood before self._text[0]
        self._after: dict[int, list[int]] = {}  # token to the places after it, the oldest first

    def extend(self, tokens: Tokens) -> None:
        """Continues the last sequence."""
        for token in _checked(tokens):
            place = self._dropped + len(self._text)
            self._after.setdefault(self._text[-1], []).append(place)
            self._add(token)

    def end_sequence(self) -> None:
        """The next tokens begin another sequence."""
        if self._text[-1] != _END:
            self._add(_END)

    def longest_match(self, context: Tokens) -> tuple[int, int]:
        """Length and number of occurrences."""
        found = self._matches(self._last(context))
        return (len(found), len(found[-1])) if found else (0, 0)

    def propose(self, limits: SuffixDraftLimits) -> Draft:
        """A draft after the last sequence."""
        limits.check()
        begin = len(self._text)
        least = max(0, begin - self._max_match)
        while begin > least and self._text[begin - 1] != _END:
            begin -= 1
        return self._best(self._text[begin:], limits, own=True)

    def propose_after(self, context: Tokens, limits: SuffixDraftLimits) -> Draft:
        """A draft after a context."""
        limits.check()
        return self._best(self._last(context), limits, own=False)

    def __len__(self) -> int:
        """Tokens that are kept."""
        return sum(token != _END for token in self._text[-self._capacity :])

    @property
    def bytes(self) -> int:
        """What the compiled index would need at least."""
        return 4 * (len(self._text) + len(self))

    @property
    def max_bytes(self) -> int:
        """The bound of the compiled index."""
        return 4 * (2 * (self._capacity + self._max_match) + 1 + self._capacity)

    def _add(self, entry: int) -> None:
        self._text.append(entry)
        if len(self._text) > 2 * (self._capacity + self._max_match):
            cut = len(self._text) - (self._capacity + self._max_match)
            self._text = self._text[cut:]
            self._dropped += cut
            begin = self._dropped + len(self._text) - self._capacity
            kept = (
                (token, [place for place in places if place >= begin])
                for token, places in self._after.items()
            )
            self._after = {token: places for token, places in kept if places}

    def _last(self, context: Tokens) -> list[int]:
        return _checked(context[-self._max_match :])

    def _matches(self, context: Sequence[int]) -> list[list[int]]:
        """The places in the text after the context's last 1, 2, ... tokens."""
        if not context:
            return []
        begin = max(1 - self._dropped, len(self._text) - self._capacity)
        after = self._after.get(context[-1], [])
        places = [place - self._dropped for place in after if place - self._dropped >= begin]
        found = []
        for length in range(1, len(context) + 1):
            if length > 1:
                places = [p for p in places if self._text[p - length] == context[-length]]
            if not places:
                break
            found.append(places)
        return found

    def _best(self, context: Sequence[int], limits: SuffixDraftLimits, *, own: bool) -> Draft:
        best = _draft([], 0)
        matches = self._matches(context)
        for length in range(len(matches), limits.min_match - 1, -1):
            most = min(limits.max_tokens, math.floor(min(limits.factor * length, _MAX_MATCH)))
            nodes = self._grow(matches[length - 1], length, most, limits, own)
            draft = _draft(nodes, length)
            if draft[3] > best[3]:
                best = draft
        return best

    def _grow(
        self, places: list[int], length: int, most: int, limits: SuffixDraftLimits, own: bool
    ) -> list[_Node]:
        if len(places) > limits.max_occurrences:  # in the order that the compiled index has them
            places = sorted(places, key=self._order)
            places = places[:: -(-len(places) // limits.max_occurrences)]
        drafted: list[_Node] = []
        candidates = self._children(_Node([], -1, 1.0, places), -1, length, limits, own)
        while candidates and len(drafted) < most:
            node = max(candidates, key=lambda node: node.rank)
            candidates.remove(node)
            drafted.append(node)
            candidates += self._children(node, len(drafted) - 1, length, limits, own)
        return drafted

    def _children(
        self, node: _Node, number: int, length: int, limits: SuffixDraftLimits, own: bool
    ) -> list[_Node]:
        following: dict[int, list[int]] = {}
        for place in node.places:
            token = self._token_after(place, node.path, own)
            if token != _END:
                following.setdefault(token, []).append(place)
        total = sum(map(len, following.values())) + limits.doubt / (length + len(node.path))
        children = [
            _Node([*node.path, token], number, node.probability * (len(places) / total), places)
            for token, places in following.items()
        ]
        if children and not limits.tree:
            children = [max(children, key=lambda child: child.rank)]
        return [child for child in children if child.probability >= limits.min_probability]

    def _token_after(self, place: int, path: list[int], own: bool) -> int:
        following = place + len(path)
        if following < len(self._text):
            return self._text[following]
        return path[following - len(self._text)] if own else _END

    def _order(self, place: int) -> tuple[list[int], int]:
        before = self._text[max(0, place - self._max_match) : place][::-1]
        return before[: before.index(_END) + 1] if _END in before else before, place


def _draft(nodes: list[_Node], length: int) -> Draft:
    score = 0.0
    for node in nodes:  # from the left, as the compiled index adds them
        score += node.probability
    return (
        np.array([node.path[-1] for node in nodes], dtype=np.int32),
        np.array([node.parent for node in nodes], dtype=np.int32),
        np.array([node.probability for node in nodes], dtype=np.float64),
        score,
        length,
    )


def _checked(tokens: Tokens) -> list[int]:
    if tokens.ndim != 1:
        raise ValueError(f"got tokens of {tokens.ndim} dimensions, expected 1")
    values: list[int] = tokens.tolist()
    for i, token in enumerate(values):
        if not 0 <= token <= _MAX_TOKEN:
            raise ValueError(f"token {i} is {token}, expected an id between 0 and {_MAX_TOKEN}")
    return values


def _check_range(name: str, value: int, most: int) -> None:
    if not 1 <= value <= most:
        raise ValueError(f"{name} is {value}, expected between 1 and {most}")
