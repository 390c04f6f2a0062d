"""The verifier's distributions, restricted to a draft vocabulary and not."""

import pytest
import torch

from speculators.ops.distillation_loss import distillation_loss, row_losses
from speculators.ops.target_distribution import target_distribution

SELECTION = torch.tensor([1, 2, 5])


def test_restriction_renormalises_and_remembers_how_much_is_left() -> None:
    p = torch.tensor([[0.1, 0.3, 0.1, 0.0, 0.4, 0.1], [0.0, 0.5, 0.0, 0.0, 0.0, 0.5]])
    target = target_distribution(p.log(), SELECTION)
    torch.testing.assert_close(target.log_p.exp(), torch.tensor([[0.6, 0.2, 0.2], [0.5, 0, 0.5]]))
    torch.testing.assert_close(target.coverage, torch.tensor([0.5, 1.0]))
    assert target.argmax.tolist() == [4, 1]
    assert target.to_draft_ids(torch.tensor([[0, 1], [5, 2]])).tolist() == [[-1, 0], [2, 1]]
    assert target.to_verifier_ids(torch.tensor([2, 0])).tolist() == [5, 1]


def test_one_vocabulary_is_the_identity() -> None:
    target = target_distribution(torch.tensor([[0.0, 7.0, -1.0]], dtype=torch.bfloat16))
    assert target.log_p.dtype == torch.float32
    assert target.coverage.tolist() == [1]
    ids = torch.tensor([2, 0, 1])
    assert target.to_draft_ids(ids).tolist() == target.to_verifier_ids(ids).tolist() == [2, 0, 1]


def test_a_vanishing_share_is_renormalised_exactly() -> None:
    """The draft's tokens have p = exp(-1e4), 0 in any format, but among them the odds are known."""
    logits = torch.tensor([[1e4, 0.0, 1.0, 0.0, 0.0, 2.0]])
    target = target_distribution(logits, SELECTION)
    torch.testing.assert_close(
        target.log_p, torch.tensor([[0.0, 1.0, 2.0]]).log_softmax(-1), rtol=1e-5, atol=2e-3
    )
    assert target.coverage.tolist() == [0]


def test_selected_rows_are_compared_as_in_the_whole() -> None:
    torch.manual_seed(0)
    draft, logits = torch.randn(8, 3), torch.randn(8, 6, requires_grad=True)
    tokens, rows = torch.randint(6, (8,)), torch.tensor([4, 0, 4, 7])
    losses = {"kl": 1.0, "ce_data": 0.5, "nla": 0.1}
    target = target_distribution(logits, SELECTION).select(rows)
    found = row_losses(draft[rows], target, losses, data_tokens=tokens[rows])
    whole = distillation_loss(
        draft, logits, losses, draft_to_verifier=SELECTION, data_tokens=tokens
    )
    assert not found.loss.requires_grad  # the targets are no way for gradient
    for field in ("loss", "alpha", "greedy_acceptance", "agreement", "in_vocabulary"):
        assert torch.equal(getattr(found, field), getattr(whole, field)[rows]), field


def test_the_most_likely_tokens_are_found_once() -> None:
    torch.manual_seed(0)
    target = target_distribution(torch.randn(5, 6), SELECTION)
    assert target.top(2) is target.top(2)
    for count in (1, 2, 3, 8):
        expected = target.log_p.topk(min(count, 3)).values
        found = target.log_p.gather(1, target.top(count)).sort(descending=True).values
        assert torch.equal(found, expected)
    rows = torch.tensor([3, 3, 0])
    assert torch.equal(target.select(rows).top(2), target.top(2)[rows])


def test_among_equal_tokens_the_choice_stays() -> None:
    target = target_distribution(torch.zeros(3, 40))
    before = target.top(7)
    rows = torch.tensor([2, 0])
    assert all(len(set(row)) == 7 for row in before.tolist())
    assert torch.equal(target.select(rows).top(7), before[rows])


def test_the_likeliest_token_that_the_draft_has() -> None:
    logits = torch.tensor([[9.0, 0.0, 1.0, 0.0, 0.0, 2.0], [0.0, 3.0, 1.0, 0.0, 0.0, 2.0]])
    target = target_distribution(logits, SELECTION)
    assert target.best.tolist() == [-1, 0]
    assert target.likeliest.tolist() == [2, 0]
    whole = target_distribution(logits)
    assert whole.best.tolist() == whole.likeliest.tolist() == [0, 1]


def test_an_empty_selection_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"\[0\], expected \[W\] with W >= 1"):
        target_distribution(torch.zeros(2, 3), SELECTION[:0])
