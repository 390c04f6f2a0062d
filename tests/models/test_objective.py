"""What drafts learn, against definitions written out plainly: one document, one row at a time."""

import dataclasses
from typing import Any

import pytest
import torch
from tests.models.verifier_models import VOCABULARY, make, tokens
from torch import Tensor
from torch.nn import functional

from speculators.models import DraftAttention, SpeculatorModel, VocabularyMapping, find_algorithm
from speculators.models.objective import ObjectiveSettings, StepwiseObjective, learnable
from speculators.models.verifier import Verifier

LENGTHS = (9, 4, 7, 1)  # documents in one row, then padding
PADDING = 3


@dataclasses.dataclass(frozen=True)
class Batch:
    """One row of packed documents."""

    input_ids: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    document_ids: Tensor
    hidden_states: dict[int, Tensor]


@pytest.fixture(scope="module")
def verifier() -> Verifier:
    verifier = Verifier(make("llama"))
    verifier.model.double()
    return verifier


def _batch(verifier: Verifier, layers: tuple[int, ...]) -> Batch:
    documents = [tokens(1, length, seed=length) for length in LENGTHS]
    captured = [verifier.prefill(d, capture=layers).captured for d in documents]
    generator = torch.Generator().manual_seed(7)

    def pad(parts: list[Tensor], fill: int) -> Tensor:
        whole = torch.cat(parts, 1)
        return torch.cat([whole, whole.new_full((1, PADDING, *whole.shape[2:]), fill)], 1)

    return Batch(
        pad(documents, 0),
        pad([torch.rand(d.shape, generator=generator) < 0.8 for d in documents], 0),
        pad([torch.arange(length)[None] for length in LENGTHS], 0),
        pad([torch.full((1, length), i) for i, length in enumerate(LENGTHS)], -1),
        {layer: pad([streams[layer] for streams in captured], 0) for layer in layers},
    )


def _draft(name: str, verifier: Verifier, **options: Any) -> SpeculatorModel:
    torch.manual_seed(3)
    config = find_algorithm(name).new_config(verifier.config, **options)
    mapping = None
    if options.get("draft_vocab_size"):
        mapping = VocabularyMapping.from_counts(tokens(VOCABULARY), options["draft_vocab_size"])
    draft = SpeculatorModel.from_config(config, verifier, vocabulary=mapping).double()
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return draft.eval()


class _PassAttention(DraftAttention):
    """HASS, section 3.2, in its own numbering: pass j (from 1) has one row per position.

    Row t of pass j sees rows up to t - (j - 1) of pass 1, and row t - (j - 1) + i of pass 1 + i.
    """

    def __init__(self) -> None:
        self.passes: list[tuple[Tensor, Tensor]] = []

    def begin(self, position_ids: Tensor) -> None:
        pass

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        del layer, window
        groups = q.shape[1] // k.shape[1]
        self.passes.append((k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)))
        j = len(self.passes)
        output = torch.zeros_like(q)
        for t in range(j - 1, q.shape[2]):
            last = t - (j - 1)
            seen = [(0, row) for row in range(last + 1)] + [(i, last + i) for i in range(1, j)]
            keys = torch.stack([self.passes[i][0][:, :, row] for i, row in seen], 2)
            values = torch.stack([self.passes[i][1][:, :, row] for i, row in seen], 2)
            scores = (keys * q[:, :, t, None]).sum(-1) * scale
            output[:, :, t] = (scores.softmax(-1)[..., None] * values).sum(2)
        return output.transpose(1, 2)


def _passes(
    draft: SpeculatorModel, ids: Tensor, states: Tensor, count: int
) -> list[tuple[Tensor, Tensor]]:
    """(states, logits) of each pass over one document, row t with token t + 1 at position t."""
    attention = _PassAttention()
    following = torch.cat([ids[:, 1:], ids[:, :1]], 1)
    positions = torch.arange(ids.shape[1])[None]
    results = []
    inputs = states
    for _ in range(count):
        output = draft(following, inputs, positions, attention)
        results.append((output.states, draft.logits(output.head_input)))
        # Pass j takes at row t what pass j - 1 put out at row t - 1, the state of the same token.
        inputs = torch.cat([states[:, :1], output.states[:, :-1]], 1)
    return results


def _expected(
    draft: SpeculatorModel, verifier: Verifier, batch: Batch, settings: ObjectiveSettings
) -> tuple[Tensor, list[int]]:
    """The loss, and how many rows each step learns from, from the definitions."""
    n = verifier.num_layers
    mapping = draft.vocabulary
    kept = torch.arange(VOCABULARY) if mapping is None else mapping.draft_to_verifier
    sums, rows, start = [torch.zeros(()).double() for _ in range(settings.steps)], [], 0
    counts = [0] * settings.steps
    for length in LENGTHS:
        part = slice(start, start + length)
        start += length
        ids, mask = batch.input_ids[:, part], batch.loss_mask[0, part]
        f = verifier.model(ids, output_hidden_states=True).hidden_states[-1]
        verifier_logits = verifier.model(ids).logits[0]
        streams = {layer: states[:, part] for layer, states in batch.hidden_states.items()}
        inputs = draft.spec.draft_input(streams, verifier.head, draft.config)
        for s, (states, logits) in enumerate(
            _passes(draft, ids, draft.combine_hidden_states(inputs), settings.steps)
        ):
            for row in range(s, length - 2):  # in HASS's numbering: token row + 1 in, row + 2 out
                if not (mask[row + 1 - s] and mask[row + 2]):
                    continue
                counts[s] += 1
                target = verifier_logits[row + 1]
                if int(target.argmax()) not in kept.tolist():
                    continue
                p, log_q = target[kept].softmax(-1), logits[0, row].log_softmax(-1)
                loss = {
                    "kl": (p * (p.log() - log_q)).sum(),
                    "ce_soft": -(p * log_q).sum(),
                    "topk": -(p * log_q)[p.topk(settings.top_k).indices].sum(),
                }
                sums[s] = sums[s] + sum(w * loss[name] for name, w in settings.losses.items())
                if settings.smooth_l1:
                    distance = functional.smooth_l1_loss(states[0, row], f[0, row + 1])
                    sums[s] = sums[s] + settings.smooth_l1 * distance
    rows = counts
    assert n in batch.hidden_states
    total = sum(
        settings.step_decay**s * value / max(count, 1)
        for s, (value, count) in enumerate(zip(sums, counts, strict=True))
    )
    assert isinstance(total, Tensor)
    return total, rows


CASES: dict[str, tuple[str, dict[str, Any], ObjectiveSettings]] = {
    "eagle": ("eagle", {}, find_algorithm("eagle").objective_settings),
    "hass": (
        "hass",
        {"layernorms": True},
        find_algorithm("hass").objective_settings.model_copy(update={"detach_states": False}),
    ),
    "hass_four_passes": (
        "hass",
        {},
        ObjectiveSettings(steps=4, losses={"topk": 0.7}, top_k=3, smooth_l1=0.5),
    ),
    "eagle3": ("eagle3", {}, find_algorithm("eagle3").objective_settings),
    "eagle3_reduced": (
        "eagle3",
        {"draft_vocab_size": 40, "num_layers": 1, "norm_output": True},
        ObjectiveSettings(steps=2, step_decay=0.5, losses={"kl": 1.0, "ce_soft": 0.3}),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_the_definition(name: str, verifier: Verifier) -> None:
    algorithm, options, settings = CASES[name]
    draft = _draft(algorithm, verifier, **options)
    objective = StepwiseObjective(draft, verifier.head, settings)
    batch = _batch(verifier, objective.capture_layers(verifier.num_layers))
    expected, rows = _expected(draft, verifier, batch, settings)
    output = objective(batch)
    assert output.rows.tolist() == objective.rows(batch).tolist() == rows
    assert rows[0] >= 5
    # The verifier's norm computes in float32, whatever comes in.
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-6, atol=1e-6)
    parameters = [p for p in draft.parameters() if p.requires_grad]
    found = torch.autograd.grad(output.loss, parameters)
    wanted = torch.autograd.grad(expected, parameters)
    for tensor, reference in zip(found, wanted, strict=True):
        assert float(reference.abs().max()) > 0
        torch.testing.assert_close(tensor, reference, rtol=1e-4, atol=1e-6)


def test_detached_states_give_no_gradient_to_the_step_before(verifier: Verifier) -> None:
    draft = _draft("hass", verifier)
    settings = ObjectiveSettings(steps=2, losses={"kl": 1.0}, detach_states=True)
    batch = _batch(verifier, (verifier.num_layers,))
    draft.zero_grad()
    attached = settings.model_copy(update={"detach_states": False})
    gradients = []
    for chosen in (settings, attached):
        loss = StepwiseObjective(draft, verifier.head, chosen)(batch).loss
        gradients.append(torch.autograd.grad(loss, list(draft.parameters())))
    one_step = StepwiseObjective(draft, verifier.head, ObjectiveSettings(steps=1))(batch).loss
    assert torch.isfinite(one_step)
    different = [not torch.allclose(a, b) for a, b in zip(*gradients, strict=True)]
    assert any(different)


def test_rows_outside_do_not_matter(verifier: Verifier) -> None:
    """Other documents, padding and tokens that are not learned can be anything."""
    draft = _draft("hass", verifier)
    settings = find_algorithm("hass").objective_settings
    objective = StepwiseObjective(draft, verifier.head, settings)
    batch = _batch(verifier, (verifier.num_layers,))
    alone = dataclasses.replace(batch, loss_mask=batch.loss_mask & (batch.document_ids == 0))
    others = batch.document_ids != 0
    changed = dataclasses.replace(
        alone,
        input_ids=torch.where(others, 5, alone.input_ids),
        hidden_states={
            layer: torch.where(others[..., None], 9.0, states)
            for layer, states in alone.hidden_states.items()
        },
    )
    torch.testing.assert_close(objective(changed).loss, objective(alone).loss)


def test_which_rows_learn() -> None:
    """Document of tokens 0 to 5, of which 2, 3 and 5 are to be learned; then another."""
    documents = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1, 1, -1]])
    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1, 1, 0]]).bool()
    batch = Batch(documents, mask, documents, documents, {})
    # Row t: token t + 1 and token t + 2 + k are learned, and of row t's document.
    assert learnable(batch, 0)[0].nonzero()[:, 0].tolist() == [1, 6]
    assert learnable(batch, 1)[0].nonzero()[:, 0].tolist() == [2]
    assert learnable(batch, 2)[0].nonzero()[:, 0].tolist() == [1]
    assert not learnable(batch, 3).any()
    assert not learnable(batch, 9).any(), "more steps than rows"


def test_two_batches_are_as_good_as_one(verifier: Verifier) -> None:
    """Sums are divided by the rows of the whole update, so that batches weigh by their rows."""
    draft = _draft("hass", verifier)
    settings = ObjectiveSettings(steps=2, losses={"kl": 1.0}, smooth_l1=1.0)
    objective = StepwiseObjective(draft, verifier.head, settings)
    whole = _batch(verifier, (verifier.num_layers,))
    parts = [
        dataclasses.replace(whole, loss_mask=whole.loss_mask & (whole.document_ids == document))
        for document in range(len(LENGTHS))
    ]
    total = objective.rows(whole)
    assert torch.equal(sum(objective.rows(part) for part in parts), total)  # type: ignore[arg-type]
    summed = sum(objective(part, total).loss.item() for part in parts)
    assert summed == pytest.approx(objective(whole).loss.item(), rel=1e-6)


def test_noise_is_for_training_alone(verifier: Verifier) -> None:
    draft = _draft("hass", verifier)
    batch = _batch(verifier, (verifier.num_layers,))
    settings = ObjectiveSettings(feature_noise=0.2)
    objective = StepwiseObjective(draft, verifier.head, settings)
    quiet = StepwiseObjective(draft, verifier.head, ObjectiveSettings())(batch).loss
    assert torch.equal(objective(batch).loss, quiet)
    draft.train()
    torch.manual_seed(0)
    first = objective(batch).loss
    assert not torch.equal(first, quiet)
    torch.manual_seed(0)
    assert torch.equal(objective(batch).loss, first)


def test_a_batch_without_a_learnable_row_costs_nothing(verifier: Verifier) -> None:
    draft = _draft("eagle3", verifier)
    settings = find_algorithm("eagle3").objective_settings
    objective = StepwiseObjective(draft, verifier.head, settings)
    batch = _batch(verifier, objective.capture_layers(verifier.num_layers))
    empty = dataclasses.replace(batch, loss_mask=torch.zeros_like(batch.loss_mask))
    output = objective(empty)
    assert output.loss.item() == 0
    assert output.rows.tolist() == [0] * 7
    output.loss.backward()
