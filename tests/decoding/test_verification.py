"""Acceptance: greedy by hand, sampling by chi-square with planted wrong rules.

The sampled tests draft from a Markov chain Q and verify against another, P, so that the joint
distribution of three emitted tokens is known exactly: P's. N = 100,000 samples in 125 cells, false-
alarm rate 1e-4. The planted rules are each rejected at that N with a power above 0.999.
"""

from collections.abc import Callable

import pytest
import torch
from tests.decoding.chi_square import ChiSquare, chi_square
from torch import Tensor

from speculators.decoding.sampling import draw
from speculators.decoding.verification import Verdict, verify_greedy, verify_sampling

V = 5
SAMPLES = 100_000
Rule = Callable[[Tensor, Tensor, Tensor | None, Tensor], Verdict]


def one_hot_logits(tokens: list[list[int]]) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(tokens), V).float()


def test_greedy_accepts_up_to_the_first_difference() -> None:
    logits = one_hot_logits([[1, 2, 3, 4]] * 5)
    drafted = torch.tensor([[1, 2, 3], [1, 2, 0], [0, 2, 3], [1, 0, 3], [1, 2, 3]])
    verdict = verify_greedy(logits, drafted)
    assert verdict.accepted.tolist() == [3, 2, 0, 1, 3]
    assert verdict.next_tokens.tolist() == [4, 3, 1, 2, 4]


def test_greedy_takes_no_more_tokens_than_are_real() -> None:
    logits = one_hot_logits([[1, 2, 3]] * 3)
    verdict = verify_greedy(logits, torch.tensor([[1, 2]] * 3), counts=[0, 1, 2])
    assert verdict.accepted.tolist() == [0, 1, 2]
    assert verdict.next_tokens.tolist() == [1, 2, 3]


def test_greedy_ties_go_to_the_lowest_id_and_keep_the_logits_dtype() -> None:
    logits = torch.tensor([[[0.0, 7.0, 7.0, 1.0]] * 2])
    assert verify_greedy(logits, torch.tensor([[1]])).accepted.tolist() == [1]
    assert verify_greedy(logits, torch.tensor([[2]])).accepted.tolist() == [0]
    # In bfloat16 these two are equal, though 1.0 + 2**-9 is more in float32.
    close = torch.tensor([[[1.0, 1.0 + 2**-9]] * 2])
    assert verify_greedy(close, torch.tensor([[0]])).accepted.tolist() == [0]
    assert verify_greedy(close.bfloat16(), torch.tensor([[0]])).accepted.tolist() == [1]


def test_nothing_drafted_is_plain_decoding() -> None:
    none = torch.empty(2, 0, dtype=torch.long)
    verdict = verify_greedy(one_hot_logits([[3], [1]]), none)
    assert (verdict.accepted.tolist(), verdict.next_tokens.tolist()) == ([0, 0], [3, 1])
    uniforms = torch.tensor([[0.5], [0.5]], dtype=torch.float64)
    verdict = verify_sampling(one_hot_logits([[3], [1]]), none, None, uniforms)
    assert (verdict.accepted.tolist(), verdict.next_tokens.tolist()) == ([0, 0], [3, 1])


def test_a_token_outside_of_the_verifiers_support_is_never_accepted() -> None:
    p = torch.tensor([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]])
    zeros = torch.zeros(1, 2, dtype=torch.float64)
    for q in (None, torch.tensor([[[0.0, 0.0, 1.0]]])):
        verdict = verify_sampling(p, torch.tensor([[2]]), q, zeros)
        assert (verdict.accepted.tolist(), verdict.next_tokens.tolist()) == ([0], [0])


def test_a_perfect_draft_is_always_accepted() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(1000, 3, V, generator=generator).softmax(-1)
    drafted = torch.randint(V, (1000, 2), generator=generator)
    largest = torch.full((1000, 3), 1 - 2**-53, dtype=torch.float64)
    verdict = verify_sampling(p, drafted, p[:, :2], largest)
    assert verdict.accepted.tolist() == [2] * 1000


def test_a_rejection_by_rounding_alone_draws_from_p() -> None:
    # p is q up to one unit in the last place, so (p - q)+ is empty where the token is rejected.
    q = torch.tensor([[[0.0, 1.0]]])
    p = torch.tensor([[[0.0, 1.0 - 2**-24], [1.0, 0.0]]])
    largest = torch.full((1, 2), 1 - 2**-53, dtype=torch.float64)
    verdict = verify_sampling(p, torch.tensor([[1]]), q, largest)
    assert (verdict.accepted.tolist(), verdict.next_tokens.tolist()) == ([0], [1])


# ---- distributions


def chains(seed: int) -> tuple[Tensor, Tensor]:
    """Two Markov chains: row a holds the distribution of the token after a."""
    generator = torch.Generator().manual_seed(seed)
    tables = torch.randn(2, V, V, generator=generator).softmax(-1)
    return tables[0], tables[1]


def emitted(rule: Rule, drawn: bool) -> ChiSquare:
    """Tests the first three tokens after token 0, of which two are drafted."""
    p, q = chains(seed=1)
    generator = torch.Generator().manual_seed(2)
    uniforms = torch.rand(SAMPLES, 7, generator=generator, dtype=torch.float64)
    before = torch.zeros(SAMPLES, dtype=torch.long)
    tokens: list[Tensor] = []
    for step in range(2):
        token = draw(q[before], uniforms[:, step]) if drawn else q[before].argmax(-1)
        tokens.append(token)
        before = token
    drafted = torch.stack(tokens, 1)
    history = torch.cat([torch.zeros(SAMPLES, 1, dtype=torch.long), drafted], 1)
    verdict = rule(p[history], drafted, q[history[:, :2]], uniforms[:, 2:5])
    sequence = torch.cat([drafted, drafted[:, :1]], 1)
    sequence = sequence.scatter(1, verdict.accepted[:, None], verdict.next_tokens[:, None])
    # What the verification did not emit, later ones would; here P itself does.
    for place in (1, 2):
        later = draw(p[sequence[:, place - 1]], uniforms[:, 4 + place])
        sequence[:, place] = torch.where(verdict.accepted < place, later, sequence[:, place])
    joint = torch.einsum("a,ab,bc->abc", p[0].double(), p.double(), p.double()).flatten()
    return chi_square(sequence @ torch.tensor([V * V, V, 1]), joint)


def test_a_drawn_draft_gives_the_verifiers_distribution() -> None:
    assert not emitted(verify_sampling, drawn=True).rejected


@pytest.mark.parametrize("drawn", [False, True])
def test_a_chosen_draft_gives_the_verifiers_distribution(drawn: bool) -> None:
    # The rule for chosen tokens also holds for drawn ones; it accepts fewer of them.
    def rule(p: Tensor, drafted: Tensor, _: Tensor | None, uniforms: Tensor) -> Verdict:
        return verify_sampling(p, drafted, None, uniforms)

    assert not emitted(rule, drawn).rejected


@pytest.mark.parametrize("drawn", [False, True])
def test_rows_of_different_counts_give_the_verifiers_distribution(drawn: bool) -> None:
    def rule(p: Tensor, drafted: Tensor, q: Tensor | None, uniforms: Tensor) -> Verdict:
        counts = [row % 3 for row in range(SAMPLES)]
        return verify_sampling(p, drafted, q if drawn else None, uniforms, counts)

    assert not emitted(rule, drawn).rejected


def residual_is_p(p: Tensor, drafted: Tensor, q: Tensor | None, uniforms: Tensor) -> Verdict:
    verdict = verify_sampling(p, drafted, q, uniforms)
    weights = p[torch.arange(len(p)), verdict.accepted]
    return Verdict(verdict.accepted, draw(weights, uniforms[:, -1]))


def residual_keeps_the_token(
    p: Tensor, drafted: Tensor, _: Tensor | None, uniforms: Tensor
) -> Verdict:
    verdict = verify_sampling(p, drafted, None, uniforms)
    weights = p[torch.arange(len(p)), verdict.accepted]
    return Verdict(verdict.accepted, draw(weights, uniforms[:, -1]))


def residual_of_the_row_before(
    p: Tensor, drafted: Tensor, q: Tensor | None, uniforms: Tensor
) -> Verdict:
    verdict = verify_sampling(p, drafted, q, uniforms)
    place = (verdict.accepted - 1).clamp(min=0)
    assert q is not None
    rows = torch.arange(len(p))
    weights = (p[rows, verdict.accepted] - q[rows, place]).clamp(min=0) + 1e-9
    weights = torch.where((verdict.accepted < 2)[:, None], weights, p[:, 2])
    return Verdict(verdict.accepted, draw(weights, uniforms[:, -1]))


def one_number_for_all(p: Tensor, drafted: Tensor, q: Tensor | None, uniforms: Tensor) -> Verdict:
    return verify_sampling(p, drafted, q, uniforms[:, -1:].expand(-1, 3))


def a_chosen_token_as_if_drawn(
    p: Tensor, drafted: Tensor, q: Tensor | None, uniforms: Tensor
) -> Verdict:
    return verify_sampling(p, drafted, q, uniforms)


def q_of_another_temperature(
    p: Tensor, drafted: Tensor, q: Tensor | None, uniforms: Tensor
) -> Verdict:
    assert q is not None
    return verify_sampling(p, drafted, (q.log() / 0.8).softmax(-1), uniforms)


@pytest.mark.parametrize(
    ("rule", "drawn"),
    [
        (residual_is_p, True),
        (residual_of_the_row_before, True),
        (one_number_for_all, True),
        (q_of_another_temperature, True),
        (residual_keeps_the_token, False),
        (a_chosen_token_as_if_drawn, False),
    ],
)
def test_planted_wrong_rules_are_noticed(rule: Rule, drawn: bool) -> None:
    found = emitted(rule, drawn)
    assert found.rejected
    assert found.power > 0.999
