"""Write EAGLE-3 directories of ours, with what our forward computes, for compare_ours_in_peer.py.

Usage: python tests/golden/write_ours.py FOLDER   (in this library's own environment)

Then, in the peer's environment: for d in FOLDER/*; do python compare_ours_in_peer.py $d; done
"""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from speculators.models import SpeculatorModel, TrainTimeTestAttention, VocabularyMapping
from speculators.models.eagle3 import EAGLE3

STEPS, ROWS, VOCABULARY, HIDDEN, LAYERS = 3, 12, 64, 32, 8

OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {"draft_vocab_size": 40},
    "llama_full_vocabulary": {"norm_before_residual": True, "norm_output": True},
    "llama_norm_before_fc": {"draft_vocab_size": 24, "norm_before_fc": True},
    "qwen3_fc_norm": {"layer_type": "qwen3", "fc_norm": True, "aux_layer_ids": [1, 3, 5, 8]},
    "qwen3_two_layers": {"layer_type": "qwen3", "num_layers": 2, "embed_requires_grad": True},
}


def verifier_config() -> LlamaConfig:
    """Sizes only; no weights of a verifier are needed."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=256,
        architectures=["LlamaForCausalLM"],
    )


def write(directory: Path, options: dict[str, Any]) -> None:
    """Make a draft with random weights, save it, run it for three steps, write what it computed."""
    config = EAGLE3.new_config(verifier_config(), "example/tiny-llama", **options)
    mapping = None
    if config.draft_vocab_size != VOCABULARY:
        counts = torch.randint(0, 9, (VOCABULARY,))
        mapping = VocabularyMapping.from_counts(counts, config.draft_vocab_size)
    draft = SpeculatorModel.from_config(config, vocabulary=mapping)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    draft.save_pretrained(directory)
    aux = len(config.eagle_aux_hidden_state_layer_ids)
    tokens = torch.randint(0, VOCABULARY, (1, ROWS + 1))
    hidden_states, rows = torch.randn(1, ROWS, aux * HIDDEN), torch.arange(ROWS)[None]
    io = {
        "inputs.input_ids": tokens[0, 1:],
        "inputs.position_ids": rows[0] + 1,  # the peer's begin; a constant offset cancels
        "inputs.document_ids": torch.zeros(ROWS, dtype=torch.int64),
        "inputs.loss_mask": torch.ones(ROWS, dtype=torch.bool),
        "inputs.hidden_states": hidden_states[0],
        "inputs.verifier_last_hidden_states": torch.randn(ROWS, HIDDEN),
    }
    attention = TrainTimeTestAttention(torch.zeros_like(rows))
    with torch.no_grad():
        states = draft.combine_hidden_states(hidden_states)
        io["fc_output"] = states[0]
        for step in range(STEPS):
            ids = torch.cat([tokens[:, 1 + step :], tokens.new_zeros(1, step)], 1)
            io[f"step{step}.state_in"] = states[0]
            output = draft(ids, states, rows + step, attention)
            states = output.states
            io[f"step{step}.state_out"] = states[0]
            io[f"step{step}.logits"] = draft.logits(output.head_input)[0]
    own = {name: tensor.clone() for name, tensor in io.items()}
    save_file(own, directory / "io.safetensors")


if __name__ == "__main__":
    torch.manual_seed(0)
    for case, case_options in OPTIONS.items():
        write(Path(sys.argv[1]) / case, case_options)
        print(Path(sys.argv[1]) / case)
