"""Load an EAGLE-3 directory in the peer (`speculators` 0.9.0 of PyPI) and compare its outputs.

Usage: python compare_ours_in_peer.py DIRECTORY [--io FILE] [--tolerance 1e-5]

DIRECTORY holds config.json, model.safetensors and an io file in the layout of README.md. The
tensors ``inputs.*`` (and ``verifier.*``, where present) go through the peer's own loading and its
train-time-test forward. Every float output named in the file is compared on the rows that mean
something: at step k those whose document still has a token k rows later. Losses are printed only.

Exit status: 0 if all agree within the tolerance, 1 if one differs or a weight is missing, extra
or mis-shaped, 2 if the io file lacks what a comparison needs.

The environment is that of make_golden_eagle3.py, which must lie beside this file.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from loguru import logger
from safetensors.torch import load_file, save_file
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig

from make_golden_eagle3 import TTT_STEPS, Tensors, record_forward

REQUIRED = ("inputs.input_ids", "inputs.hidden_states", "step0.logits")
PER_STEP = ("state_in", "layer_output", "state_out", "logits")


def write_verifier(directory: str, config: Eagle3SpeculatorConfig, io: Tensors) -> None:
    """Write what the peer reads from a verifier: a configuration and three weights.

    A weight that the io file lacks is NaN, so that an output that depends on it cannot agree.
    """
    layer = config.transformer_layer_config
    verifier = type(layer).from_dict(layer.to_dict() | {"layer_types": None})
    verifier.num_hidden_layers = max(8, *(config.eagle_aux_hidden_state_layer_ids or [0]))
    verifier.layer_types = ["full_attention"] * verifier.num_hidden_layers
    verifier.save_pretrained(directory)
    matrix = torch.full((layer.vocab_size, layer.hidden_size), torch.nan)
    weights = {
        "model.embed_tokens.weight": io.get("verifier.embed_tokens.weight", matrix),
        "lm_head.weight": io.get("verifier.lm_head.weight", matrix.clone()),
        "model.norm.weight": io.get("verifier.norm.weight", matrix[0].clone()),
    }
    save_file(weights, Path(directory) / "model.safetensors", metadata={"format": "pt"})


def load_in_peer(directory: Path, io: Tensors) -> Eagle3DraftModel:
    """Load DIRECTORY through the peer's ``from_pretrained`` with a stand-in for the verifier."""
    config = Eagle3SpeculatorConfig.from_pretrained(directory)
    config.transformer_layer_config._attn_implementation = "eager"
    with tempfile.TemporaryDirectory() as verifier:
        write_verifier(verifier, config, io)
        config.speculators_config.verifier.name_or_path = verifier
        return Eagle3DraftModel.from_pretrained(directory, config=config).eval()


def weight_errors(draft: Eagle3DraftModel, directory: Path) -> list[str]:
    """Name every tensor on disk that the peer lacks, misses or holds in another shape.

    The peer itself only warns about them. It takes the embeddings from the verifier if need be.
    """
    disk: Tensors = {}
    for file in sorted(directory.glob("model*.safetensors")):
        disk |= load_file(file)
    expected = {
        name: tensor
        for name, tensor in draft.state_dict().items()
        if not name.startswith("verifier_")
    }
    missing = expected.keys() - disk.keys() - {"embed_tokens.weight"}
    errors = [f"missing on disk: {name}" for name in sorted(missing)]
    errors += [f"unknown to the peer: {name}" for name in sorted(disk.keys() - expected.keys())]
    for name in sorted(disk.keys() & expected.keys()):
        found, wanted = disk[name], expected[name]
        if found.shape != wanted.shape:
            errors.append(f"shape of {name}: {tuple(found.shape)}, peer {tuple(wanted.shape)}")
        elif not torch.equal(found.to(wanted.dtype), wanted):
            errors.append(f"value of {name} changed while loading")
    return errors


def make_inputs(io: Tensors) -> Tensors:
    """Return the peer's batch [1, T, ...]; without documents and positions, the peer's own."""
    batch = {
        name.removeprefix("inputs."): tensor[None]
        for name, tensor in io.items()
        if name.startswith("inputs.")
    }
    rows = batch["input_ids"].shape[1]
    batch.setdefault("document_ids", torch.zeros(1, rows, dtype=torch.long))
    batch.setdefault("position_ids", 1 + torch.arange(rows)[None])
    return batch


def meaningful_rows(document_ids_T: torch.Tensor, step: int) -> torch.Tensor:
    """Return bool [T]: the row is no padding and its document has a token ``step`` rows later."""
    later = torch.full_like(document_ids_T, -1)
    later[: document_ids_T.shape[0] - step] = document_ids_T[step:]
    return (document_ids_T != -1) & (document_ids_T == later)


def compare(io: Tensors, peer: Tensors, document_ids_T: torch.Tensor) -> float:
    """Print the largest absolute difference of every output; return the largest of them all."""
    names = ["fc_output", "target_logits"]
    names += [f"step{step}.{name}" for step in range(TTT_STEPS) for name in PER_STEP]
    worst = 0.0
    for name in names:
        if name not in io or name not in peer:
            print(f"{name:<20} not compared")
            continue
        step = int(name[4]) if name.startswith("step") else 0
        rows = meaningful_rows(document_ids_T, step)
        difference = (io[name][rows].float() - peer[name][rows]).abs().max().item()
        print(f"{name:<20} {difference:.3e} on {int(rows.sum())} rows")
        worst = max(worst, difference if difference == difference else float("inf"))
    for name in ["loss", *(f"step{step}.loss" for step in range(TTT_STEPS))]:
        if name in io and name in peer:
            print(f"{name:<20} file {io[name].item():.6f}, peer {peer[name].item():.6f}")
    return worst


def main() -> int:
    """Parse the arguments, compare and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path, help="an EAGLE-3 speculator directory")
    parser.add_argument("--io", default="io.safetensors", help="file name within DIRECTORY")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="largest difference allowed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logger.disable("speculators")

    io = load_file(arguments.directory / arguments.io)
    absent = [name for name in REQUIRED if name not in io]
    if absent:
        print(f"{arguments.io} lacks {', '.join(absent)}; see README.md for the layout")
        return 2
    draft = load_in_peer(arguments.directory, io)
    errors = weight_errors(draft, arguments.directory)
    for error in errors:
        print(error)
    batch = make_inputs(io)
    worst = compare(io, record_forward(draft, batch), batch["document_ids"][0])
    agrees = not errors and worst <= arguments.tolerance
    verdict = "agrees" if agrees else "DIFFERS"
    print(f"{verdict}: max abs difference {worst:.3e}, tolerance {arguments.tolerance:.1e}")
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
