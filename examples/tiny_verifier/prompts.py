"""Write the prompts and the held-out excerpt that lie beside the model.

    ./bazelw run //examples/tiny_verifier:prompts

`prompts_train.jsonl` comes from training files, `prompts_eval.jsonl` and `held_out.jsonl` from
held-out ones. Training prompts are chosen by their text alone. Evaluation prompts must also be ones
that the model answers without a loop: where the verifier loops any draft is right, and a benchmark
on such prompts would measure nothing. How many candidates pass is printed and in the model card.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from examples.tiny_verifier.conversations import Conversation, continuation, renaming, stretches
from examples.tiny_verifier.corpus import (
    WORD,
    SourceFile,
    distinct_share,
    read_corpus,
    split,
    stable_hash,
)
from examples.tiny_verifier.data import name_pool
from examples.tiny_verifier.json_lines import write_lines
from examples.tiny_verifier.measure import greedy_continuations
from transformers import (
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

log = logging.getLogger("tiny_verifier")

HERE = Path(__file__).resolve().parent

TRAINING_PROMPTS = 1536
EVALUATION_PROMPTS = 128
EXCERPT_BYTES = 190_000
MINIMUM_ANSWER_CHARACTERS = 420
"""About 128 tokens: the file's own continuation must be as long as the one that is measured."""

LEAST_DISTINCT = 0.6
"""Of the 4-grams in the model's greedy answer; a margin over the 0.5 that the test asks for."""

BATCH = 64
"""Candidates that the model answers at a time."""

MINIMUM_DISTINCT_SHARE = 0.85
"""Of the words' 4-grams in a prompt and its answer; code above it is no list of similar lines."""


def candidates(
    file: SourceFile, task: str, names: Sequence[str], rng: random.Random
) -> list[Conversation]:
    """All conversations of one task that a file yields and that are fit for a prompt."""
    low, high = (700, 1500) if task == "continue" else (450, 800)
    found: list[Conversation] = []
    for stretch in stretches(file.text, rng, low, high):
        if task == "continue":
            conversation = continuation(stretch, rng)
        else:
            conversation = renaming(stretch, names, rng)
        if conversation is None or len(conversation.assistant) < MINIMUM_ANSWER_CHARACTERS:
            continue
        if distinct_share(WORD.findall(stretch), 4) >= MINIMUM_DISTINCT_SHARE:
            found.append(conversation)
    return found


def rank_candidates(files: Sequence[SourceFile], task: str) -> list[dict[str, Any]]:
    """All prompts of one task, so ordered that every file has its turn before one has its second.

    Returns:
        Records with `messages` (one user turn), `task` and `source`, the file's relative path.
    """
    names = name_pool(files)
    ranked: list[tuple[int, int, dict[str, Any]]] = []
    for file in files:
        rng = random.Random(stable_hash("prompt", task, file.path))
        found = candidates(file, task, names, rng)
        rng.shuffle(found)
        order = stable_hash("prompt order", task, file.path)
        for turn, conversation in enumerate(found):
            record = {"messages": conversation.prompt, "task": task, "source": file.path}
            ranked.append((turn, order, record))
    ranked.sort(key=lambda item: item[:2])
    return [record for _, _, record in ranked]


Filter = Callable[[list[dict[str, Any]]], list[bool]]


def choose_prompts(
    files: Sequence[SourceFile], count: int, fit: Filter | None = None
) -> list[dict[str, Any]]:
    """Choose `count` prompts, two continuations for one renaming.

    Args:
        files: where they come from.
        count: how many.
        fit: says of a list of candidates which may be chosen; all, where it is not given.

    Raises:
        ValueError: the files do not yield that many.
    """
    chosen: list[dict[str, Any]] = []
    for task, wanted in (("continue", count - count // 3), ("rename", count // 3)):
        ranked = rank_candidates(files, task)
        taken: list[dict[str, Any]] = []
        tried = 0
        while len(taken) < wanted and tried < len(ranked):
            batch = ranked[tried : tried + (BATCH if fit else wanted)]
            passes = fit(batch) if fit else [True] * len(batch)
            taken.extend(r for r, passed in zip(batch, passes, strict=True) if passed)
            tried += len(batch)
        if len(taken) < wanted:
            raise ValueError(
                f"{len(files)} files yield {len(taken)} prompts ({task}), {wanted} are needed; "
                "ask for fewer prompts"
            )
        log.info("%s: %d prompts, %d candidates tried", task, wanted, tried)
        chosen.extend(taken[:wanted])
    return chosen


def answered_without_loop(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Filter:
    """A filter that keeps prompts whose greedy answer of 128 tokens does not loop."""

    def fit(records: list[dict[str, Any]]) -> list[bool]:
        answers = greedy_continuations(model, tokenizer, [r["messages"] for r in records])
        return [distinct_share(answer, 4) >= LEAST_DISTINCT for answer in answers]

    return fit


def choose_excerpt(files: Sequence[SourceFile], size: int) -> list[dict[str, Any]]:
    """Whole held-out files, in an order given by their paths' hashes, up to `size` bytes."""
    chosen: list[dict[str, Any]] = []
    for file in sorted(files, key=lambda f: stable_hash("excerpt", f.path)):
        if len(file.text.encode()) <= size:
            size -= len(file.text.encode())
            chosen.append({"source": file.path, "text": file.text})
    return chosen


def main(
    folder: Annotated[Path, typer.Option(help="where `model` lies and the files go")] = HERE,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 2,
) -> None:
    """Write prompts_train.jsonl, prompts_eval.jsonl and held_out.jsonl."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(threads)
    model = LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")
    fit = answered_without_loop(model, tokenizer)
    training, held_out = split(read_corpus())
    write_lines(folder / "prompts_train.jsonl", choose_prompts(training, TRAINING_PROMPTS))
    write_lines(folder / "prompts_eval.jsonl", choose_prompts(held_out, EVALUATION_PROMPTS, fit))
    write_lines(folder / "held_out.jsonl", choose_excerpt(held_out, EXCERPT_BYTES))


if __name__ == "__main__":
    typer.run(main)
