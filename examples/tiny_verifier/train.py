"""Train the tiny verifier from nothing, on two CPU cores, in about an hour and a half.

    ./bazelw run //examples/tiny_verifier:train -- --work /tmp/tiny_verifier

A killed run goes on where its last checkpoint was; the same command resumes it.
"""

from __future__ import annotations

import json
import logging
import os
import platform
from pathlib import Path
from typing import Annotated

import torch
import typer
from examples.tiny_verifier.corpus import read_corpus
from examples.tiny_verifier.export import check_target, export
from examples.tiny_verifier.recipe import Recipe
from examples.tiny_verifier.trainer import Trainer

log = logging.getLogger("tiny_verifier")


def main(
    output: Annotated[Path, typer.Option(help="the Hugging Face directory to write")] = Path(
        "model"
    ),
    work: Annotated[Path, typer.Option(help="checkpoint and log; a run there is resumed")] = Path(
        "tiny_verifier_work"
    ),
    steps: Annotated[int, typer.Option(help="updates of 8,192 tokens")] = Recipe.steps,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 2,
    compiled: Annotated[bool, typer.Option(help="torch.compile; needs a C++ compiler")] = True,
    overwrite: Annotated[bool, typer.Option(help="exchange a model that is there")] = False,
) -> None:
    """Train, or go on training, and write the model."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(threads)
    here = Path(os.environ.get("BUILD_WORKING_DIRECTORY", "."))
    check_target(here / output, overwrite)
    recipe = Recipe(steps=steps)
    trainer = Trainer(recipe, read_corpus(), here / work)
    trainer.run(compiled=compiled)
    record = {
        "recipes": trainer.recipes,
        "corpus": f"CPython {platform.python_version()} standard library",
        "corpus_sha256": trainer.corpus,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "tokens": recipe.steps * recipe.tokens_per_step,
        "seconds": round(trainer.seconds),
        "held_out_bits_per_byte": round(trainer.validate(trainer.held_out_files, 2048), 4),
    }
    export(trainer.model, trainer.tokenizer, record, here / output, overwrite)
    log.info(json.dumps(record))


if __name__ == "__main__":
    typer.run(main)
