"""What a draft that drafts step by step learns, and from which row: written once, for all types.

Row t takes token t + 1 and the verifier's state of token t. At step k (from 0) it takes token
t + 1 + k of the text and its own output of step k - 1, and learns the verifier's distribution of
token t + 2 + k, which the verifier's head makes from its state of token t + 1 + k. That is
train-time test (EAGLE-3, section 3.2) and, with other row numbers, harmonised context alignment
(HASS, section 3.2); with one step it is EAGLE-1's training.

Row t learns at step k where it will be used: its document has tokens t + 1 and t + 2 + k, and both
are the assistant's.
"""

import dataclasses
from collections.abc import Iterable
from typing import Protocol

import pydantic
import torch
from torch import Tensor

from speculators.models.draft_attention import TrainTimeTestAttention
from speculators.models.speculator_model import DraftOutput, SpeculatorModel
from speculators.models.verifier.head import VerifierHead
from speculators.ops.chunked_distillation import ROW_MULTIPLE, DraftStep, chunked_distillation
from speculators.ops.distillation_loss import smooth_l1_rows


class ObjectiveSettings(pydantic.BaseModel):
    """What is minimised.

    Attributes:
        steps: drafting steps that each row is trained through.
        step_decay: weight of step k is this to the power k.
        losses: loss on the logits to weight; names as in ``ops.distillation_loss``.
        smooth_l1: weight of the distance between the draft's states and the verifier's normed ones.
        top_k: tokens that the loss ``topk`` looks at.
        detach_states: whether a step's output enters the next without gradient.
        feature_noise: EAGLE-1's noise on the verifier's states: uniform, this wide at 512 rows and
            in inverse proportion to their number otherwise.
        mask_out_of_vocabulary: leave out rows whose most likely token the draft does not know.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    steps: int = pydantic.Field(default=1, ge=1)
    step_decay: float = pydantic.Field(default=1.0, gt=0)
    losses: dict[str, float] = {"kl": 1.0}
    smooth_l1: float = pydantic.Field(default=0.0, ge=0)
    top_k: int = pydantic.Field(default=10, ge=1)
    detach_states: bool = False
    feature_noise: float = pydantic.Field(default=0.0, ge=0)
    mask_out_of_vocabulary: bool = True


class TrainingBatch(Protocol):
    """B rows of T tokens, several documents in each; nothing is shifted."""

    @property
    def input_ids(self) -> Tensor:
        """int64 ``[B, T]``."""

    @property
    def loss_mask(self) -> Tensor:
        """Bool ``[B, T]``, true where the token is to be learned."""

    @property
    def position_ids(self) -> Tensor:
        """int64 ``[B, T]``, from 0 in each document."""

    @property
    def document_ids(self) -> Tensor:
        """int64 ``[B, T]``, the number of the document in its row; -1 for padding."""

    @property
    def hidden_states(self) -> dict[int, Tensor]:
        """Residual stream id to ``[B, T, H]``."""


@dataclasses.dataclass(frozen=True)
class ObjectiveOutput:
    """The loss of a batch, and sums over each step's rows.

    Attributes:
        loss: scalar; its gradient is what an optimizer wants.
        rows: int64 ``[K]``, rows that were learned from.
        sums: float64 ``[K]`` each: ``loss`` and ``smooth_l1`` (unweighted by step), ``alpha`` (the
            acceptance of a sampled draft over the full vocabulary), ``greedy_acceptance`` (the
            verifier's probability of the draft's best token), ``agreement``, ``in_vocabulary``.
    """

    loss: Tensor
    rows: Tensor
    sums: dict[str, Tensor]


def learnable(batch: TrainingBatch, step: int) -> Tensor:
    """Which rows learn at a step: bool ``[B, T]``; see the module."""

    def later(values: Tensor, distance: int, fill: int) -> Tensor:
        shifted = torch.full_like(values, fill)
        shifted[:, : max(values.shape[1] - distance, 0)] = values[:, distance:]
        return shifted

    documents = batch.document_ids
    inside = (later(documents, 2 + step, -1) == documents) & (documents >= 0)
    mask = batch.loss_mask
    return inside & later(mask, 1, 0) & later(mask, 2 + step, 0)


class StepwiseObjective:
    """Trains a draft through its own steps.

    Args:
        draft: the draft model, with its verifier attached if it borrows from it.
        head: the verifier's, frozen; all targets come from it.
        settings: what is minimised.
    """

    def __init__(
        self, draft: SpeculatorModel, head: VerifierHead, settings: ObjectiveSettings
    ) -> None:
        self.draft = draft
        self.head = head
        self.settings = settings
        mapping = draft.vocabulary
        self._draft_to_verifier = None if mapping is None else mapping.draft_to_verifier

    def capture_layers(self, num_layers: int) -> tuple[int, ...]:
        """The residual streams that a batch must have: the draft's, and the last for targets."""
        read = self.draft.spec.capture_layers(self.draft.config, num_layers)
        return tuple(sorted({*read, num_layers}))

    def rows(self, batch: TrainingBatch) -> Tensor:
        """How many rows learn at each step: int64 ``[K]``, on the batch's device."""
        return torch.stack([learnable(batch, k).sum() for k in range(self.settings.steps)])

    def __call__(self, batch: TrainingBatch, total_rows: Tensor | None = None) -> ObjectiveOutput:
        """The loss of a batch.

        Args:
            batch: on the draft's device.
            total_rows: int64 ``[K]``, what each step's sum is divided by: the rows of all batches
                that make up one update. By default this batch's.

        Returns:
            The sum over steps of ``step_decay ** k`` times the mean loss of the step's rows.
        """
        divisors = self.rows(batch) if total_rows is None else total_rows
        powers = torch.arange(self.settings.steps, device=divisors.device)
        weights_K = self.settings.step_decay**powers / divisors.clamp(min=1)
        inputs, normed = self._verifier_states(batch)
        outputs = self._draft(batch, inputs)
        steps = []
        for k, (output, rows) in enumerate(outputs):
            learning = rows.of(learnable(batch, k)) & rows.real
            draft_rows = learning.flatten().nonzero()[:, 0]
            targets = rows.numbers.flatten()[draft_rows] + 1 + k
            head_input = output.head_input.flatten(0, 1)
            steps.append(DraftStep(head_input, draft_rows, targets, weights_K[k]))
        distilled = chunked_distillation(
            steps,
            normed.flatten(0, 1),
            draft_head=self.draft.logits,
            target_head=lambda states: self.head.logits(states.to(self.head.dtype)),
            losses=self.settings.losses,
            draft_parameters=self.draft.head_parameters(),
            draft_to_verifier=self._draft_to_verifier,
            data_tokens=batch.input_ids.roll(-1, 1).flatten(),
            top_k=self.settings.top_k,
            mask_out_of_vocabulary=self.settings.mask_out_of_vocabulary,
        )
        sums = {
            "loss": distilled.loss_sum,
            "alpha": distilled.alpha_sum,
            "greedy_acceptance": distilled.greedy_acceptance_sum,
            "agreement": distilled.agreement_sum,
            "in_vocabulary": distilled.in_vocabulary_sum,
        }
        loss = distilled.loss
        if self.settings.smooth_l1:
            distances_K = _smooth_l1([output.states for output, _ in outputs], normed, steps)
            sums["smooth_l1"] = distances_K.detach().double()
            loss = loss + self.settings.smooth_l1 * (weights_K * distances_K).sum()
        return ObjectiveOutput(loss, distilled.rows, sums)

    @torch.no_grad()
    def _verifier_states(self, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        """What the draft reads, and the normed states that targets are made from."""
        dtype = next(self.draft.parameters()).dtype
        streams = {layer: states.to(dtype) for layer, states in batch.hidden_states.items()}
        inputs = self.draft.spec.draft_input(streams, self.head, self.draft.config)
        return self._noisy(inputs), self.head.norm(streams[max(streams)])

    def _draft(self, batch: TrainingBatch, inputs: Tensor) -> list[tuple[DraftOutput, "_Rows"]]:
        """All rows through step 0, and those that learn then through the others."""
        states = self.draft.combine_hidden_states(inputs)
        attention = TrainTimeTestAttention(batch.document_ids)
        rows = _Rows.all(batch)
        outputs = []
        for k in range(self.settings.steps):
            if k == 1:
                rows = _Rows.learning(batch, range(1, self.settings.steps))
                attention.select(rows.places)
                states = states.gather(1, rows.places[..., None].expand(-1, -1, states.shape[-1]))
            # What the roll brings around belongs to rows that do not learn, and are not looked at.
            tokens = rows.of(batch.input_ids.roll(-1 - k, 1))
            output = self.draft(tokens, states, rows.of(batch.position_ids) + k, attention)
            outputs.append((output, rows))
            states = output.states.detach() if self.settings.detach_states else output.states
        return outputs

    def _noisy(self, states: Tensor) -> Tensor:
        noise = self.settings.feature_noise
        if not noise or not self.draft.training:
            return states
        return states + (torch.rand_like(states) - 0.5) * (noise * 512 / states.shape[1])


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Some rows of a batch, R for each of B; where there are fewer, others fill them up.

    Attributes:
        places: int64 ``[B, R]``, which of the T rows.
        real: bool ``[B, R]``, false for what fills up.
        width: T.
    """

    places: Tensor
    real: Tensor
    width: int

    @classmethod
    def all(cls, batch: TrainingBatch) -> "_Rows":
        """Every row."""
        real = torch.ones_like(batch.document_ids, dtype=torch.bool)
        width = real.shape[1]
        return cls(torch.arange(width, device=real.device).expand_as(real), real, width)

    @classmethod
    def learning(cls, batch: TrainingBatch, steps: Iterable[int]) -> "_Rows":
        """The rows that learn at one of the steps, in their order."""
        learning = torch.stack([learnable(batch, step) for step in steps]).any(0)
        count = max(1, int(learning.sum(1).max()))
        # A few others more: for each new number of rows, matrix products are prepared anew.
        count = min(count + -count % ROW_MULTIPLE, learning.shape[1])
        order = learning.int().argsort(dim=1, descending=True, stable=True)[:, :count]
        return cls(order, learning.gather(1, order), learning.shape[1])

    def of(self, values: Tensor) -> Tensor:
        """The values at these rows, of ``[B, T]``."""
        return values.gather(1, self.places)

    @property
    def numbers(self) -> Tensor:
        """Which of all B T rows they are: int64 ``[B, R]``."""
        first = self.width * torch.arange(len(self.places), device=self.places.device)
        return self.places + first[:, None]


def _smooth_l1(states: list[Tensor], normed: Tensor, steps: list[DraftStep]) -> Tensor:
    """Sums of ``smooth_l1_rows`` over each step's rows: ``[K]``."""
    targets = normed.flatten(0, 1)
    return torch.stack(
        [
            smooth_l1_rows(
                predicted.flatten(0, 1)[step.draft_rows], targets[step.target_rows]
            ).sum()
            for predicted, step in zip(states, steps, strict=True)
        ]
    )
