"""The n-gram drafter, against a brute-force search of the history."""

import pytest
import torch

from speculators.decoding.drafters import NgramDrafter, Proposal


def brute_force(history: list[int], count: int, longest: int, shortest: int) -> list[int]:
    """The continuation of the latest occurrence of the longest suffix that occurs before."""
    for size in range(longest, shortest - 1, -1):
        suffix = history[-size:]
        for begin in range(len(history) - size - 1, -1, -1):
            if len(suffix) == size and history[begin : begin + size] == suffix:
                extended = list(history)
                for i in range(count):  # runs into its own copy
                    extended.append(extended[begin + size + i])
                return extended[len(history) :]
    return []


def rows(proposal: Proposal) -> list[list[int]]:
    assert proposal.counts is not None
    tokens = proposal.tokens.tolist()
    return [row[:count] for row, count in zip(tokens, proposal.counts, strict=True)]


@pytest.mark.parametrize(("longest", "shortest"), [(1, 1), (3, 1), (4, 2)])
def test_it_finds_what_a_search_finds(longest: int, shortest: int) -> None:
    generator = torch.Generator().manual_seed(longest)
    lengths = [9, 3, 1]
    prompts = torch.randint(3, (3, 9), generator=generator)
    histories = [prompt[9 - n :] for prompt, n in zip(prompts.tolist(), lengths, strict=True)]
    drafter = NgramDrafter(longest, shortest)
    drafter.prefill(prompts, lengths, torch.tensor([0, 1, 2]), {})
    for history, token in zip(histories, [0, 1, 2], strict=True):
        history.append(token)
    proposed = 0
    for _ in range(12):
        found = rows(drafter.propose(5, None))
        assert found == [brute_force(history, 5, longest, shortest) for history in histories]
        proposed += sum(map(len, found))
        new = torch.randint(3, (3, 4), generator=generator)
        counts = torch.randint(1, 5, (3,), generator=generator).tolist()
        drafter.update(new, counts, {})
        for history, row, count in zip(histories, new.tolist(), counts, strict=True):
            history.extend(row[:count])
    assert proposed > 30


def test_a_repetition_goes_on_for_as_long_as_is_asked() -> None:
    drafter = NgramDrafter()
    drafter.prefill(torch.tensor([[9, 1, 2, 1, 2]]), [5], torch.tensor([1]), {})
    assert rows(drafter.propose(6, None)) == [[2, 1, 2, 1, 2, 1]]


def test_without_a_match_nothing_is_proposed() -> None:
    drafter = NgramDrafter(3, 2)
    drafter.prefill(torch.tensor([[1, 2, 3], [0, 0, 5]]), [3, 1], torch.tensor([4, 5]), {})
    assert drafter.propose(5, None).tokens.shape == (2, 0)


def test_padding_is_no_history_and_ended_rows_leave() -> None:
    drafter = NgramDrafter(2, 1)
    drafter.prefill(
        torch.tensor([[7, 7, 1], [0, 7, 0], [4, 5, 4]]), [3, 2, 3], torch.tensor([7, 8, 5]), {}
    )
    assert rows(drafter.propose(1, None)) == [[1], [], [4]]
    drafter.select([2, 0])
    drafter.update(torch.tensor([[4, 0], [7, 1]]), [1, 2], {})
    assert rows(drafter.propose(2, None)) == [[5, 4], [7, 7]]


@pytest.mark.parametrize(("longest", "shortest"), [(1, 2), (3, 0)])
def test_wrong_lengths(longest: int, shortest: int) -> None:
    with pytest.raises(ValueError, match="1 <= min_match <= max_match"):
        NgramDrafter(longest, shortest)
