"""Small verifiers, and drafts that have learned their texts a little, in a few seconds each.

A draft of the right shape but with a wrong norm, shift or position still runs. It shows in what is
accepted, and only where a fair part is: so the drafts learn the very texts that they are to draft,
and stop long before they know them by heart.
"""

import dataclasses
import pathlib
from typing import Any

import torch
import transformers

from speculators.data.batch import PackedBatch
from speculators.decoding import GenerationOutput, GenerationSettings, generate
from speculators.models import SpeculatorModel, VocabularyMapping, find_algorithm
from speculators.models.verifier import Verifier
from speculators.training.optimizers import OPTIMIZERS, Parameters
from speculators.training.settings import OptimizerSettings

K = 5
PROMPT = 8
NEW_TOKENS = 72
PROMPTS = 12
VOCABULARY = 256
UPDATES = 45

# Sizes that vLLM's attention has on a CPU. The scale of the weights is such that texts neither
# repeat one token nor look random.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
VERIFIERS: dict[str, tuple[str, dict[str, Any], float]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}, 0.1),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}, 0.15),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A draft: which verifier it is for, its algorithm, and the algorithm's options."""

    verifier: str
    algorithm: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


CASES = {
    "eagle": Case("llama", "eagle"),
    "eagle layernorms": Case("llama", "eagle", {"layernorms": True}),
    "eagle bias": Case("llama", "eagle", {"fusion_bias": True}),
    "eagle under qwen3": Case("qwen3", "eagle"),
    "eagle of qwen3, layernorms, bias": Case(
        "qwen3", "eagle", {"layer_type": "qwen3", "layernorms": True, "fusion_bias": True}
    ),
    "hass": Case("llama", "hass"),
    "hass of qwen3, layernorms": Case(
        "qwen3", "hass", {"layer_type": "qwen3", "layernorms": True, "fusion_bias": False}
    ),
    "eagle3": Case("llama", "eagle3"),
    "eagle3 vocabulary, norm before residual": Case(
        "llama", "eagle3", {"draft_vocab_size": 120, "norm_before_residual": True}
    ),
    "eagle3 two layers, norm before fc, four streams": Case(
        "llama",
        "eagle3",
        {"num_layers": 2, "norm_before_fc": True, "aux_layer_ids": [0, 2, 3, 4]},
    ),
    "eagle3 of qwen3, norm output": Case(
        "qwen3",
        "eagle3",
        {"layer_type": "qwen3", "norm_output": True, "norm_before_residual": True},
    ),
    "eagle3 of two qwen3, norms of streams, vocabulary": Case(
        "qwen3",
        "eagle3",
        {
            "layer_type": "qwen3",
            "num_layers": 2,
            "fc_norm": True,
            "draft_vocab_size": 120,
            "aux_layer_ids": [1, 4],
        },
    ),
}


def make_verifier(name: str, directory: pathlib.Path) -> Verifier:
    """A random verifier of :data:`VERIFIERS` in float32, also written to a directory."""
    family, options, scale = VERIFIERS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **options)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn_like(parameter) * scale)
            else:  # else all weights of norms are alike, and none matters
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.tie_weights()
    model.save_pretrained(directory)
    return Verifier(model.eval())


def make_prompts() -> list[list[int]]:
    """The prompts of all cases."""
    generator = torch.Generator().manual_seed(1)
    prompts: list[list[int]] = torch.randint(
        3, VOCABULARY, (PROMPTS, PROMPT), generator=generator
    ).tolist()
    return prompts


def decode(verifier: Verifier, draft: SpeculatorModel | None) -> GenerationOutput:
    """Our own decoder's continuations."""
    settings = GenerationSettings(max_new_tokens=NEW_TOKENS, eos_token_ids=())
    return generate(verifier, draft, make_prompts(), settings)


def train_draft(case: Case, verifier: Verifier, texts: torch.Tensor) -> SpeculatorModel:
    """A draft that has seen the texts ``[N, PROMPT + NEW_TOKENS]`` ``UPDATES`` times."""
    torch.manual_seed(1)
    spec = find_algorithm(case.algorithm)
    config = spec.new_config(verifier.config, speculative_tokens=K, **case.options)
    draft = SpeculatorModel.from_config(
        config, verifier, vocabulary=_vocabulary(case, texts[:, PROMPT:])
    )
    with torch.no_grad():  # else an option that is lost on the way might not show
        for name, parameter in draft.named_parameters():
            if parameter.ndim == 1:
                spread = 0.05 if name.endswith("bias") else 0.2
                parameter.add_(torch.randn_like(parameter) * spread)
    losses = {**spec.objective_settings.losses, "ce_argmax": 1.0}
    changes = {"feature_noise": 0.0, "losses": losses, "steps": 3}
    settings = spec.objective_settings.model_copy(update=changes)
    objective = spec.objective(draft, verifier.head, settings)
    batch = _batch(verifier, texts, objective.capture_layers(verifier.num_layers))
    optimizer = OPTIMIZERS["muon"](
        Parameters.of(draft), OptimizerSettings(name="muon", learning_rate=5e-3)
    )
    draft.train()
    for update in range(UPDATES):
        optimizer.zero_grad()
        objective(batch).loss.backward()
        optimizer.step(1 - update / UPDATES)
    return draft.eval()


def _vocabulary(case: Case, new_tokens: torch.Tensor) -> VocabularyMapping | None:
    size = case.options.get("draft_vocab_size")
    if size is None:
        return None
    counts = torch.bincount(new_tokens.flatten(), minlength=VOCABULARY)
    return VocabularyMapping.from_counts(counts, size)


def _batch(verifier: Verifier, texts: torch.Tensor, layers: tuple[int, ...]) -> PackedBatch:
    positions = torch.arange(texts.shape[1]).expand_as(texts)
    streams = verifier.prefill(texts, capture=layers, logits="none").captured
    return PackedBatch(
        input_ids=texts,
        loss_mask=positions >= PROMPT,
        position_ids=positions,
        document_ids=torch.zeros_like(texts),
        hidden_states=streams,
    )
