"""Write golden EAGLE-1 checkpoints with the peer library (`speculators` 0.2.0 of PyPI).

Usage: python make_golden_eagle.py OUTPUT_DIRECTORY

0.2.0 knows the type ``eagle``, 0.9.0 does not. Each golden directory holds what the peer's own
``save_pretrained`` writes for a tiny draft with random weights, and beside it ``io.safetensors``:
inputs, the verifier's embeddings and head, and what the peer's forward computed, recorded with
forward hooks. README.md lists the tensors.

Everything is seeded and runs on one CPU thread: a second run in the same environment writes the
same bytes. The environment (Python 3.11, no GPU; the peer asks for deepspeed, which it does not
need here, hence --no-deps; in later transformers, 4.57 for one, a decoder layer returns a tensor
instead of a tuple, and the peer's forward would silently keep the first sample of a batch only):

    python3.11 -m venv peer-0.2.0
    peer-0.2.0/bin/pip install --no-deps speculators==0.2.0
    peer-0.2.0/bin/pip install torch==2.13.0 transformers==4.53.3 pydantic pydantic-settings \
        typer-slim loguru safetensors numpy protobuf "httpx[http2]" huggingface-hub pyyaml click \
        accelerate
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from speculators import SpeculatorsConfig, VerifierConfig
from speculators.models import EagleSpeculator, EagleSpeculatorConfig
from speculators.proposals import (
    DynamicTreeTokenProposalConfig,
    GreedyTokenProposalConfig,
    SamplingTokenProposalConfig,
    StaticTreeTokenProposalConfig,
)
from transformers import LlamaConfig, LlamaForCausalLM

VERIFIER_LAYERS = 4
TOKENS = 13

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class GoldenCase:
    """One golden directory: the peer's options and the proposal methods of its config."""

    name: str
    seed: int
    layernorms: bool
    fusion_bias: bool
    proposal_methods: tuple[type, ...] = (GreedyTokenProposalConfig,)
    layer: dict[str, object] = field(default_factory=dict)


CASES = [
    GoldenCase("eagle_plain", seed=21, layernorms=False, fusion_bias=False),
    GoldenCase(
        "eagle_bias",
        seed=22,
        layernorms=False,
        fusion_bias=True,
        proposal_methods=(SamplingTokenProposalConfig, GreedyTokenProposalConfig),
    ),
    GoldenCase(
        "eagle_layernorms_bias",
        seed=23,
        layernorms=True,
        fusion_bias=True,
        proposal_methods=(
            GreedyTokenProposalConfig,
            StaticTreeTokenProposalConfig,
            DynamicTreeTokenProposalConfig,
        ),
        layer={"head_dim": 12, "rope_theta": 500000.0},
    ),
]


def layer_config(**changes) -> LlamaConfig:
    """Return a tiny decoder configuration; ``changes`` override the shared sizes."""
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**(sizes | changes))


def randomize_(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Fill all parameters of ``module`` in name order.

    Matrices are normal with variance 1 / columns, so activations stay near 1 at every depth;
    biases are noise; norm weights are 1 plus noise, so that a skipped norm shows.
    """
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            elif name.endswith(".bias"):
                parameter.copy_(0.2 * noise)
            else:
                parameter.copy_(1 + 0.2 * noise)


def make_config(case: GoldenCase) -> EagleSpeculatorConfig:
    """Build the peer's configuration of a golden case."""
    methods = [method() for method in case.proposal_methods]
    return EagleSpeculatorConfig(
        transformer_layer_config=layer_config(**case.layer),
        layernorms=case.layernorms,
        fusion_bias=case.fusion_bias,
        speculators_config=SpeculatorsConfig(
            algorithm="eagle",
            proposal_methods=methods,
            default_proposal_method=methods[0].proposal_type,
            verifier=VerifierConfig(name_or_path=None, architectures=["LlamaForCausalLM"]),
        ),
    )


@torch.no_grad()
def record_forward(draft: EagleSpeculator, inputs: Tensors) -> Tensors:
    """Run the peer's forward on inputs [T, ...] of one sequence; return its outputs [T, ...].

    The attention mask is all ones and must be given: without one the peer's eager attention sees
    the future.
    """
    recorded: Tensors = {}

    def keep(name):
        def hook(module, arguments, output):
            recorded[name] = (output[0] if isinstance(output, tuple) else output)[0].clone()

        return hook

    last = draft.pre_lm_head_layernorm if draft.config.layernorms else draft.transformer
    handles = [
        draft.fusion_fc.register_forward_hook(keep("fusion_output")),
        draft.transformer.register_forward_hook(keep("layer_output")),
        last.register_forward_hook(keep("head_input")),
    ]
    result = draft(
        input_ids=inputs["input_ids"][None],
        hidden_states=inputs["hidden_states"][None],
        attention_mask=inputs["attention_mask"][None],
        position_ids=inputs["position_ids"][None],
        return_dict=True,
    )
    for handle in handles:
        handle.remove()
    assert result.logits.ndim == 3, "this transformers breaks the peer's forward; see above"
    return recorded | {"logits": result.logits[0].clone()}


@torch.no_grad()
def make_inputs(verifier: LlamaForCausalLM, tokens: torch.Tensor) -> tuple[Tensors, Tensors]:
    """Run the verifier; return the draft's inputs (row t: x_{t+1}, f_t, position t) and targets."""
    states = verifier.model(tokens[None], output_hidden_states=True).hidden_states[-1][0]
    rows = tokens.shape[0] - 1
    inputs = {
        "input_ids": tokens[1:].clone(),
        "hidden_states": states[:-1].clone(),
        "attention_mask": torch.ones(rows, dtype=torch.long),
        "position_ids": torch.arange(rows),
    }
    targets = {
        "next_hidden_states": states[1:].clone(),
        "next_logits": verifier.lm_head(states[1:]).clone(),
    }
    return inputs, targets


def check_causal(draft: EagleSpeculator, inputs: Tensors, outputs: Tensors) -> None:
    """Check that a change of the last row leaves the other rows as they were."""
    changed = inputs | {"hidden_states": inputs["hidden_states"].clone()}
    changed["hidden_states"][-1] += 1
    after = record_forward(draft, changed)["logits"]
    torch.testing.assert_close(after[:-1], outputs["logits"][:-1], rtol=0, atol=0)
    assert not after[-1].equal(outputs["logits"][-1])


def write_case(case: GoldenCase, output: Path) -> None:
    """Write one golden directory."""
    generator = torch.Generator().manual_seed(case.seed)
    torch.manual_seed(case.seed)  # the peer's constructors draw from the global generator
    verifier_config = layer_config(**(case.layer | {"num_hidden_layers": VERIFIER_LAYERS}))
    verifier = LlamaForCausalLM(verifier_config).eval()
    randomize_(verifier, generator)
    draft = EagleSpeculator(make_config(case), verifier_attachment_mode="detached").eval()
    randomize_(draft, generator)
    directory = output / case.name
    draft.save_pretrained(directory)
    (directory / "eagle.py").unlink()  # the peer copies its own source beside the weights

    written = draft.state_dict()
    draft = EagleSpeculator.from_pretrained(directory, verifier=verifier).eval()
    assert all(draft.state_dict()[name].equal(tensor) for name, tensor in written.items())
    tokens = torch.randint(verifier_config.vocab_size, (TOKENS,), generator=generator)
    inputs, targets = make_inputs(verifier, tokens)
    outputs = record_forward(draft, inputs)
    check_causal(draft, inputs, outputs)
    tensors = {
        "tokens": tokens,
        "verifier.embed_tokens.weight": verifier.model.embed_tokens.weight.detach(),
        "verifier.lm_head.weight": verifier.lm_head.weight.detach(),
    }
    tensors |= {f"inputs.{name}": tensor for name, tensor in inputs.items()}
    tensors |= {f"targets.{name}": tensor for name, tensor in targets.items()}
    save_file(tensors | outputs, directory / "io.safetensors", metadata={"format": "pt"})
    size = sum(file.stat().st_size for file in directory.iterdir())
    print(f"{case.name}: {size} bytes in {sorted(file.name for file in directory.iterdir())}")


def main() -> None:
    """Parse the output directory and write all cases."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path, help="directory that receives the golden directories")
    output = parser.parse_args().output
    torch.set_num_threads(1)
    for case in CASES:
        write_case(case, output)


if __name__ == "__main__":
    main()
