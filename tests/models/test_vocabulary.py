"""The draft vocabulary: the most frequent tokens, and the two tensors that say which they are."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speculators.models import VocabularyMapping


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.data())
def test_the_most_frequent_tokens_are_taken(counts: list[int], data: st.DataObject) -> None:
    size = data.draw(st.integers(1, len(counts)))
    mapping = VocabularyMapping.from_counts(torch.tensor(counts), size)
    # By hand: higher counts first, ties and what never occurs by the lower id.
    chosen = sorted(sorted(range(len(counts)), key=lambda i: (-counts[i], i))[:size])
    assert mapping.draft_to_verifier.tolist() == chosen
    assert (torch.arange(size) + mapping.d2t).tolist() == chosen
    assert mapping.t2d.nonzero()[:, 0].tolist() == chosen
    inverse = mapping.verifier_to_draft
    for token in range(len(counts)):
        assert inverse[token] == (chosen.index(token) if token in chosen else -1)
    covered = sum(counts[token] for token in chosen)
    assert mapping.coverage(torch.tensor(counts)) == (covered / sum(counts) if any(counts) else 0)


def test_ids_come_in_any_order() -> None:
    mapping = VocabularyMapping.from_ids(torch.tensor([7, 2, 5]), 9)
    assert mapping.d2t.tolist() == [2, 4, 5]


@pytest.mark.parametrize(
    ("counts", "size", "message"),
    [
        (torch.tensor([1, 2]), 3, "has 3 tokens; expected from 1 to the verifier's 2"),
        (torch.tensor([1, 2]), 0, "has 0 tokens"),
        (torch.tensor([1.0, 2.0]), 1, r"counts are torch.float32 \[2\]"),
        (torch.tensor([1, -2]), 1, "not negative"),
        (torch.tensor([[1, 2]]), 1, r"\[1, 2\]"),
    ],
)
def test_wrong_counts_are_refused(counts: torch.Tensor, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VocabularyMapping.from_counts(counts, size)


@pytest.mark.parametrize(
    ("d2t", "t2d", "message"),
    [
        ([0, 0], [True, False, True], "disagree"),
        ([0, -1], [True, False, False], "names 1 different tokens with 2 entries"),
        ([0, 2], [True, False, False], "d2t sends the draft's token 1 to the verifier's token 3"),
        ([-1, 0], [True, True, False], "token 0 to the verifier's token -1"),
    ],
)
def test_tensors_that_disagree_are_refused(d2t: list[int], t2d: list[bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VocabularyMapping(torch.tensor(d2t), torch.tensor(t2d))


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"d2t is torch.int32 \[1\]; expected one row of torch.int64"
    ):
        VocabularyMapping(torch.zeros(1, dtype=torch.int32), torch.tensor([True]))
