"""Two measures of the verifier: how well it predicts held-out text, and whether it loops.

    ./bazelw run //examples/tiny_verifier:measure

Bits per byte compare models with different tokenizers. The share of distinct 4-grams matters
because a verifier that loops is trivially easy to draft for: every acceptance length measured
against it would be an acceptance length of loops.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from examples.tiny_verifier.corpus import distinct_share
from examples.tiny_verifier.json_lines import read_lines
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).resolve().parent

Messages = list[dict[str, str]]
"""One conversation, as a chat template takes it."""


@contextmanager
def fused_attention(model: LlamaForCausalLM) -> Iterator[None]:
    """Use the fused kernel, on a CPU the faster one where no gradient is wanted."""
    before = model.config._attn_implementation  # noqa: SLF001 - there is no public getter
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.inference_mode()
def bits_per_byte(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    texts: Iterable[str],
    length: int = 512,
    batch: int = 8,
) -> float:
    """Bits the model needs per UTF-8 byte of `texts`, which it sees in windows of `length` tokens.

    Every window begins with the end-of-text token in place of what came before it, and every token
    is predicted exactly once. Longer windows give more context and so fewer bits.

    Returns:
        Sum of the tokens' negative log2 probabilities over the number of bytes.
    """
    windows: list[Tensor] = []
    size = 0
    start = torch.tensor([tokenizer.bos_token_id])
    for text in texts:
        ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False, verbose=False))
        size += len(text.encode())
        windows.extend(torch.cat((start, part)) for part in ids.split(length - 1))
    windows.sort(key=len)
    nats = 0.0
    for i in range(0, len(windows), batch):
        part = windows[i : i + batch]
        ids_BT = torch.nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=-100)
        logits = model(input_ids=ids_BT.clamp(min=0), use_cache=False).logits[:, :-1]
        nats += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), ids_BT[:, 1:].flatten(), reduction="sum"
        ).item()
    return nats / math.log(2) / size


@torch.inference_mode()
def greedy_continuations(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Messages],
    tokens: int = 128,
    batch: int = 32,
    stop: bool = False,
) -> list[list[int]]:
    """Greedy answers to chat prompts.

    Args:
        model: the model that answers.
        tokenizer: its tokenizer, with the chat template.
        prompts: conversations that end with the user's turn.
        tokens: new tokens per answer.
        batch: prompts answered at once.
        stop: let an answer end at its end of turn. Otherwise that token is never chosen and every
            answer has exactly `tokens` tokens, which is the harder test for loops.

    Returns:
        One list of token ids per prompt, without prompt, end of turn and padding.
    """
    rendered = [
        str(tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True))
        for p in prompts
    ]
    ends = [tokenizer.eos_token_id, tokenizer.bos_token_id]
    answers: list[list[int]] = []
    for i in range(0, len(rendered), batch):
        inputs = tokenizer(
            rendered[i : i + batch],
            add_special_tokens=False,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        output = cast("Any", model).generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            eos_token_id=ends,
            pad_token_id=tokenizer.pad_token_id,
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=0 if stop else tokens,
        )
        for row in output[:, inputs["input_ids"].shape[1] :].tolist():
            end = next((j for j, token in enumerate(row) if token in ends), len(row))
            answers.append(row[:end])
    return answers


def share_without_loops(answers: Sequence[Sequence[int]], least: float = 0.5) -> float:
    """Share of the answers whose distinct 4-grams are at least `least` of all their 4-grams."""
    return sum(distinct_share(a, 4) >= least for a in answers) / len(answers)


def main(
    folder: Annotated[Path, typer.Option(help="where model, prompts and excerpt lie")] = HERE,
    samples: Annotated[int, typer.Option(help="continuations to print")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 2,
) -> None:
    """Measure the model that lies beside the prompts and print one JSON object."""
    torch.set_num_threads(threads)
    model = LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")
    texts = [str(r["text"]) for r in read_lines(folder / "held_out.jsonl")]
    records = read_lines(folder / "prompts_eval.jsonl")
    report: dict[str, object] = {
        "parameters": model.num_parameters(),
        "bytes": sum(p.stat().st_size for p in (folder / "model").iterdir()),
        "bits_per_byte": {
            length: round(bits_per_byte(model, tokenizer, texts, length), 4)
            for length in (256, 512, 1024, 2048)
        },
    }
    for task in ("continue", "rename"):
        prompts = [r["messages"] for r in records if r["task"] == task]
        started = time.monotonic()
        answers = greedy_continuations(model, tokenizer, prompts)
        seconds = time.monotonic() - started
        stopped = greedy_continuations(model, tokenizer, prompts, stop=True)
        report[task] = {
            "prompts": len(prompts),
            "without_loops": round(share_without_loops(answers), 4),
            "without_loops_stopping": round(share_without_loops(stopped), 4),
            "mean_tokens_stopping": sum(map(len, stopped)) / len(stopped),
            "tokens_per_second": round(128 * len(prompts) / seconds),
        }
        for prompt, answer in list(zip(prompts, answers, strict=True))[:samples]:
            print(f"--- {prompt[-1]['content']}\n>>> {tokenizer.decode(answer)}\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    typer.run(main)
