"""The verifier writes the responses: a draft then learns from texts that its verifier would write.

Drafts are judged by what the verifier says, not by what stands in a dataset. A prompt is the
conversation up to its last assistant turn, whose text is replaced. Prepared data has token ids and
loss masks, so "last assistant turn" is the last run of learnable tokens; earlier turns of the
assistant stay as context and are learned no more. A row without learnable tokens is a prompt as a
whole: the data must then have been prepared with the generation prompt added, or the verifier
continues the user's turn.

Our own plain decoding does the work: texts that have ended leave the batch, and no settings that
come with checkpoints (top-k, repetition penalties) change the verifier's distribution.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from speculators.decoding.generation import generate
from speculators.decoding.sampling import GREEDY, Sampling
from speculators.decoding.settings import GenerationSettings
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


def write_responses(
    verifier: Verifier, prompts: Sequence[Tensor], settings: RegenerateSettings, seed: int
) -> list[Tensor]:
    """Writes a response to each prompt, in one batch.

    Args:
        verifier: the model.
        prompts: int64 ``[L]`` each, at least one token.
        settings: see there; its own seed is not read here.
        seed: of this batch; torch's own generators are not used.

    Returns:
        int64 ``[M]`` on the CPU for each, 1 <= M <= ``max_new_tokens``; the token that ends a text
        is included where it was written.

    Raises:
        ValueError: a prompt leaves no room for an answer among the verifier's positions.
    """
    greedy = settings.temperature == 0
    generation = GenerationSettings(
        max_new_tokens=settings.max_new_tokens,
        sampling=GREEDY if greedy else Sampling(settings.temperature, top_p=settings.top_p),
    )
    generator = torch.Generator(verifier.device).manual_seed(seed)
    responses: list[Tensor] = []
    for alike in verifier.readable_together(prompts):
        texts = [prompt.tolist() for prompt in alike]
        output = generate(verifier, None, texts, generation, generator=generator)
        responses += map(torch.tensor, output.sequences)
    return responses
