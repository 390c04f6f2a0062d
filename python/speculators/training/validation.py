"""What a draft is worth: losses on documents it was not trained on, and drafting as it is served.

The losses are the objective's own. But what a draft is for is tau, and that is measured where it
arises: the verifier continues the beginnings of validation documents, the draft drafts, and the
decoding loop counts what is accepted.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from speculators.data.loader import PackedBatches
from speculators.data.store import HiddenStateStore
from speculators.decoding.acceptance import AcceptanceCounts
from speculators.decoding.generation import generate
from speculators.decoding.settings import GenerationSettings
from speculators.models.speculator_model import SpeculatorModel
from speculators.models.verifier.verifier import Verifier
from speculators.training.sums import RowSums
from speculators.training.update import Objective, autocast

Drafting = Callable[[SpeculatorModel], AcceptanceCounts]
Autocast = Literal["auto", "none", "bf16"]


@dataclasses.dataclass(frozen=True)
class Validation:
    """One validation.

    Attributes:
        metrics: numbers by name.
        metric: which of them says which draft is best.
        score: that number, with such a sign that more is better; NaN where it could not be had.
        loss: which of two drafts with the same score is better: at first, no draft has any token
            accepted.
    """

    metrics: dict[str, float]
    metric: str
    score: float
    loss: float = 0.0


class Validator:
    """Validates a draft.

    Args:
        draft: the draft.
        objective: what it is trained with.
        batches: the validation documents.
        drafting: drafts with it and counts what is accepted; None where there is no verifier.
        metric: what the best draft has the best of; see ``ValidationSettings``.
        autocast: as in training.
    """

    def __init__(
        self,
        draft: SpeculatorModel,
        objective: Objective,
        batches: PackedBatches,
        drafting: Drafting | None = None,
        metric: Literal["auto", "tau", "alpha", "loss"] = "auto",
        autocast: Autocast = "none",
    ) -> None:
        if metric == "tau" and drafting is None:
            raise ValueError(
                "the best draft is to have the best tau, but nothing is drafted; expected a "
                "verifier and prompts, or another validation.metric"
            )
        if metric == "auto":
            metric = "alpha" if drafting is None else "tau"
        self.metric = metric
        self._draft = draft
        self._objective = objective
        self._batches = batches
        self._drafting = drafting
        self._autocast: Autocast = autocast
        self._rows: Tensor | None = None  # learnable rows of all batches; never change

    def __call__(self) -> Validation:
        """Validates; no noise, no gradient, and the draft is left in the mode that it was in."""
        with _evaluating(self._draft), torch.no_grad():
            metrics = self._losses()
            if self._drafting is not None:
                metrics |= acceptance_metrics(self._drafting(self._draft))
        found = metrics.get(f"validation/{self.metric}", math.nan)
        score = -found if self.metric == "loss" else found
        return Validation(metrics, self.metric, score, metrics["validation/loss"])

    def _losses(self) -> dict[str, float]:
        if self._rows is None:
            rows = [self._objective.rows(batch) for batch in self._batches.epoch(0)]
            self._rows = torch.stack(rows).sum(0)
        device = next(self._draft.parameters()).device
        total_rows = self._rows.to(device)
        sums = RowSums()
        loss = 0.0
        for batch in self._batches.epoch(0):
            with autocast(device, self._autocast):
                output = self._objective(batch.to(device), total_rows)
            sums.add(output)
            loss += float(output.loss)
        alphas = [alpha for alpha in sums.means().get("alpha", []) if not math.isnan(alpha)]
        return {
            "validation/loss": loss,
            "validation/alpha": sum(alphas),
            **sums.metrics("validation"),
        }


def acceptance_metrics(counts: AcceptanceCounts) -> dict[str, float]:
    """Tau, and the acceptance of the first, second, ... drafted token."""
    rates = enumerate(counts.rates_by_position, 1)
    return {
        "validation/tau": counts.tau,
        **{f"validation/acceptance_{position}": rate for position, rate in rates},
    }


def real_drafting(
    verifier: Verifier, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> Drafting:
    """Drafting as it is served: greedy, as many tokens at a time as the draft's configuration says.

    Args:
        verifier: on the draft's device.
        prompts: token ids of each.
        max_new_tokens: that each is continued by.
    """
    settings = GenerationSettings(max_new_tokens=max_new_tokens)
    return lambda draft: generate(verifier, draft, prompts, settings).acceptance


def validation_prompts(
    store: HiddenStateStore, documents: Sequence[int], count: int, max_tokens: int
) -> list[list[int]]:
    """The beginnings of documents: up to the first learnable token, or the first half.

    Args:
        store: the documents.
        documents: their numbers.
        count: how many prompts to take.
        max_tokens: longer ones are left out.
    """
    found: list[list[int]] = []
    for number in documents:
        if len(found) == count:
            break
        document = store.read(number, max_tokens + 1)
        learnable = document.loss_mask.nonzero()
        length = int(learnable[0]) if len(learnable) else len(document.loss_mask)
        length = length or store.lengths[number] // 2
        if 0 < length <= max_tokens:
            found.append(document.input_ids[:length].tolist())
    return found


@contextlib.contextmanager
def _evaluating(draft: SpeculatorModel) -> Iterator[None]:
    training = draft.training
    draft.eval()
    try:
        yield
    finally:
        draft.train(training)
