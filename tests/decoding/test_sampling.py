"""Sampling: the distributions of transformers' own processors, and draws without rounding traps."""

from typing import Any

import pytest
import torch
from tests.decoding.chi_square import FALSE_ALARM, chi_square
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from speculators.decoding.sampling import GREEDY, RandomNumbers, Sampling, draw
from speculators.ops.tree_verification import LEAST_TEMPERATURE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 7, 100])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
def test_distribution_is_that_of_transformers(
    temperature: float, top_k: int, top_p: float, dtype: torch.dtype
) -> None:
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    processors = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    scores: Any = processors  # its types are torch's legacy ones
    scores = scores(torch.zeros(5, 1, dtype=torch.long), logits.float())
    found = Sampling(temperature, top_k, top_p).distribution(logits)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, scores.softmax(-1), rtol=1e-5, atol=1e-7)
    # Of several leading dimensions as of one.
    stacked = Sampling(temperature, top_k, top_p).distribution(logits.reshape(1, 5, 40))
    assert torch.equal(stacked[0], found)


def test_ties_with_the_last_of_the_top_k_stay() -> None:
    found = Sampling(1.0, top_k=2).distribution(torch.tensor([[3.0, 1.0, 1.0, 0.0]]))
    assert (found > 0).tolist() == [[True, True, True, False]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": 9e-7}, r"temperature is 9e-07; expected 0 \(greedy\), or a .* 1e-06"),
        ({"temperature": 1.0, "top_k": -1}, "top_k is -1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p is 1.1"),
        ({"top_k": 5}, "top_k is 5 and top_p 1.0 with temperature 0"),
        ({"top_p": 0.5}, "which is greedy decoding"),
    ],
)
def test_wrong_settings(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**arguments)  # type: ignore[arg-type]


def test_at_the_least_temperature_there_are_still_numbers() -> None:
    logits = torch.tensor([3.0, 90.0, 89.0])
    assert Sampling(LEAST_TEMPERATURE).distribution(logits).tolist() == [0.0, 1.0, 0.0]


def test_greedy_has_no_distribution() -> None:
    with pytest.raises(ValueError, match="take the argmax"):
        GREEDY.distribution(torch.zeros(1, 3))


def test_draw_inverts_the_cumulative_sum() -> None:
    weights = torch.tensor([[0.0, 2.0, 0.0, 1.0, 1.0, 0.0]])  # not normalised
    uniforms = torch.tensor([0.0, 0.25, 0.499999, 0.5, 0.749999, 0.75, 1 - 2**-53]).double()
    found = draw(weights.expand(len(uniforms), -1), uniforms)
    assert found.tolist() == [1, 1, 1, 3, 3, 4, 4]


def test_draw_never_takes_a_token_without_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(4000, 50, generator=generator)
    weights *= torch.rand(4000, 50, generator=generator) < 0.1
    weights = weights[weights.sum(-1) > 0]
    extremes = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    for u in extremes:
        chosen = draw(weights, u.expand(len(weights)))
        assert bool((weights.gather(1, chosen[:, None]) > 0).all())


def test_draw_has_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.2, 0.0, 0.1, 0.15, 0.05])
    uniforms = torch.rand(50_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = draw(probabilities.expand(50_000, -1), uniforms)
    assert not chi_square(drawn, probabilities).rejected
    wrong = chi_square(drawn, torch.tensor([0.5, 0.2, 0.0, 0.11, 0.15, 0.04]))
    assert wrong.rejected
    assert wrong.power > 0.999


def test_the_chi_square_test_rejects_as_often_as_it_says() -> None:
    # 2000 tests of a correct sampler: p-values are uniform, and none is as small as FALSE_ALARM.
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(
        probabilities.expand(2000, -1), 1000, replacement=True, generator=generator
    )
    p_values = torch.tensor([chi_square(row, probabilities).p_value for row in drawn])
    for level in (0.1, 0.5, 0.9):
        share = float((p_values < level).double().mean())
        assert abs(share - level) < 4 * (level * (1 - level) / 2000) ** 0.5
    assert float(p_values.min()) > FALSE_ALARM / 10


def numbers(generator: torch.Generator | list[torch.Generator], sequences: int) -> RandomNumbers:
    return RandomNumbers(generator, sequences, torch.device("cpu"))


def test_numbers_of_a_sequence_do_not_depend_on_which_others_go_on() -> None:
    both = numbers(torch.Generator().manual_seed(3), 3)
    some = numbers(torch.Generator().manual_seed(3), 3)
    first, second = both.uniforms(4, [0, 1, 2]), both.uniforms(2, [0, 1, 2])
    assert first.shape == (3, 4)
    assert first.dtype == torch.float64
    assert torch.equal(some.uniforms(4, [2]), first[[2]])
    assert torch.equal(some.uniforms(2, [0, 2]), second[[0, 2]])
    assert not torch.equal(first[0, :2], second[0])


def test_numbers_of_own_generators_do_not_depend_on_the_batch() -> None:
    alone = numbers([torch.Generator().manual_seed(7)], 1)
    batch = numbers([torch.Generator().manual_seed(seed) for seed in (5, 7, 9)], 3)
    for count in (3, 1):
        assert torch.equal(batch.uniforms(count, [0, 1, 2])[1:2], alone.uniforms(count, [0]))
    with pytest.raises(ValueError, match="2 generators for 3 sequences"):
        numbers([torch.Generator()] * 2, 3)
