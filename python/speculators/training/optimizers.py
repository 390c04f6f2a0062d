"""Optimizers by name, each as one object, however many of torch's it is made of.

Muon is for matrices between hidden states (Jordan et al., 2024); embeddings, heads, norms and
biases are AdamW's. Muon's updates are scaled to the root mean square of AdamW's (Liu et al., "Muon
is scalable for LLM training", 2025, section 2.2), so that one learning rate and one weight decay
serve both.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from speculators.models.speculator_model import SpeculatorModel
from speculators.training.settings import OptimizerSettings


@dataclasses.dataclass(frozen=True)
class Parameters:
    """The trained parameters of a draft by kind; each is in one of the lists.

    Attributes:
        matrices: weights between hidden states, two-dimensional.
        ends: embeddings and heads, and what else has two dimensions or more.
        vectors: norms and biases.
    """

    matrices: list[nn.Parameter]
    ends: list[nn.Parameter]
    vectors: list[nn.Parameter]

    @classmethod
    def of(cls, draft: SpeculatorModel) -> "Parameters":
        """Sorts a draft's parameters that require a gradient.

        Raises:
            ValueError: there are none.
        """
        found = cls([], [], [])
        linear = {
            id(module.weight) for module in draft.modules() if isinstance(module, nn.Linear)
        } - {id(parameter) for parameter in draft.head_parameters()}
        for parameter in draft.parameters():
            if not parameter.requires_grad:
                continue
            if parameter.ndim < 2:
                found.vectors.append(parameter)
            else:
                (found.matrices if id(parameter) in linear else found.ends).append(parameter)
        if not found.all:
            raise ValueError(
                f"no parameter of {type(draft).__name__} requires a gradient; expected some to "
                "train"
            )
        return found

    @property
    def all(self) -> list[nn.Parameter]:
        """All of them."""
        return [*self.matrices, *self.ends, *self.vectors]


class Optimizer:
    """Several optimizers of torch as one.

    Args:
        parts: torch's; each at its highest learning rate.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
        self._highest = [[float(group["lr"]) for group in part.param_groups] for part in parts]

    def step(self, factor: float) -> None:
        """Makes an update at ``factor`` times the highest learning rates."""
        for part, highest in zip(self.parts, self._highest, strict=True):
            for group, rate in zip(part.param_groups, highest, strict=True):
                group["lr"] = rate * factor
            part.step()

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on: tensors and plain values."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state.

        Raises:
            ValueError: it is of other optimizers, or of other parameters.
        """
        if len(state["parts"]) != len(self.parts):
            raise ValueError(
                f"the optimizer's state has {len(state['parts'])} parts; expected "
                f"{len(self.parts)}, from a run with the same settings"
            )
        for part, part_state in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(part_state)


def adamw(parameters: Parameters, settings: OptimizerSettings) -> Optimizer:
    """AdamW for everything."""
    matrices: list[Tensor] = [*parameters.matrices, *parameters.ends]
    return Optimizer([_adamw(matrices, parameters.vectors, settings)])


def muon(parameters: Parameters, settings: OptimizerSettings) -> Optimizer:
    """Muon for matrices between hidden states, AdamW for the rest."""
    parts: list[torch.optim.Optimizer] = []
    if parameters.matrices:
        parts.append(
            torch.optim.Muon(
                parameters.matrices,
                lr=settings.learning_rate,
                weight_decay=settings.weight_decay,
                momentum=settings.momentum,
                nesterov=settings.nesterov,
                ns_steps=settings.newton_schulz_steps,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    if parameters.ends or parameters.vectors:
        parts.append(_adamw(parameters.ends, parameters.vectors, settings))
    return Optimizer(parts)


OPTIMIZERS: dict[str, Callable[[Parameters, OptimizerSettings], Optimizer]] = {
    "adamw": adamw,
    "muon": muon,
}


def _adamw(
    matrices: Sequence[Tensor], vectors: Sequence[Tensor], settings: OptimizerSettings
) -> torch.optim.AdamW:
    groups = [
        {"params": list(matrices), "weight_decay": settings.weight_decay},
        {"params": list(vectors), "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
    )
