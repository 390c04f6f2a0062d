"""Optimizers: which parameter is whose, and a state from which they go on."""

import copy
import io

import pytest
import torch
from tests.training.tiny_runs import make_draft, make_verifier

from speculators.models.verifier import Verifier
from speculators.training.optimizers import OPTIMIZERS, Optimizer, Parameters
from speculators.training.settings import OptimizerSettings

SETTINGS = OptimizerSettings(learning_rate=0.01, weight_decay=0.5)


@pytest.fixture(scope="module")
def verifier() -> Verifier:
    return make_verifier()


def test_kinds_of_eagle3(verifier: Verifier) -> None:
    draft = make_draft("eagle3", verifier)
    draft.embed_tokens.requires_grad_(True)
    names = {id(parameter): name for name, parameter in draft.named_parameters()}
    parameters = Parameters.of(draft)
    assert {names[id(p)] for p in parameters.ends} == {"embed_tokens.weight", "lm_head.weight"}
    attention, mlp = "layers.0.self_attn.{}_proj.weight", "layers.0.mlp.{}_proj.weight"
    assert {names[id(p)] for p in parameters.matrices} == {
        "fc.weight",
        *(attention.format(part) for part in "qkvo"),
        *(mlp.format(part) for part in ("gate", "up", "down")),
    }
    assert all("norm" in names[id(p)] for p in parameters.vectors)
    assert len(parameters.all) == len(names)


def test_frozen_parameters_are_left_out(verifier: Verifier) -> None:
    draft = make_draft("eagle3", verifier)
    found = {id(parameter) for parameter in Parameters.of(draft).all}
    assert id(draft.embed_tokens.weight) not in found
    assert found == {id(p) for p in draft.parameters() if p.requires_grad}
    draft.requires_grad_(False)
    with pytest.raises(ValueError, match="requires a gradient"):
        Parameters.of(draft)


def _random_gradients(parameters: Parameters, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.all:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_muon_is_for_matrices_alone(verifier: Verifier) -> None:
    """Its updates of them are orthogonal, AdamW's of the others are those of AdamW."""
    draft = make_draft("eagle3", verifier)
    twin = copy.deepcopy(draft)
    parameters, others = Parameters.of(draft), Parameters.of(twin)
    settings = SETTINGS.model_copy(update={"weight_decay": 0.0})
    before = [matrix.detach().clone() for matrix in parameters.matrices]
    for found, name in ((parameters, "muon"), (others, "adamw")):
        _random_gradients(found, 0)
        OPTIMIZERS[name](found, settings).step(1.0)
    for one, other in zip(
        parameters.ends + parameters.vectors, others.ends + others.vectors, strict=True
    ):
        assert torch.equal(one, other)
    for matrix, old in zip(parameters.matrices, before, strict=True):
        change = matrix.detach() - old
        scale = settings.learning_rate * 0.2 * max(change.shape) ** 0.5
        singular = torch.linalg.svdvals(change) / scale  # Newton-Schulz brings them near 1
        assert float(singular.median()) > 0.6
        assert float(singular.max()) < 1.4


def test_vectors_do_not_decay(verifier: Verifier) -> None:
    draft = make_draft("eagle3", verifier)
    parameters = Parameters.of(draft)
    for parameter in parameters.all:
        parameter.grad = torch.zeros_like(parameter)
    before = {id(p): p.detach().clone() for p in parameters.all}
    OPTIMIZERS["adamw"](parameters, SETTINGS).step(0.5)
    for parameter in parameters.vectors:
        assert torch.equal(parameter, before[id(parameter)])
    for parameter in parameters.matrices + parameters.ends:
        factor = 1 - 0.5 * SETTINGS.learning_rate * SETTINGS.weight_decay
        torch.testing.assert_close(parameter.detach(), before[id(parameter)] * factor)


def test_the_factor_scales_every_learning_rate(verifier: Verifier) -> None:
    parameters = Parameters.of(make_draft("eagle3", verifier))
    optimizer = OPTIMIZERS["muon"](parameters, SETTINGS)
    for factor in (0.5, 0.25):
        optimizer.step(factor)
        rates = {g["lr"] for part in optimizer.parts for g in part.param_groups}
        assert rates == {factor * SETTINGS.learning_rate}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_going_on_from_a_state(name: str, verifier: Verifier) -> None:
    draft = make_draft("eagle3", verifier)
    optimizer = OPTIMIZERS[name](Parameters.of(draft), SETTINGS)

    def step(parameters: Parameters, optimizer: Optimizer, seed: int) -> None:
        _random_gradients(parameters, seed)
        optimizer.step(1 / (1 + seed))

    step(Parameters.of(draft), optimizer, 0)
    stored = io.BytesIO()
    torch.save(optimizer.state_dict(), stored)
    twin = copy.deepcopy(draft)
    again = OPTIMIZERS[name](Parameters.of(twin), SETTINGS)
    stored.seek(0)
    again.load_state_dict(torch.load(stored, weights_only=True))
    step(Parameters.of(draft), optimizer, 1)
    step(Parameters.of(twin), again, 1)
    for one, other in zip(draft.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_state_of_other_optimizers_is_refused(verifier: Verifier) -> None:
    parameters = Parameters.of(make_draft("eagle3", verifier))
    state = OPTIMIZERS["adamw"](parameters, SETTINGS).state_dict()
    with pytest.raises(ValueError, match=r"1 parts; expected 2"):
        OPTIMIZERS["muon"](parameters, SETTINGS).load_state_dict(state)
