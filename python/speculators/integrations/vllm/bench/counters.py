"""What a server counts of its drafts: vLLM's counters, in Prometheus' format at ``/metrics``."""

import dataclasses
import re
from collections.abc import Sequence

_COUNTERS = "vllm:spec_decode_num_"
_SAMPLE = re.compile(
    rf"^{_COUNTERS}(?P<name>drafts|draft_tokens|accepted_tokens(?:_per_pos)?)_total"
    r"(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)"
)
_POSITION = re.compile(r'(?:^|,)position="(\d+)"')


@dataclasses.dataclass(frozen=True)
class DraftCounters:
    """What a server has counted of its drafts since it started.

    Attributes:
        drafts: verifications with a draft.
        draft_tokens: drafted tokens.
        accepted_tokens: those that the verifier accepted.
        accepted_by_position: drafts whose first, second, ... token was accepted.
    """

    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_by_position: tuple[int, ...] = ()

    def since(self, before: "DraftCounters") -> "DraftCounters":
        """What was counted after ``before``."""
        length = max(len(self.accepted_by_position), len(before.accepted_by_position))
        now, then = (_padded(c.accepted_by_position, length) for c in (self, before))
        return DraftCounters(
            self.drafts - before.drafts,
            self.draft_tokens - before.draft_tokens,
            self.accepted_tokens - before.accepted_tokens,
            tuple(one - other for one, other in zip(now, then, strict=True)),
        )

    def plus(self, other: "DraftCounters") -> "DraftCounters":
        """Both together."""
        nothing = DraftCounters()
        return self.since(nothing.since(other))


def _padded(counts: Sequence[int], length: int) -> list[int]:
    return [*counts, *[0] * (length - len(counts))]


def parse_counters(text: str) -> DraftCounters | None:
    """Reads a server's ``/metrics``.

    Args:
        text: in Prometheus' format; of several engines the sum is taken.

    Returns:
        None if the server does not draft.
    """
    sums: dict[str, int] = {}
    positions: dict[int, int] = {}
    for match in filter(None, map(_SAMPLE.match, text.splitlines())):
        name, value = match["name"], int(float(match["value"]))
        if name == "accepted_tokens_per_pos":
            position = _POSITION.search(match["labels"] or "")
            if position is not None:
                positions[int(position[1])] = positions.get(int(position[1]), 0) + value
        else:
            sums[name] = sums.get(name, 0) + value
    if not sums:
        return None
    return DraftCounters(
        sums.get("drafts", 0),
        sums.get("draft_tokens", 0),
        sums.get("accepted_tokens", 0),
        tuple(positions.get(place, 0) for place in range(max(positions, default=-1) + 1)),
    )
