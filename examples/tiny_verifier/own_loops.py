"""The loops that the model itself falls into, as training blocks.

Artificial loops (repetition.py) are clean; the model's own are not: a name is varied here and
there, one loop turns into the next. So, every so often in the last part of training, the model
answers a hundred training prompts greedily, and the answers that loop join the batches. Each token
that completes a 4-gram which the answer already has points to that 4-gram's last place, and the
loss is the one for artificial loops. What else stands in such an answer is nothing to learn from
and does not count.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from examples.tiny_verifier.conversations import continuation, renaming, stretches
from examples.tiny_verifier.corpus import SourceFile, distinct_share
from examples.tiny_verifier.measure import Messages, fused_attention, greedy_continuations
from examples.tiny_verifier.repetition import IGNORED
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

NGRAM = 4
LOOPING_BELOW = 0.7
"""Answers with a smaller share of distinct 4-grams are loops; the test asks for 0.5."""

OwnLoop = tuple[list[int], list[int]]
"""Token ids [T + 1] of prompt and answer, and `earlier` [T] as in repetition.py."""


def draw_prompts(
    files: Sequence[SourceFile], names: Sequence[str], count: int, rng: random.Random
) -> list[Messages]:
    """Draw `count` chat prompts from as many training files, a third of them renamings."""
    prompts: list[Messages] = []
    while len(prompts) < count:
        pieces = list(stretches(rng.choice(files).text, rng, 450, 1300))
        if not pieces:
            continue
        stretch = rng.choice(pieces)
        rename = rng.random() < 1 / 3
        made = renaming(stretch[:800], names, rng) if rename else continuation(stretch, rng)
        if made is not None:
            prompts.append(made.prompt)
    return prompts


def mark_repetitions(prompt: list[int], answer: list[int]) -> OwnLoop:
    """Join prompt and answer and point each token that repeats a 4-gram to its last place."""
    last: dict[tuple[int, ...], int] = {}
    earlier = list(range(len(prompt) - 1)) + [IGNORED] * len(answer)
    for end in range(NGRAM, len(answer) + 1):
        gram = tuple(answer[end - NGRAM : end])
        target = len(prompt) + end - 2
        earlier[target] = last.get(gram, IGNORED)
        last[gram] = target
    return prompt + answer, earlier


def find_own_loops(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Messages],
    tokens: int,
) -> list[OwnLoop]:
    """Answer `prompts` greedily with `tokens` tokens each; return the answers that loop."""
    with fused_attention(model):
        answers = greedy_continuations(model, tokenizer, prompts, tokens)
    found: list[OwnLoop] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        if distinct_share(answer, NGRAM) < LOOPING_BELOW:
            text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            start = tokenizer.encode(str(text), add_special_tokens=False)
            found.append(mark_repetitions(start, answer))
    return found


def add_own_loops(
    window_BT: Tensor,
    earlier_BT: Tensor,
    share: float,
    loops: Sequence[OwnLoop],
    rng: random.Random,
) -> None:
    """Overwrite the beginnings of the last blocks of a batch, in place, with drawn loops.

    Args:
        window_BT: token ids, shape [B, T + 1].
        earlier_BT: see repetition.py, shape [B, T].
        share: share of the blocks that get a loop.
        loops: what to draw from.
        rng: decides which.
    """
    rows = round(share * window_BT.shape[0]) if loops else 0
    for row in range(window_BT.shape[0] - rows, window_BT.shape[0]):
        ids, earlier = rng.choice(loops)
        size = min(len(ids), window_BT.shape[1])
        window_BT[row, :size] = torch.tensor(ids[:size])
        earlier_BT[row, : size - 1] = torch.tensor(earlier[: size - 1])
        # The block goes on with another text, which nobody could have foreseen.
        earlier_BT[row, size - 1 : size] = IGNORED
