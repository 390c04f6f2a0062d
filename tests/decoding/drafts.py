"""Small untrained draft models for a verifier."""

from typing import Any

import torch

from speculators.models.algorithm import find_algorithm
from speculators.models.speculator_model import SpeculatorModel
from speculators.models.verifier.verifier import Verifier


def make_draft(
    algorithm: str, verifier: Verifier, seed: int = 0, **options: Any
) -> SpeculatorModel:
    """A draft whose weights are large enough that its tokens differ."""
    config = find_algorithm(algorithm).new_config(verifier.config, **options)
    torch.manual_seed(seed)
    draft = SpeculatorModel.from_config(config, verifier)
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    return draft.eval()
