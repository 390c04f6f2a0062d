"""A gradient that is given, and the refusal of one that would be lost."""

import pytest
import torch
from torch import Tensor, nn

from speculators.ops.given_gradient import check_sources, with_gradient


def test_the_given_gradient_is_scaled_and_adds_up() -> None:
    x, y = torch.zeros(2, requires_grad=True), torch.zeros(3, requires_grad=True)
    gradients = [torch.tensor([1.0, 2.0]), torch.ones(3), torch.tensor([10.0, 20.0])]
    value = with_gradient(torch.tensor(7.0), [x, y, x], gradients)
    assert value.item() == 7
    (value * 3).backward()
    assert x.grad is not None
    assert y.grad is not None
    assert x.grad.tolist() == [33, 66]
    assert y.grad.tolist() == [3, 3, 3]


def test_there_is_no_second_derivative() -> None:
    x = torch.zeros(2, requires_grad=True)
    value = with_gradient(torch.tensor(1.0), [x], [torch.ones(2)])
    (gradient,) = torch.autograd.grad(value.square(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_without_inputs_it_is_a_number() -> None:
    assert not with_gradient(torch.tensor(1.0), [], []).requires_grad


def network() -> tuple[Tensor, nn.Linear, nn.Linear, Tensor]:
    first, second = nn.Linear(3, 4), nn.Linear(4, 2, bias=False)
    states = torch.randn(5, 3, requires_grad=True)
    return second(first(states).relu()), first, second, states


def test_declared_sources_pass() -> None:
    output, first, second, states = network()
    check_sources(output, [states, *first.parameters(), *second.parameters()], "it")


def test_a_source_that_is_not_declared_is_an_error() -> None:
    output, first, second, states = network()
    with pytest.raises(ValueError, match=r"it lacks 1 tensors of the shapes \[\[4\]\]"):
        check_sources(output, [states, first.weight, *second.parameters()], "it")


def test_a_source_that_is_not_used_is_an_error() -> None:
    output, first, second, states = network()
    unrelated = torch.zeros(7, requires_grad=True)
    every = [states, *first.parameters(), *second.parameters()]
    for unused in (unrelated, unrelated * 2):
        with pytest.raises(ValueError, match=r"it has 1 tensors of the shapes \[\[7\]\]"):
            check_sources(output, [*every, unused], "it")
    with pytest.raises(ValueError, match="has 4 tensors"):
        check_sources(output.detach(), every, "it")


def test_a_computed_source_ends_the_search() -> None:
    weight = torch.randn(3, 3, requires_grad=True)
    scaled = weight * 2
    output = scaled @ torch.ones(3)
    check_sources(output, [scaled], "it")
    with pytest.raises(ValueError, match="lacks 1 tensors"):
        check_sources(output, [], "it")
