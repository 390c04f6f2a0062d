"""Drafts that the peer library wrote compute what they did there, and are saved unchanged."""

import json
import pathlib
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from speculators.models import SpeculatorModel, TrainTimeTestAttention
from speculators.models.verifier import VerifierHead, VerifierParts

torch.set_num_threads(1)
GOLDEN = pathlib.Path("tests/golden")
EAGLE = sorted(path.name for path in GOLDEN.glob("eagle_*"))
EAGLE3 = sorted(path.name for path in GOLDEN.glob("eagle3_*"))
STEPS = 3


def _io(name: str, file: str = "io.safetensors") -> dict[str, Tensor]:
    return load_file(GOLDEN / name / file)


def _load(name: str) -> Any:
    model = SpeculatorModel.from_pretrained(GOLDEN / name)
    io = _io(name)
    if "verifier.embed_tokens.weight" in io:
        weight = io["verifier.lm_head.weight"]
        lm_head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        lm_head.weight = nn.Parameter(weight)
        head = VerifierHead(nn.Identity(), lm_head)
        model.attach_verifier(VerifierParts(io["verifier.embed_tokens.weight"], head))
    return model


def _close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", EAGLE)
def test_eagle_computes_what_the_peer_does(name: str) -> None:
    model, io = _load(name), _io(name)
    states = model.combine_hidden_states(io["inputs.hidden_states"][None])
    attention = TrainTimeTestAttention(torch.zeros(1, states.shape[1], dtype=torch.int64))
    with torch.no_grad():
        output = model(
            io["inputs.input_ids"][None], states, io["inputs.position_ids"][None], attention
        )
    _close(output.states[0], io["layer_output"])
    _close(output.head_input[0], io["head_input"])
    _close(model.logits(output.head_input)[0], io["logits"])


@pytest.mark.parametrize(
    ("name", "file"),
    [(name, "io.safetensors") for name in EAGLE3] + [("eagle3_llama", "io_packed.safetensors")],
)
def test_eagle3_computes_what_the_peer_does(name: str, file: str) -> None:
    model, io = _load(name), _io(name, file)
    documents = io["inputs.document_ids"]
    attention = TrainTimeTestAttention(documents[None])
    states = model.combine_hidden_states(io["inputs.hidden_states"][None])
    _close(states[0], io["fc_output"])
    for step in range(STEPS):
        if name == "eagle3_qwen3_sliding":
            # The peer counts its window from the row, not from the position, which is that of the
            # row plus the step. Servers count from the position, and so do we.
            model.layers[0].self_attn.sliding_window += bool(step)
        with torch.no_grad():
            output = model(
                io[f"step{step}.input_ids"][None],
                states,
                io[f"step{step}.position_ids"][None],
                attention,
            )
        # Later rows take tokens from beyond their document.
        rows = len(documents) - step
        real = (documents[:rows] == documents[step:]) & (documents[:rows] >= 0)
        kept = real.nonzero()[:, 0]
        assert len(kept) >= 6
        _close(output.states[0, kept], io[f"step{step}.state_out"][kept])
        _close(model.logits(output.head_input)[0, kept], io[f"step{step}.logits"][kept])
        states = output.states


@pytest.mark.parametrize("name", EAGLE + EAGLE3)
def test_it_is_saved_as_it_was(name: str, tmp_path: pathlib.Path) -> None:
    _load(name).save_pretrained(tmp_path / "saved")
    content = json.loads((GOLDEN / name / "config.json").read_text())
    assert json.loads((tmp_path / "saved/config.json").read_text()) == content
    expected = load_file(GOLDEN / name / "model.safetensors")
    found = load_file(tmp_path / "saved/model.safetensors")
    assert found.keys() == expected.keys()
    for tensor in expected:
        assert found[tensor].dtype == expected[tensor].dtype
        assert torch.equal(found[tensor], expected[tensor]), tensor
