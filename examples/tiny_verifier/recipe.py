"""The recipe: sizes, rates, stages, and the model and the optimizers that they describe.

The learning rate warms up, stays, and falls linearly to zero at the end (WSD): the constant part
does not depend on the number of steps, so a run can be shortened or lengthened before the fall
begins. Context grows in stages, because long blocks make attention the dearest part of a step on a
CPU: most tokens are seen in blocks of 256 and 512, the last ones teach the full 2,048 positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, apart from the corpus.

    Attributes:
        stages: (share of the steps after which the stage ends, block length in tokens).
        tokens_per_step: tokens in one update; a multiple of every block length.
        matrix_rate: Muon's learning rate, for the matrices inside the layers.
        other_rate: AdamW's learning rate, for the embedding and the norms.
        warm_up: steps of linear increase.
        fall: share of the steps, at the end, in which the rates fall to zero.
        loops_from: share of the steps after which artificial loops are mixed in.
        loops: their share of the blocks from then on (see repetition.py).
        own_loops_from: share of the steps after which the model's own loops are mixed in.
        own_loops: their share of the blocks from then on (see own_loops.py).
        own_loops_every: steps after which they are looked for anew.
        own_loops_answers: greedy answers in which they are looked for.
    """

    vocabulary_size: int = 4096
    hidden_size: int = 192
    intermediate_size: int = 448
    layers: int = 12
    heads: int = 4
    key_value_heads: int = 2
    head_size: int = 64
    context_length: int = 2048
    stages: tuple[tuple[float, int], ...] = ((0.6, 256), (0.988, 512), (1.0, 2048))
    tokens_per_step: int = 8192
    steps: int = 1320
    matrix_rate: float = 3e-3
    other_rate: float = 5e-3
    weight_decay: float = 0.1
    warm_up: int = 100
    fall: float = 0.4
    loops_from: float = 0.45
    loops: float = 0.125
    own_loops_from: float = 0.7
    own_loops: float = 0.5
    own_loops_every: int = 40
    own_loops_answers: int = 96
    seed: int = 0
    validate_every: int = 250

    def block_length(self, step: int) -> int:
        """Tokens per block at this step."""
        return next(length for share, length in self.stages if step < share * self.steps)

    def rate(self, step: int) -> float:
        """Factor on the learning rates at this step: warm-up, constant, linear fall."""
        rise = min(1.0, (step + 1) / self.warm_up)
        return rise * min(1.0, (self.steps - step) / (self.fall * self.steps))


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A freshly initialised model in float32; the layers' output matrices begin at zero."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=recipe.vocabulary_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.key_value_heads,
        head_dim=recipe.head_size,
        max_position_embeddings=recipe.context_length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    # On a CPU the backward pass of the fused kernel is slower than plain matrix products.
    model.set_attn_implementation("eager")
    return model


def build_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    named = list(model.named_parameters())
    matrices = [p for n, p in named if p.ndim == 2 and "layers." in n]
    others = [p for n, p in named if p.ndim != 2 or "layers." not in n]
    return [
        torch.optim.Muon(
            matrices,
            lr=recipe.matrix_rate,
            weight_decay=recipe.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(others, lr=recipe.other_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
