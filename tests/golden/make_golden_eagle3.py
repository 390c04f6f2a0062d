"""Write golden EAGLE-3 checkpoints with the peer library (`speculators` 0.9.0 of PyPI).

Usage: python make_golden_eagle3.py OUTPUT_DIRECTORY

Each golden directory holds what the peer's own ``save_pretrained`` writes for a tiny draft with
random weights, and beside it ``io.safetensors``: the inputs of the peer's train-time-test forward
and what every step of it computed, recorded with forward hooks. README.md lists the tensors.

Everything is seeded and runs on one CPU thread: a second run in the same environment writes the
same bytes. The environment (Python 3.11, no GPU):

    python3.11 -m venv peer-0.9.0
    peer-0.9.0/bin/pip install speculators==0.9.0 torch==2.13.0 transformers==5.19.0
    peer-0.9.0/bin/pip uninstall -y torchvision torchaudio

(The two that go are builds for a GPU; they break the imports of a CPU build of torch.)
"""

import argparse
import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from loguru import logger
from safetensors.torch import save_file
from speculators.config import SpeculatorsConfig, VerifierConfig
from speculators.losses import resolve_loss_config
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig, shift_batch
from speculators.proposals.greedy import GreedyTokenProposalConfig
from speculators.train.data import CollateFn
from speculators.train.vocab_mapping import build_vocab_mappings_from_distribution
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config

VOCAB_SIZE = 64
HIDDEN_SIZE = 32
VERIFIER_LAYERS = 8
TTT_STEPS = 3
PROMPT_TOKENS = 4
FLEX_BLOCK = 128

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class GoldenCase:
    """One golden directory: the draft's shape, the peer's options and the recorded documents."""

    name: str
    seed: int
    layer: PretrainedConfig
    verifier_name: str | None = None
    aux_layer_ids: tuple[int, ...] = (2, 4, 5)
    draft_vocab_size: int = VOCAB_SIZE
    options: dict[str, bool] = field(default_factory=dict)
    packed: bool = False


def layer_config(config_class: type[PretrainedConfig], **changes) -> PretrainedConfig:
    """Return a tiny decoder configuration; ``changes`` override the shared sizes."""
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    return config_class(**(sizes | changes))


def golden_cases() -> list[GoldenCase]:
    """Return the golden directories; together they cover every option of the peer's class."""
    return [
        GoldenCase(
            name="eagle3_llama",
            seed=11,
            layer=layer_config(LlamaConfig),
            draft_vocab_size=40,
            options={"norm_before_residual": False},
            packed=True,
        ),
        GoldenCase(
            name="eagle3_qwen3_options",
            seed=12,
            layer=layer_config(
                Qwen3Config,
                num_hidden_layers=2,
                intermediate_size=32,
                head_dim=12,  # heads * head_dim = 48: the attention is wider than the hidden size
                rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
            ),
            verifier_name="example/tiny-qwen3",
            draft_vocab_size=40,
            options={
                "norm_before_residual": True,
                "norm_before_fc": True,
                "norm_output": True,
                "embed_requires_grad": True,
            },
        ),
        GoldenCase(
            name="eagle3_qwen3_fc_norm",
            seed=13,
            layer=layer_config(Qwen3Config),
            verifier_name="example/tiny-qwen3",
            aux_layer_ids=(1, 3, 5, 8),
            options={"norm_before_residual": True, "fc_norm": True},
        ),
        GoldenCase(
            name="eagle3_qwen3_sliding",
            seed=14,
            layer=layer_config(
                Qwen3Config,
                use_sliding_window=True,
                sliding_window=4,
                max_window_layers=0,
                layer_types=["sliding_attention"],
            ),
            draft_vocab_size=40,
            options={"norm_before_residual": False, "norm_output": True},
        ),
    ]


def randomize_(module: torch.nn.Module, generator: torch.Generator, keep: tuple[str, ...] = ()):
    """Fill all parameters of ``module`` in name order, except those whose name starts with keep.

    Matrices are normal with variance 1 / columns, so activations stay near 1 at every depth;
    vectors (all of them norm weights here) are 1 plus noise, so that a skipped norm shows.
    """
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            if name.startswith(keep) and keep:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)


def make_verifier(layer: PretrainedConfig, generator: torch.Generator) -> torch.nn.Module:
    """Build a random verifier of the draft's family with VERIFIER_LAYERS full-attention layers."""
    config = layer_config(type(layer), num_hidden_layers=VERIFIER_LAYERS)
    verifier = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomize_(verifier, generator)
    return verifier


@torch.no_grad()
def run_verifier(verifier: torch.nn.Module, tokens_T: torch.Tensor, aux_layer_ids) -> Tensors:
    """Run the verifier over one document; return it as a sample of the peer's training data.

    ``hidden_states`` [T, n_aux * H] concatenates the residual stream after each layer id;
    ``verifier_last_hidden_states`` [T, H] is taken before the final norm.
    """
    before_norm = []
    handle = verifier.model.norm.register_forward_pre_hook(
        lambda module, arguments: before_norm.append(arguments[0])
    )
    states = verifier.model(tokens_T[None], output_hidden_states=True).hidden_states
    handle.remove()
    residual = [*states[:-1], before_norm[0]]  # states[-1] is after the final norm
    length = tokens_T.shape[0]
    return {
        "input_ids": tokens_T,
        "hidden_states": torch.cat([residual[i][0] for i in aux_layer_ids], dim=-1),
        "verifier_last_hidden_states": before_norm[0][0],
        "loss_mask": torch.arange(length) >= PROMPT_TOKENS,
        "lengths": torch.tensor([length]),
        "position_ids": torch.arange(length),
    }


def make_batch(documents: list[Tensors], rows: int) -> Tensors:
    """Shift and pack documents with the peer's own functions into one batch [1, rows, ...]."""
    num_aux = documents[0]["hidden_states"].shape[1] // HIDDEN_SIZE
    collate = CollateFn(rows, HIDDEN_SIZE, num_aux, dtype=torch.float32, preprocess=shift_batch)
    batch = collate(documents)
    return {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}


def make_config(case: GoldenCase, verifier_name: str | None) -> Eagle3SpeculatorConfig:
    """Build the peer's configuration of a golden case."""
    layer = copy.deepcopy(case.layer)
    layer._attn_implementation = "eager"
    return Eagle3SpeculatorConfig(
        transformer_layer_config=layer,
        draft_vocab_size=case.draft_vocab_size,
        eagle_aux_hidden_state_layer_ids=list(case.aux_layer_ids),
        speculators_config=SpeculatorsConfig(
            algorithm="eagle3",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=TTT_STEPS)],
            default_proposal_method="greedy",
            verifier=VerifierConfig(
                name_or_path=verifier_name,
                architectures=[f"{type(case.layer).__name__.removesuffix('Config')}ForCausalLM"],
            ),
        ),
        **case.options,
    )


def make_draft(case: GoldenCase, verifier: torch.nn.Module, generator: torch.Generator):
    """Build the peer's draft on a saved verifier: its embeddings and targets, our random rest.

    The draft's own ``lm_head`` is drawn anew, so that mixing it up with the verifier's shows.
    """
    with tempfile.TemporaryDirectory() as directory:
        verifier.save_pretrained(directory)
        draft = Eagle3DraftModel(make_config(case, directory)).eval()
        if draft.use_draft_vocab:
            ranks = torch.randperm(VOCAB_SIZE, generator=generator).tolist()
            frequency = {token: 1 + rank for token, rank in enumerate(ranks)}
            d2t, t2d = build_vocab_mappings_from_distribution(
                frequency, case.draft_vocab_size, VOCAB_SIZE
            )
            draft.load_vocab_mappings(t2d, d2t)
        draft.load_verifier_weights()
    randomize_(draft, generator, keep=("embed_tokens.", "verifier_"))
    draft.config.speculators_config.verifier.name_or_path = case.verifier_name
    return draft


@contextmanager
def recorded_calls(modules: dict[str, torch.nn.Module]) -> Iterator[dict[str, list]]:
    """Record (positional inputs, output) of every call of the named modules."""
    calls: dict[str, list] = {name: [] for name in modules}
    handles = [
        module.register_forward_hook(
            lambda module, inputs, output, name=name: calls[name].append((inputs, output))
        )
        for name, module in modules.items()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def record_forward(draft: Eagle3DraftModel, batch: Tensors) -> Tensors:
    """Run the peer's train-time-test forward on ``batch`` [1, T, ...]; return what it computed.

    The names are those of the outputs in io.safetensors; the batch dimension is dropped.
    A batch without ``verifier_last_hidden_states`` gives no targets and no losses.
    """
    with_loss = "verifier_last_hidden_states" in batch
    modules = {
        "embed": draft.embed_tokens,
        "rotary": draft.rotary_emb,
        "fc": draft.fc,
        "first": draft.layers[0],
        "last": draft.layers[-1],
        "norm": draft.norm,
        "head": draft.lm_head,
        "target": draft.verifier_lm_head,
    }
    with recorded_calls(modules) as calls:
        result = draft(
            hidden_states=batch["hidden_states"],
            input_ids=batch["input_ids"],
            document_ids=batch["document_ids"],
            loss_mask=batch.get("loss_mask"),
            position_ids=batch["position_ids"],
            verifier_last_hidden_states=batch.get("verifier_last_hidden_states"),
            ttt_steps=TTT_STEPS,
            ttt_step_loss_decay=1.0,
            loss_config=resolve_loss_config("kl_div", "eager"),
        )
    outputs = {"fc_output": calls["fc"][0][1][0]}
    if with_loss:
        _, loss, metrics = result
        outputs |= {"target_logits": calls["target"][0][1][0], "loss": loss}
        outputs |= {f"step{step}.loss": metrics[f"loss_{step}_sum"] for step in range(TTT_STEPS)}
    hidden_size = draft.hidden_size
    for step in range(TTT_STEPS):
        post_norm = draft.config.norm_output
        outputs |= {
            f"step{step}.input_ids": calls["embed"][step][0][0][0],
            f"step{step}.position_ids": calls["rotary"][step][0][1][0],
            f"step{step}.state_in": calls["first"][step][0][0][0, :, hidden_size:],
            f"step{step}.layer_output": calls["last"][step][1][0],
            f"step{step}.state_out": calls["norm" if post_norm else "last"][step][1][0],
            f"step{step}.logits": calls["head"][step][1][0],
        }
        if step:
            assert outputs[f"step{step}.state_in"].equal(outputs[f"step{step - 1}.state_out"])
    return {name: tensor.contiguous().clone() for name, tensor in outputs.items()}


def check_flex_attention(case: GoldenCase, draft: Eagle3DraftModel, documents: list[Tensors]):
    """Check that the peer's default attention gives the recorded logits.

    Its block mask only works for a multiple of FLEX_BLOCK rows, hence the padded batch.
    """
    rows = sum(document["input_ids"].shape[0] - 1 for document in documents)
    eager = record_forward(draft, make_batch(documents, rows))
    config = make_config(case, None)
    config.transformer_layer_config._attn_implementation = "simple_flex_attention"
    flex_draft = Eagle3DraftModel(config).eval()
    flex_draft.load_state_dict(draft.state_dict())
    flex = record_forward(flex_draft, make_batch(documents, FLEX_BLOCK))
    for step in range(TTT_STEPS):
        # A row whose token runs off the end takes 0 in both layouts, so all rows must agree.
        name = f"step{step}.logits"
        torch.testing.assert_close(flex[name][:rows], eager[name], rtol=1e-4, atol=1e-5)


def io_tensors(
    draft: Eagle3DraftModel, verifier: torch.nn.Module, documents: list[Tensors], batch: Tensors
) -> Tensors:
    """Return the content of one io file: inputs, the verifier's parts and recorded outputs."""
    inputs = {f"inputs.{name}": tensor[0].contiguous() for name, tensor in batch.items()}
    tokens = {f"tokens.document{i}": each["input_ids"] for i, each in enumerate(documents)}
    weights = {
        "verifier.norm.weight": verifier.model.norm.weight.detach(),
        "verifier.lm_head.weight": verifier.lm_head.weight.detach(),
    }
    return inputs | tokens | weights | record_forward(draft, batch)


def write_case(case: GoldenCase, output: Path) -> None:
    """Write one golden directory."""
    generator = torch.Generator().manual_seed(case.seed)
    torch.manual_seed(case.seed)  # the peer's constructors draw from the global generator
    verifier = make_verifier(case.layer, generator)
    draft = make_draft(case, verifier, generator)
    documents = [
        run_verifier(
            verifier,
            torch.randint(VOCAB_SIZE, (length,), generator=generator),
            case.aux_layer_ids,
        )
        for length in (13, 8, 5)
    ]
    directory = output / case.name
    draft.save_pretrained(directory)
    (directory / "config.py").unlink()  # the peer copies its own source beside the weights
    files = {"io.safetensors": (documents[:1], 12)}
    if case.packed:
        files["io_packed.safetensors"] = (documents[1:], 12)  # 7 rows + 4 rows + 1 of padding
    for name, (chosen, rows) in files.items():
        tensors = io_tensors(draft, verifier, chosen, make_batch(chosen, rows))
        save_file(tensors, directory / name, metadata={"format": "pt"})
        check_flex_attention(case, draft, chosen)
    size = sum(file.stat().st_size for file in directory.iterdir())
    names = sorted(file.name for file in directory.iterdir())
    print(f"{case.name}: {size} bytes in {names}")


def main() -> None:
    """Parse the output directory and write all cases."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path, help="directory that receives the golden directories")
    output = parser.parse_args().output
    torch.set_num_threads(1)
    logger.disable("speculators")
    for case in golden_cases():
        write_case(case, output)


if __name__ == "__main__":
    main()
