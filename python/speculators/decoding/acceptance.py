"""Counting acceptance: the one definition of tau and of the acceptance rate by position.

A verification is one pass of the verifier after the prompt's. It emits the accepted tokens and one
more, so the mean number of tokens per verification, tau, is 1 plus the accepted tokens per
verification, pooled over all sequences; the token that the prompt's pass emits does not count.

Accepted tokens are counted as the verifier accepted them, also those behind an end-of-text token, a
stop string or the token limit, which are not emitted. Servers (vLLM) count so, and it keeps tau
independent of where texts happen to end. A token outside of the draft's vocabulary can only be
rejected, and counts as that.
"""

import dataclasses
from typing import Self


@dataclasses.dataclass
class AcceptanceCounts:
    """Counts of many verifications; ``+`` pools two.

    Attributes:
        verifications: passes of the verifier, the prompt's excluded, each counted once for every
            sequence in it.
        drafts: those that had at least one drafted token to verify. A model drafts in every one; an
            n-gram drafter only where it finds a match.
        drafted_by_position: how many drafts had a first, second, ... token.
        accepted_by_position: in how many the first, second, ... token was accepted.
    """

    verifications: int = 0
    drafts: int = 0
    drafted_by_position: list[int] = dataclasses.field(default_factory=list)
    accepted_by_position: list[int] = dataclasses.field(default_factory=list)

    def record(self, drafted: int, accepted: int) -> None:
        """Counts one sequence's verification.

        Args:
            drafted: tokens that were drafted.
            accepted: how many of them, from the first on, were accepted.

        Raises:
            ValueError: more are accepted than drafted.
        """
        if not 0 <= accepted <= drafted:
            raise ValueError(f"{accepted} of {drafted} drafted tokens are accepted; expected fewer")
        self._widen(drafted)
        self.verifications += 1
        self.drafts += drafted > 0
        for position in range(drafted):
            self.drafted_by_position[position] += 1
        for position in range(accepted):
            self.accepted_by_position[position] += 1

    @property
    def drafted(self) -> int:
        """Tokens drafted."""
        return sum(self.drafted_by_position)

    @property
    def accepted(self) -> int:
        """Drafted tokens accepted."""
        return sum(self.accepted_by_position)

    @property
    def tau(self) -> float:
        """The acceptance length: 1 + accepted tokens per verification; NaN without any."""
        return 1.0 + _ratio(self.accepted, self.verifications)

    @property
    def tau_of_drafts(self) -> float:
        """1 + accepted tokens per draft, as vLLM counts; it leaves out verifications without one.

        The same as ``tau`` for a draft model, larger for an n-gram drafter.
        """
        return 1.0 + _ratio(self.accepted, self.drafts)

    @property
    def rates_by_position(self) -> list[float]:
        """The share of the first, second, ... drafted tokens that were accepted."""
        pairs = zip(self.accepted_by_position, self.drafted_by_position, strict=True)
        return [_ratio(accepted, drafted) for accepted, drafted in pairs]

    def __iadd__(self, other: "AcceptanceCounts") -> Self:
        self._widen(len(other.drafted_by_position))
        self.verifications += other.verifications
        self.drafts += other.drafts
        for position, count in enumerate(other.drafted_by_position):
            self.drafted_by_position[position] += count
        for position, count in enumerate(other.accepted_by_position):
            self.accepted_by_position[position] += count
        return self

    def __add__(self, other: "AcceptanceCounts") -> "AcceptanceCounts":
        total = AcceptanceCounts()
        total += self
        total += other
        return total

    def _widen(self, positions: int) -> None:
        missing = [0] * (positions - len(self.drafted_by_position))
        self.drafted_by_position += missing
        self.accepted_by_position += missing


def _ratio(count: int, total: int) -> float:
    return count / total if total else float("nan")
