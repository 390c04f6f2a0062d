"""The verifier writes the responses: a draft then learns from texts that its verifier would write.

Drafts are judged by what the verifier says, not by what stands in a dataset. A prompt is the
conversation up to its last assistant turn, whose text is replaced. Prepared data has token ids and
loss masks, so "last assistant turn" is the last run of learnable tokens; earlier turns of the
assistant stay as context and are learned no more. A row without learnable tokens is a prompt as a
whole: the data must then have been prepared with the generation prompt added, or the verifier
continues the user's turn.

transformers' own ``generate`` does the work, since this is making data. It runs with settings of
ours alone: those that come with checkpoints (top-k, repetition penalties) would give texts whose
distribution is not the verifier's.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from speculators.models.verifier.verifier import Verifier


@dataclasses.dataclass(frozen=True)
class RegenerateSettings:
    """How responses are written.

    Attributes:
        temperature: 0 for the likeliest token each time, 1 for the verifier's own distribution.
        top_p: samples from the likeliest tokens that have this probability together; 1 for all.
        max_new_tokens: a response that has not ended by then is cut.
        seed: of the sampling.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; expected 0 or more")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}; expected more than 0 and at most 1")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; expected 1 or more")


def prompt_length(loss_mask: Tensor) -> int:
    """How many tokens of a document are the prompt, from its loss mask, bool ``[L]``.

    All before the last run of learnable tokens, or the whole where none is learnable.
    """
    learnable = loss_mask.nonzero().flatten()
    if len(learnable) == 0:
        return len(loss_mask)
    begins = learnable[1:][learnable.diff() > 1]
    return int(begins[-1] if len(begins) else learnable[0])


def with_response(prompt: Tensor, response: Tensor) -> tuple[Tensor, Tensor]:
    """The new document: int64 ``[L]``, and its loss mask ``[L]``, true for the response."""
    input_ids = torch.cat([prompt, response])
    return input_ids, torch.arange(len(input_ids)) >= len(prompt)


@torch.no_grad()
def write_responses(
    verifier: Verifier, prompts: Sequence[Tensor], settings: RegenerateSettings, seed: int
) -> list[Tensor]:
    """Writes a response to each prompt, in one batch padded on the left.

    Args:
        verifier: the model.
        prompts: int64 ``[L]`` each, at least one token.
        settings: see there; its own seed is not read here.
        seed: of this batch; the state of torch's generators is as before afterwards.

    Returns:
        int64 ``[M]`` on the CPU for each, 1 <= M <= ``max_new_tokens``; the token that ends a text
        is included where it was written.
    """
    width = max(len(prompt) for prompt in prompts)
    ends = verifier.eos_token_ids
    padding = ends[0] if ends else 0
    rows = torch.full((len(prompts), width), padding)
    mask = torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        rows[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    device = verifier.device
    model: Any = verifier.model
    with _settings(model, _generation_config(settings, ends, padding)), _seeded(seed, device):
        written = model.generate(input_ids=rows.to(device), attention_mask=mask.to(device))
    return [_until_end(row, ends) for row in written[:, width:].cpu()]


def _generation_config(
    settings: RegenerateSettings, ends: tuple[int, ...], padding: int
) -> GenerationConfig:
    sampling: dict[str, Any] = {"do_sample": False}
    if settings.temperature > 0:
        sampling = {
            "do_sample": True,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": 0,  # else the 50 likeliest
        }
    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=list(ends) or None,
        pad_token_id=padding,
        **sampling,
    )


@contextlib.contextmanager
def _settings(model: Any, config: GenerationConfig) -> Iterator[None]:
    """The model's own generation settings are out of the way in the block.

    ``generate`` fills what a given configuration leaves open from the model's, so to give one is
    not enough.
    """
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _until_end(tokens: Tensor, ends: tuple[int, ...]) -> Tensor:
    stops = torch.isin(tokens, torch.tensor(ends, dtype=tokens.dtype)).nonzero()
    return tokens[: int(stops[0]) + 1] if len(stops) else tokens
