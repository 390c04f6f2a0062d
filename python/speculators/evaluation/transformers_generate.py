"""Transformers' own ``generate``: the baseline that everybody knows.

It runs with the evaluation's settings alone: those that come with checkpoints (top-k, repetition
penalties) would give texts whose distribution is not the verifier's.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from speculators.decoding.sampling import Sampling
from speculators.decoding.settings import pad_prompts
from speculators.models.verifier.verifier import Verifier


@torch.no_grad()
def transformers_generate(
    verifier: Verifier,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    max_new_tokens: int,
    seed: int,
    options: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """Continues prompts in one batch, padded on the left.

    Args:
        verifier: the model.
        prompts: token ids, at least one each.
        sampling: greedy decoding, or how to sample.
        max_new_tokens: a text that has not ended by then is cut.
        seed: of the sampling; the state of torch's generators is as before afterwards.
        options: further generation settings, such as ``prompt_lookup_num_tokens``.

    Returns:
        The new tokens of each, with the one that ends the text where it was written.
    """
    ends = verifier.eos_token_ids
    rows, mask = pad_prompts(prompts)
    if mask is None:
        mask = torch.ones_like(rows)
    config = _generation_config(sampling, max_new_tokens, ends, options or {})
    device = verifier.device
    model: Any = verifier.model
    with _settings(model, config), _seeded(seed, device):
        written = model.generate(input_ids=rows.to(device), attention_mask=mask.to(device).long())
    return [_until_end(row, ends) for row in written[:, rows.shape[1] :].tolist()]


def _generation_config(
    sampling: Sampling, max_new_tokens: int, ends: tuple[int, ...], options: Mapping[str, Any]
) -> GenerationConfig:
    how: dict[str, Any] = {"do_sample": False}
    if not sampling.greedy:
        how = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,  # 0: all; left out, the 50 likeliest
            "top_p": sampling.top_p,
        }
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=list(ends) or None,
        pad_token_id=ends[0] if ends else 0,
        **how,
        **options,
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


def _until_end(tokens: list[int], ends: tuple[int, ...]) -> list[int]:
    stop = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: stop + 1]
