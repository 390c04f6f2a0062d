"""Counting: tau and rates by position, by hand."""

import math

import pytest

from speculators.decoding.acceptance import AcceptanceCounts


def counted(*verifications: tuple[int, int]) -> AcceptanceCounts:
    counts = AcceptanceCounts()
    for drafted, accepted in verifications:
        counts.record(drafted, accepted)
    return counts


def test_tau_is_pooled_over_verifications() -> None:
    counts = counted((3, 3), (3, 0), (3, 1), (3, 2))
    assert counts.tau == 1 + 6 / 4
    assert counts.drafted_by_position == [4, 4, 4]
    assert counts.accepted_by_position == [3, 2, 1]
    assert counts.rates_by_position == [3 / 4, 2 / 4, 1 / 4]


def test_a_verification_without_a_draft_counts_for_tau_alone() -> None:
    counts = counted((0, 0), (2, 1), (0, 0), (4, 4))
    assert (counts.verifications, counts.drafts) == (4, 2)
    assert counts.tau == 1 + 5 / 4
    assert counts.tau_of_drafts == 1 + 5 / 2
    assert counts.rates_by_position == [1.0, 1 / 2, 1.0, 1.0]


def test_pooling_is_counting_together() -> None:
    one, other = [(1, 1), (0, 0)], [(4, 2), (3, 3), (4, 0)]
    total = counted(*one) + counted(*other)
    assert total == counted(*one, *other)
    total += counted((5, 5))
    assert total == counted(*one, *other, (5, 5))


def test_nothing_counted_is_not_a_number() -> None:
    assert math.isnan(AcceptanceCounts().tau)
    assert AcceptanceCounts().rates_by_position == []
    assert math.isnan(counted((0, 0)).tau_of_drafts)


@pytest.mark.parametrize(("drafted", "accepted"), [(2, 3), (2, -1), (0, 1)])
def test_more_accepted_than_drafted(drafted: int, accepted: int) -> None:
    with pytest.raises(ValueError, match=f"{accepted} of {drafted} drafted tokens"):
        AcceptanceCounts().record(drafted, accepted)
