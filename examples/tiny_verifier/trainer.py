"""The training loop, and the checkpoint with which a killed run ends in the same bits.

The state of a run is the weights, the optimizers, the step, the place in the corpus and the loops
that were found last. Everything random is drawn from hashes of (seed, step), nothing from a
generator that would have to be saved.
"""

from __future__ import annotations

import json
import logging
import os
import random
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from examples.tiny_verifier.corpus import SourceFile, content_hash, split, stable_hash
from examples.tiny_verifier.data import Batches
from examples.tiny_verifier.measure import bits_per_byte, fused_attention
from examples.tiny_verifier.own_loops import (
    OwnLoop,
    add_own_loops,
    draw_prompts,
    find_own_loops,
)
from examples.tiny_verifier.recipe import Recipe, build_model, build_optimizers
from examples.tiny_verifier.repetition import add_loops, faded_loss, no_repetition
from examples.tiny_verifier.tokenizer import train_tokenizer
from torch import Tensor, nn
from transformers import LlamaForCausalLM

log = logging.getLogger("tiny_verifier")


def token_loss(model: LlamaForCausalLM, window: Tensor, earlier: Tensor) -> Tensor:
    """Mean loss in nats of `window` [B, T + 1]; bfloat16 products, float32 softmax.

    Cross entropy for every target but the artificial repetitions that `earlier` [B, T] points out.
    """
    with torch.autocast("cpu", torch.bfloat16):
        states = model.model(input_ids=window[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(states)
    targets = window[:, 1:]
    nats = nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), reduction="none"
    )
    return faded_loss(nats.view(targets.shape), earlier)


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` so that `path` holds either the old or the new checkpoint, whole."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class Trainer:
    """One run in a work folder: `checkpoint.pt` and `log.jsonl` lie there.

    Attributes:
        recipes: the recipes the run has had and from which step; one, unless it was resumed with
            another.
    """

    def __init__(self, recipe: Recipe, files: list[SourceFile], work: Path) -> None:
        self.recipe = recipe
        self.work = work
        self.train_files, self.held_out_files = split(files)
        self.corpus = content_hash(files)
        work.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(recipe.seed)
        self.tokenizer = train_tokenizer(
            (f.text for f in self.train_files), recipe.vocabulary_size, recipe.context_length
        )
        self.line_ends = frozenset(
            i for i in range(len(self.tokenizer)) if "\n" in self.tokenizer.decode([i])
        )
        self.model = build_model(recipe, self.tokenizer)
        self.optimizers = build_optimizers(self.model, recipe)
        self.step, self.seconds = 0, 0.0
        self.place = (0, 0)
        self.own_loops: list[OwnLoop] = []
        self.recipes: list[dict[str, Any]] = []
        if self.checkpoint.exists():
            self._resume()
        known = self.recipes[-1]["recipe"] if self.recipes else None
        if known != asdict(recipe):
            self.recipes.append({"from_step": self.step, "recipe": asdict(recipe)})
        self.batches = Batches(self.train_files, self.tokenizer, recipe.seed, *self.place)

    @property
    def checkpoint(self) -> Path:
        """Where the state of the run lies."""
        return self.work / "checkpoint.pt"

    def _resume(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        if state["corpus"] != self.corpus:
            raise ValueError(
                f"{self.checkpoint} was made from corpus {state['corpus'][:12]}, this "
                f"interpreter's is {self.corpus[:12]}; use that interpreter or a new folder"
            )
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds, self.place = state["step"], state["seconds"], state["place"]
        self.own_loops, self.recipes = state["own_loops"], state["recipes"]
        log.info("resumed at step %d", self.step)

    def save(self) -> None:
        """Write the checkpoint."""
        write_checkpoint(
            self.checkpoint,
            {
                "corpus": self.corpus,
                "model": self.model.state_dict(),
                "optimizers": [o.state_dict() for o in self.optimizers],
                "step": self.step,
                "seconds": self.seconds,
                "own_loops": self.own_loops,
                "recipes": self.recipes,
                "place": (self.batches.number, self.batches.used),
            },
        )

    def validate(self, files: list[SourceFile], length: int = 512) -> float:
        """Bits per byte on `files` in windows of `length` tokens, in bfloat16 products."""
        self.model.eval()
        with torch.autocast("cpu", torch.bfloat16), fused_attention(self.model):
            bits = bits_per_byte(self.model, self.tokenizer, (f.text for f in files), length)
        self.model.train()
        return bits

    def run(
        self,
        until: int | None = None,
        checkpoint_seconds: float = 180.0,
        compiled: bool = True,
    ) -> None:
        """Train up to step `until` (the recipe's last by default) and write the checkpoint."""
        recipe = self.recipe
        until = recipe.steps if until is None else until
        loss_of: Callable[[LlamaForCausalLM, Tensor, Tensor], Tensor] = (
            torch.compile(token_loss, dynamic=False) if compiled else token_loss
        )
        validation = self.held_out_files[::4] or self.train_files[:1]
        saved = time.monotonic()
        started = saved - self.seconds
        losses: list[Tensor] = []
        self.model.train()
        while self.step < until:
            self._look_for_loops()
            window, earlier = self._next_batch()
            rates = (recipe.matrix_rate, recipe.other_rate)
            for optimizer, base in zip(self.optimizers, rates, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = base * recipe.rate(self.step)
            loss = loss_of(self.model, window, earlier)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
            self.step += 1
            self.seconds = time.monotonic() - started
            if self.step % 25 == 0:
                self._log(loss=torch.stack(losses).mean().item(), length=window.shape[1] - 1)
                losses.clear()
            if self.step % recipe.validate_every == 0:
                self._log(bits_per_byte=self.validate(validation))
            if time.monotonic() - saved > checkpoint_seconds:
                self.save()
                saved = time.monotonic()
        self.save()

    def _next_batch(self) -> tuple[Tensor, Tensor]:
        """The next window [B, T + 1] and its `earlier` index [B, T]."""
        recipe, length = self.recipe, self.recipe.block_length(self.step)
        window = self.batches.next(recipe.tokens_per_step // length, length)
        if self.step < recipe.loops_from * recipe.steps:
            return window, no_repetition(window)
        rng = random.Random(stable_hash("loops", recipe.seed, self.step))
        window, earlier = add_loops(window, recipe.loops, self.line_ends, rng)
        add_own_loops(window, earlier, recipe.own_loops, self.own_loops, rng)
        return window, earlier

    def _look_for_loops(self) -> None:
        """Exchange the model's own loops for those that it has now, where it is time to."""
        recipe, begin = self.recipe, round(self.recipe.own_loops_from * self.recipe.steps)
        if self.step < begin or (self.step - begin) % recipe.own_loops_every:
            return
        rng = random.Random(stable_hash("own loops", recipe.seed, self.step))
        names, count = self.batches.names, recipe.own_loops_answers
        prompts = draw_prompts(self.train_files, names, count, rng)
        self.model.eval()
        self.own_loops = find_own_loops(self.model, self.tokenizer, prompts, 128)
        self.model.train()
        self._log(looping=len(self.own_loops) / count)

    def _log(self, **values: float) -> None:
        record = {
            "step": self.step,
            "tokens": self.step * self.recipe.tokens_per_step,
            "seconds": round(self.seconds, 1),
            "pass": self.batches.number,
            **{k: round(v, 4) for k, v in values.items()},
        }
        log.info(json.dumps(record))
        with (self.work / "log.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
