"""The suffix drafter: a row drafts from its own text, or from the corpus where that is better."""

from typing import Any

import pytest
import torch

from speculators.decoding.drafters import Proposal
from speculators.decoding.suffix_drafter import SuffixDrafter, suffix_corpus
from speculators.ops.host import SuffixIndex

OPTIONS: dict[str, Any] = {"factor": 3.0, "min_match": 2, "min_probability": 0.1, "doubt": 0.5}


def rows(proposal: Proposal) -> list[list[int]]:
    assert proposal.counts is not None
    assert proposal.probabilities is None
    assert proposal.tokens.dtype == torch.int64
    assert proposal.tokens.shape[1] == max(proposal.counts)
    tokens = proposal.tokens.tolist()
    return [row[:count] for row, count in zip(tokens, proposal.counts, strict=True)]


def begin(drafter: SuffixDrafter, *texts: list[int]) -> None:
    """Begins a batch of texts, whose last tokens are the verifier's."""
    width = max(map(len, texts)) - 1
    prompts = torch.tensor([[9] * (width + 1 - len(text)) + text[:-1] for text in texts])
    nexts = torch.tensor([text[-1] for text in texts])
    drafter.prefill(prompts, [len(text) - 1 for text in texts], nexts, {})


def test_each_row_drafts_from_its_own_text_and_from_the_corpus() -> None:
    generator = torch.Generator().manual_seed(0)

    def some(count: int) -> list[int]:
        return torch.randint(3, (count,), generator=generator).tolist()

    earlier = [some(20) for _ in range(3)]
    drafter = SuffixDrafter(suffix_corpus(earlier), **OPTIONS)
    texts = [some(9), some(3), some(2)]
    begin(drafter, *texts)
    from_corpus = from_text = 0
    for step in range(14):
        if step == 5:
            drafter.select([2, 0])
            texts = [texts[2], texts[0]]
        expected = []
        for text in texts:
            index = SuffixIndex()
            index.extend(text)
            draft = index.propose(5, **OPTIONS)
            other = suffix_corpus(earlier).propose(5, context=text, **OPTIONS)
            expected.append((other if other.score > draft.score else draft).tokens.tolist())
            from_corpus += other.score > draft.score
            from_text += draft.score > other.score
        assert rows(drafter.propose(5, None)) == expected
        new = torch.tensor([some(4) for _ in texts])
        counts = [1 + (step + row) % 4 for row in range(len(texts))]
        drafter.update(new, counts, {})
        texts = [
            text + row[:count] for text, row, count in zip(texts, new.tolist(), counts, strict=True)
        ]
    assert from_corpus > 5
    assert from_text > 3


def test_its_trees_branch() -> None:
    drafter = SuffixDrafter(doubt=0.0)
    begin(drafter, [1, 2, 3, 4, 1, 2, 5, 6, 1, 2], [7, 8])
    tree, nothing = drafter.propose_trees(4)
    assert tree.tokens.tolist() == [5, 3, 6, 4]
    assert tree.parents.tolist() == [-1, -1, 0, 1]
    assert tree.probabilities.tolist() == [0.5] * 4
    assert tree.score == 2.0
    assert len(nothing.tokens) == 0


def test_without_a_match_nothing_is_proposed() -> None:
    drafter = SuffixDrafter(suffix_corpus([[7, 7], []]))
    begin(drafter, [1, 2, 3], [4, 5])
    assert drafter.propose(5, None).tokens.shape == (2, 0)


def test_of_equal_promises_its_own_text_keeps_its_own() -> None:
    drafter = SuffixDrafter(suffix_corpus([[1, 2, 6]]), doubt=0.0)
    begin(drafter, [1, 2, 5, 9, 1, 2])
    assert rows(drafter.propose(1, None)) == [[5]]


def test_it_remembers_what_ended_sequences_wrote() -> None:
    drafter = SuffixDrafter(remember=True)
    begin(drafter, [1, 2, 3], [4, 5, 6])
    drafter.update(torch.tensor([[11, 12, 0], [21, 22, 23]]), [2, 3], {})
    drafter.select([1])  # the first has ended: 3, 11, 12 without its prompt
    drafter.update(torch.tensor([[24]]), [1], {})
    begin(drafter, [3, 11], [2, 3, 11], [22, 23], [1, 2])  # now the other one, too
    assert rows(drafter.propose(3, None)) == [[12], [12], [24], []]
    forgetful = SuffixDrafter()
    begin(forgetful, [1, 2, 3])
    forgetful.update(torch.tensor([[11, 12]]), [2], {})
    begin(forgetful, [3, 11])
    assert rows(forgetful.propose(3, None)) == [[]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_match": 0}, "min_match is 0"),
        ({"factor": -1.0}, "factor is -1"),
        ({"min_probability": 2.0}, "min_probability is 2"),
        ({"doubt": -1.0}, "doubt is -1"),
        ({"capacity": 0}, "capacity is 0"),
    ],
)
def test_wrong_numbers(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SuffixDrafter(**options)
