"""Hidden states and answers, in tokens per second: transformers in process, and a vLLM server.

    ./bazelw run //benchmarks:hidden_states -- --vllm-python=PATH [--prompts=FILE] [--limit=N]

Without bazel: ``python -m benchmarks.hidden_states``. PATH is the Python of an environment with
vLLM and this library. Both sources do what ``generate`` asks of them: they answer prompts,
greedily, and read the documents that come of it, the same ones for both. vLLM's start is no part.
"""

import os
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from speculators.data.ordering import processing_order
from speculators.data.regenerate import RegenerateSettings
from speculators.data.sources import TransformersSource
from speculators.evaluation.prompts import read_prompts
from speculators.integrations.vllm.hidden_states.source import VllmOptions, make_vllm_source
from speculators.models.verifier.verifier import Verifier

EXAMPLES = pathlib.Path("examples/tiny_verifier")


def main(
    vllm_python: Annotated[str, typer.Option(help="Of an environment with vLLM and this.")],
    verifier: Annotated[str, typer.Option(help="A folder, or a name on the Hub.")] = str(
        EXAMPLES / "model"
    ),
    prompts: Annotated[
        pathlib.Path, typer.Option(help="What is answered and read, as for `evaluate`.")
    ] = EXAMPLES / "prompts_train.jsonl",
    limit: Annotated[int, typer.Option(help="Prompts.")] = 256,
    max_new_tokens: Annotated[int, typer.Option(help="Of an answer.")] = 128,
    batch_tokens: Annotated[int, typer.Option(help="That transformers computes at once.")] = 12288,
    max_requests: Annotated[int, typer.Option(help="That vLLM has at once.")] = 32,
    max_model_len: Annotated[int, typer.Option(help="Tokens of a document at most.")] = 1024,
    dtype: Annotated[str, typer.Option(help="Of the verifier.")] = "bfloat16",
    repeats: Annotated[int, typer.Option(help="Of each; their median counts.")] = 3,
    eager: Annotated[bool, typer.Option(help="vLLM compiles nothing.")] = True,
    flags: Annotated[list[str] | None, typer.Option(help="Further ones of vllm serve.")] = None,
) -> None:
    """Answers and reads with both, prints Markdown."""
    model = Verifier.from_pretrained(verifier, dtype=getattr(torch, dtype))
    streams = (*model.default_aux_layer_ids(), model.num_layers)  # EAGLE-3's
    ours = TransformersSource(model, streams)
    asked = [prompt.ids for prompt in read_prompts(prompts, model.tokenizer, limit=limit)]
    settings = RegenerateSettings(max_new_tokens=max_new_tokens)
    answers = _answers(ours, asked, settings, batch_tokens)
    documents = [torch.cat(pair) for pair in zip(asked, answers, strict=True)]
    documents = [documents[place] for place in processing_order([*map(len, documents)])]
    print(
        f"{len(asked)} prompts, {sum(map(len, asked))} tokens; {sum(map(len, answers))} in answers;"
        f" streams {streams}; {dtype}; {torch.get_num_threads()} threads\n"
    )
    vllm = make_vllm_source(
        verifier,
        streams,
        reference=ours,
        options=VllmOptions(
            python=vllm_python,
            eager=eager,
            max_model_len=max_model_len,
            max_requests=max_requests,
            flags=flags or (),
        ),
        report=print,
    )
    with vllm:
        begin = time.monotonic()
        list(vllm.hidden_states(documents[-2:], batch_tokens))  # starts it, and compares
        started = time.monotonic() - begin
        print(f"\nvLLM: {started:.0f} s until the first states\n")
        print("| by | answering, tokens/s | reading, tokens/s |\n|---|---|---|")
        for name, source in (("transformers, in process", ours), ("vLLM, a server", vllm)):
            written: list[Tensor] = []

            def answer(source: Any = source, written: list[Tensor] = written) -> None:
                written[:] = _answers(source, asked, settings, batch_tokens)

            def read(source: Any = source) -> None:
                for _ in source.hidden_states(documents, batch_tokens):
                    pass

            answering, reading = _median(answer, repeats), _median(read, repeats)
            answered = sum(map(len, written)) / answering
            print(f"| {name} | {answered:.0f} | {sum(map(len, documents)) / reading:.0f} |")


def _answers(
    source: Any, prompts: Sequence[Tensor], settings: RegenerateSettings, batch_tokens: int
) -> list[Tensor]:
    """In batches like those of ``generate``: as many as fit when all answers are of full length."""
    longest = max(map(len, prompts)) + settings.max_new_tokens
    size = max(1, batch_tokens // longest)
    found: list[Tensor] = []
    for begin in range(0, len(prompts), size):
        found += source.write_responses(prompts[begin : begin + size], settings, begin)
    return found


def _median(call: Callable[[], None], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        begin = time.monotonic()
        call()
        seconds.append(time.monotonic() - begin)
    return statistics.median(seconds)


if __name__ == "__main__":
    os.chdir(os.environ.get("BUILD_WORKING_DIRECTORY", "."))
    typer.run(main)
