"""One update: accumulation, autocast, clipping, noise, and numbers that are not finite."""

import copy
import dataclasses
import pathlib
from typing import Any

import pytest
import torch
from tests.training.tiny_runs import (
    make_draft,
    make_objective,
    make_store,
    make_verifier,
    settings_of,
)
from torch import Tensor

from speculators.data.batch import PackedBatch
from speculators.data.loader import PackedBatches
from speculators.models import SpeculatorModel
from speculators.models.verifier import Verifier
from speculators.training.optimizers import OPTIMIZERS, Parameters
from speculators.training.sums import RowSums
from speculators.training.update import NotFiniteError, UpdateOutput, Updater
from speculators.training.update_batches import UpdateBatches


@pytest.fixture(scope="module")
def verifier() -> Verifier:
    return make_verifier()


@pytest.fixture(scope="module")
def batch(verifier: Verifier, tmp_path_factory: pytest.TempPathFactory) -> PackedBatch:
    """All documents in one batch; the rows have different numbers of learnable tokens."""
    store = make_store(tmp_path_factory.mktemp("store"), verifier)
    batches = PackedBatches(store, row_tokens=48, rows_per_batch=100)
    (batch,) = batches.epoch(0)
    batch.loss_mask[1, 10:] = False
    assert len({int(mask.sum()) for mask in batch.loss_mask}) > 2
    return batch


def _rows(batch: PackedBatch, rows: slice) -> PackedBatch:
    return PackedBatch(
        batch.input_ids[rows],
        batch.loss_mask[rows],
        batch.position_ids[rows],
        batch.document_ids[rows],
        {layer: stream[rows] for layer, stream in batch.hidden_states.items()},
    )


def _updater(draft: SpeculatorModel, verifier: Verifier, **changes: Any) -> Updater:
    noise = changes.pop("feature_noise", 0.0)
    objective = make_objective(draft, verifier, feature_noise=noise)
    settings = settings_of(changes)
    parameters = Parameters.of(draft)
    optimizer = OPTIMIZERS["adamw"](parameters, settings.optimizer)
    return Updater(objective, parameters.all, optimizer, settings)


def _update(
    draft: SpeculatorModel, verifier: Verifier, batches: list[PackedBatch], **changes: Any
) -> tuple[UpdateOutput, list[Tensor]]:
    """What an update did, and the gradient that the optimizer was given."""
    updater = _updater(draft, verifier, **changes)
    gradients: list[Tensor] = []
    step = updater.optimizer.step

    def spy(factor: float) -> None:
        gradients.extend(p.grad.clone() for p in draft.parameters() if p.grad is not None)
        step(factor)

    updater.optimizer.step = spy  # type: ignore[method-assign]
    return updater(batches, 0, 1.0), gradients


@pytest.mark.parametrize("name", ["eagle", "hass", "eagle3"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_accumulation_gives_what_one_batch_gives(
    name: str, dtype: torch.dtype, verifier: Verifier, batch: PackedBatch
) -> None:
    draft = make_draft(name, verifier).train().to(dtype)
    twin = copy.deepcopy(draft)
    options: dict[str, Any] = {"clip": "none"}
    whole, expected = _update(draft, verifier, [batch], **options)
    parts = [_rows(batch, slice(0, 1)), _rows(batch, slice(1, 2)), _rows(batch, slice(2, None))]
    found, gradients = _update(twin, verifier, parts, **options)
    assert found.tokens == whole.tokens == batch.tokens
    # The verifier's head is float32, and with it the targets.
    close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-6}
    if dtype == torch.float64 and name == "eagle3":
        close = {"rtol": 1e-6, "atol": 1e-9}
    torch.testing.assert_close(found.loss, whole.loss, **close)
    torch.testing.assert_close(found.gradient_norm, whole.gradient_norm, **close)
    torch.testing.assert_close(gradients, expected, **close)
    assert found.sums.rows is not None
    assert whole.sums.rows is not None
    assert torch.equal(found.sums.rows, whole.sums.rows)
    torch.testing.assert_close(found.sums.sums["alpha"], whole.sums.sums["alpha"])


def test_batches_without_learnable_rows_change_nothing(
    verifier: Verifier, batch: PackedBatch
) -> None:
    draft = make_draft("eagle3", verifier).train()
    empty = dataclasses.replace(batch, loss_mask=torch.zeros_like(batch.loss_mask))
    before = copy.deepcopy(draft.state_dict())
    output, _ = _update(draft, verifier, [empty])
    assert (output.loss, output.gradient_norm, output.sums.means()) == (0.0, 0.0, {})
    torch.testing.assert_close(draft.state_dict(), before, rtol=0, atol=0)
    with_it, _ = _update(copy.deepcopy(draft), verifier, [batch, empty])
    without, _ = _update(draft, verifier, [batch])
    assert with_it.loss == without.loss


def test_autocast_computes_in_bfloat16_and_keeps_float32_weights(
    verifier: Verifier, batch: PackedBatch
) -> None:
    draft = make_draft("eagle3", verifier).train()
    seen: set[torch.dtype] = set()
    draft.fc.register_forward_hook(lambda _, __, output: seen.add(output.dtype))
    twin = copy.deepcopy(draft)
    before = draft.fc.weight.detach().clone()
    # Smaller than what bfloat16 could add to most weights.
    output, gradients = _update(
        draft, verifier, [batch], **{"autocast": "bf16", "optimizer.learning_rate": 1e-6}
    )
    assert seen == {torch.bfloat16}
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    assert {parameter.dtype for parameter in draft.parameters()} == {torch.float32}
    assert float((draft.fc.weight - before).count_nonzero()) / before.numel() > 0.9
    exact, expected = _update(twin, verifier, [batch], autocast="auto")
    assert output.loss != exact.loss
    assert output.loss == pytest.approx(exact.loss, rel=0.02)
    for gradient, other in zip(gradients, expected, strict=True):
        assert float(torch.cosine_similarity(gradient.flatten(), other.flatten(), 0)) > 0.98


def test_clipping(verifier: Verifier, batch: PackedBatch) -> None:
    draft = make_draft("eagle3", verifier).train()
    plain, exact = _update(copy.deepcopy(draft), verifier, [batch], clip="none")
    limit = plain.gradient_norm / 4
    by_norm, gradients = _update(
        copy.deepcopy(draft), verifier, [batch], clip="norm", clip_limit=limit
    )
    assert by_norm.gradient_norm == plain.gradient_norm  # the one before clipping
    norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
    assert float(norm) == pytest.approx(limit, rel=1e-3)
    _, gradients = _update(draft, verifier, [batch], clip="value", clip_limit=1e-3)
    for gradient, other in zip(gradients, exact, strict=True):
        assert torch.equal(gradient, other.clamp(-1e-3, 1e-3))


def test_noise_follows_from_seed_and_update(verifier: Verifier, batch: PackedBatch) -> None:
    draft = make_draft("hass", verifier).train()

    def loss(update: int, seed: int = 0) -> float:
        updater = _updater(copy.deepcopy(draft), verifier, feature_noise=0.5, seed=seed)
        return updater([batch], update, 1.0).loss

    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    assert loss(0) == loss(0)
    assert len({loss(0), loss(1), loss(0, seed=1)}) == 3
    assert torch.equal(torch.rand(3), expected)  # others' random numbers go on


def test_a_loss_that_is_not_finite_changes_nothing(verifier: Verifier, batch: PackedBatch) -> None:
    draft = make_draft("eagle3", verifier).train()
    updater = _updater(draft, verifier)
    updater([batch], 0, 1.0)
    before = copy.deepcopy((draft.state_dict(), updater.optimizer.state_dict()))
    states = {layer: torch.full_like(s, torch.inf) for layer, s in batch.hidden_states.items()}
    with pytest.raises(NotFiniteError, match=r"update 2 .* last checkpoint"):
        updater([dataclasses.replace(batch, hidden_states=states)], 1, 1.0)
    after = (draft.state_dict(), updater.optimizer.state_dict())
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_sums_are_pooled_by_rows() -> None:
    sums = RowSums()
    assert sums.means() == {}
    for rows, alpha in (([2, 0], [1.0, 0.0]), ([6, 0], [1.0, 0.0])):
        sums.add(RowSums(torch.tensor(rows), {"alpha": torch.tensor(alpha).double()}))
    assert sums.metrics("train")["train/alpha_1"] == 0.25
    assert torch.isnan(torch.tensor(sums.means()["alpha"][1]))


def test_updates_of_all_epochs(verifier: Verifier, tmp_path: pathlib.Path) -> None:
    store = make_store(tmp_path, verifier)
    batches = PackedBatches(store, row_tokens=40, rows_per_batch=1)
    updates = UpdateBatches(batches, 3)
    counts = [batches.num_batches(epoch) for epoch in range(3)]
    assert any(count % 3 for count in counts)
    expected = [-(-count // 3) for count in counts]
    assert updates.total(3, None) == sum(expected)
    assert updates.total(3, 5) == 5

    def some(epoch: int, batch: int, count: int) -> list[tuple[list[list[int]], int, int, bool]]:
        found = []
        stream = updates.go_on(epoch, batch)
        for _, data in zip(range(count), stream, strict=False):
            ids = [batch.input_ids.flatten().tolist() for batch in data.batches]
            found.append((ids, data.epoch, data.batch, data.ends_epoch))
        stream.close()
        return found

    whole = some(0, 0, sum(expected))
    assert [ends for *_, ends in whole].count(True) == 3
    assert sum(len(ids) for ids, *_ in whole) == sum(counts)
    for place, (_, epoch, batch, _) in enumerate(whole[:-1]):
        assert some(epoch, batch, 2) == whole[place + 1 : place + 3] or place == len(whole) - 2
