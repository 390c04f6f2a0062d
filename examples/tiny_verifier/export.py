"""Write a trained model as the Hugging Face directory that transformers and vLLM load."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path

from examples.tiny_verifier.tokenizer import END_OF_TEXT
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

RECORD = "training.json"
"""Name of the file that says what the model was made from and how well it does."""


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse a directory that holds something: before an hour of training, not after it.

    Raises:
        FileExistsError: `target` is not empty and `overwrite` is not given.
    """
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise FileExistsError(f"{target} is not empty; give another folder, or --overwrite")


def export(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    record: dict[str, object],
    target: Path,
    overwrite: bool = False,
) -> None:
    """Write weights (bfloat16), configuration, tokenizer with chat template and `record`.

    Args:
        model: the trained model; it is left as it is.
        tokenizer: its tokenizer.
        record: what the model was made from; becomes `training.json`.
        target: the directory; it appears under this name only when it is complete.
        overwrite: exchange a directory that is there already.

    Raises:
        FileExistsError: `target` is not empty and `overwrite` is not given.
    """
    check_target(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.new.{os.getpid()}")
    exported = copy.deepcopy(model)
    exported.bfloat16()
    exported.set_attn_implementation("sdpa")
    exported.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[
            tokenizer.eos_token_id,
            tokenizer.convert_tokens_to_ids(END_OF_TEXT),
        ],
        pad_token_id=tokenizer.pad_token_id,
    )
    exported.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh, save_jinja_files=False)
    (fresh / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for path in fresh.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if target.exists():
        old = target.with_name(f".{target.name}.old.{os.getpid()}")
        target.rename(old)
        fresh.rename(target)
        shutil.rmtree(old)
    else:
        fresh.rename(target)
