"""Validation: the objective's losses without noise, and tau from real drafting."""

import math
import pathlib

import pytest
import torch
from tests.models.verifier_models import tokens
from tests.training.tiny_runs import (
    PROMPT,
    make_draft,
    make_objective,
    make_store,
    make_verifier,
)

from speculators.data.loader import PackedBatches
from speculators.data.store import HiddenStateStore, StoreWriter
from speculators.decoding import AcceptanceCounts, GenerationSettings, generate
from speculators.models.verifier import Verifier
from speculators.training.validation import (
    Validator,
    acceptance_metrics,
    real_drafting,
    validation_prompts,
)


@pytest.fixture(scope="module")
def verifier() -> Verifier:
    return make_verifier()


@pytest.fixture(scope="module")
def store(verifier: Verifier, tmp_path_factory: pytest.TempPathFactory) -> HiddenStateStore:
    return make_store(tmp_path_factory.mktemp("store"), verifier, documents=6)


def _batches(store: HiddenStateStore, rows: int) -> PackedBatches:
    return PackedBatches(store, row_tokens=48, rows_per_batch=rows)


@pytest.mark.parametrize("name", ["hass", "eagle3"])
def test_losses_are_the_objectives_over_all_documents(
    name: str, verifier: Verifier, store: HiddenStateStore
) -> None:
    draft = make_draft(name, verifier).train()
    objective = make_objective(draft, verifier)
    found = Validator(draft, objective, _batches(store, rows=1))()
    assert draft.training  # left as it was
    (batch,) = _batches(store, rows=100).epoch(0)
    with torch.no_grad():
        expected = objective.__class__(draft.eval(), verifier.head, objective.settings)(batch)
    alphas = (expected.sums["alpha"] / expected.rows).tolist()
    assert found.metrics["validation/loss"] == pytest.approx(float(expected.loss), rel=1e-5)
    assert [found.metrics[f"validation/alpha_{k}"] for k in (1, 2, 3)] == pytest.approx(alphas[:3])
    assert found.metrics["validation/alpha"] == pytest.approx(sum(alphas))
    assert (found.metric, found.score) == ("alpha", found.metrics["validation/alpha"])


def test_validating_twice_gives_the_same_and_keeps_no_graph(
    verifier: Verifier, store: HiddenStateStore
) -> None:
    draft = make_draft("hass", verifier).train()  # with noise
    drafting = real_drafting(verifier, [tokens(5).tolist()], 10)
    validator = Validator(draft, make_objective(draft, verifier), _batches(store, 2), drafting)
    assert validator() == validator()
    assert all(parameter.grad is None for parameter in draft.parameters())


def test_tau_is_the_decoding_loops(verifier: Verifier, store: HiddenStateStore) -> None:
    draft = make_draft("eagle3", verifier)
    prompts = validation_prompts(store, range(6), 4, 100)
    drafting = real_drafting(verifier, prompts, 12)
    found = Validator(draft, make_objective(draft, verifier), _batches(store, 2), drafting)()
    counts = generate(verifier, draft, prompts, GenerationSettings(max_new_tokens=12)).acceptance
    assert (found.metric, found.score) == ("tau", counts.tau)
    assert found.metrics["validation/acceptance_1"] == counts.rates_by_position[0]
    assert found.metrics["validation/acceptance_5"] == counts.rates_by_position[4]


def test_a_lower_loss_is_a_better_score(verifier: Verifier, store: HiddenStateStore) -> None:
    draft = make_draft("eagle3", verifier)
    found = Validator(draft, make_objective(draft, verifier), _batches(store, 2), metric="loss")()
    assert found.score == -found.metrics["validation/loss"]


def test_tau_without_drafting_is_refused(verifier: Verifier, store: HiddenStateStore) -> None:
    draft = make_draft("eagle3", verifier)
    with pytest.raises(ValueError, match=r"verifier and prompts, or another validation\.metric"):
        Validator(draft, make_objective(draft, verifier), _batches(store, 2), metric="tau")


def test_no_verification_has_no_tau() -> None:
    assert math.isnan(acceptance_metrics(AcceptanceCounts())["validation/tau"])


def test_prompts_end_before_the_first_learnable_token(store: HiddenStateStore) -> None:
    prompts = validation_prompts(store, [4, 1, 3], 2, 100)
    assert prompts == [store[number].input_ids[:PROMPT].tolist() for number in (4, 1)]
    assert validation_prompts(store, range(6), 9, PROMPT - 1) == []


def test_prompts_of_texts_are_their_first_halves(
    store: HiddenStateStore, tmp_path: pathlib.Path
) -> None:
    index = store.index.model_copy(update={"shards": [], "complete": False, "num_documents": 3})
    writer = StoreWriter(tmp_path, index)
    masks = [torch.ones(20).bool(), torch.ones(60).bool(), torch.zeros(8).bool()]
    for number, mask in enumerate(masks):
        states = {layer: torch.zeros(len(mask), 32) for layer in index.layer_ids}
        writer.add(number, tokens(len(mask), seed=number), mask, states)
    writer.write_shard()
    writer.finish()
    prompts = validation_prompts(HiddenStateStore.open(tmp_path), range(3), 3, 16)
    assert prompts == [tokens(20, seed=0)[:10].tolist(), tokens(8, seed=2).tolist()]
