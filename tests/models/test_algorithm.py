"""An algorithm from outside: a record, a configuration, a model, and what is done with them."""

import dataclasses
import importlib
import pathlib
from typing import Literal

import pytest
import torch
from tests.models.verifier_models import HIDDEN, VOCABULARY, make, tokens
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedConfig

from speculators import EagleSpeculatorConfig, SpeculatorModelConfig
from speculators.configs.schemas import SpeculatorSchema
from speculators.models import (
    AlgorithmSpec,
    DraftAttention,
    DraftCache,
    DraftOutput,
    HiddenStates,
    SpeculatorModel,
    algorithm_names,
    find_algorithm,
    register_algorithm,
)
from speculators.models.eagle import EAGLE
from speculators.models.eagle.algorithm import new_eagle_config
from speculators.models.objective import ObjectiveSettings, StepwiseObjective
from speculators.models.verifier import Verifier

# ---- the toy: the next state is a gated sum of embedding and state, without any attention


class GateSchema(SpeculatorSchema):
    """Its fields in config.json."""

    architectures: list[str] = ["GateDraft"]  # noqa: RUF012 - pydantic copies it
    speculators_model_type: Literal["gate"] = "gate"
    gate_bias: bool = True


class GateConfig(SpeculatorModelConfig):
    """The same for transformers."""

    schema_class = GateSchema


class GateDraft(SpeculatorModel):
    """The draft model."""

    def __init__(self, config: SpeculatorModelConfig) -> None:
        super().__init__(config)
        self.gate = nn.Linear(2 * self.hidden_size, self.hidden_size, bias=config.gate_bias)

    def forward(
        self, input_ids: Tensor, states: Tensor, position_ids: Tensor, attention: DraftAttention
    ) -> DraftOutput:
        """One step."""
        attention.begin(position_ids)
        embeddings = self.embed(input_ids, states.dtype)
        gate = self.gate(torch.cat([embeddings, states], -1)).sigmoid()
        states = gate * states + (1 - gate) * embeddings
        return DraftOutput(states, states)


def new_gate_config(
    verifier: PreTrainedConfig, name_or_path: str | None = None, *, gate_bias: bool = True
) -> SpeculatorModelConfig:
    content = new_eagle_config(EagleSpeculatorConfig, verifier, name_or_path).to_dict()
    own = {"speculators_model_type": "gate", "architectures": ["GateDraft"], "gate_bias": gate_bias}
    return GateConfig(**(content | own))


GATE = AlgorithmSpec(
    "gate",
    GateConfig,
    GateDraft,
    HiddenStates.LAST_NORMED,
    new_gate_config,
    StepwiseObjective,
    ObjectiveSettings(steps=2),
)


@dataclasses.dataclass(frozen=True)
class TrainingBatch:
    """What an objective takes."""

    input_ids: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    document_ids: Tensor
    hidden_states: dict[int, Tensor]


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    register_algorithm(GATE)


# ---- what the library does with it


def test_it_is_listed_and_found() -> None:
    assert {"eagle", "eagle3", "gate", "hass"} <= set(algorithm_names())
    assert find_algorithm("gate") is GATE
    assert register_algorithm(GATE) is GATE, "twice the same is no error"


def test_it_is_saved_loaded_and_drafts(tmp_path: pathlib.Path) -> None:
    verifier = Verifier(make("llama"))
    draft = SpeculatorModel.from_config(GATE.new_config(verifier.config), verifier)
    draft.save_pretrained(tmp_path / "draft")
    loaded = SpeculatorModel.from_pretrained(tmp_path / "draft", verifier=verifier)
    assert type(loaded) is GateDraft
    assert loaded.spec is GATE
    ids = tokens(1, 4)
    streams = verifier.prefill(ids, capture=GATE.capture_layers(loaded.config, 4)).captured
    states = GATE.draft_input(streams, verifier.head, loaded.config)
    cache = DraftCache(1)
    cache.extend()
    output = loaded(ids, states, torch.arange(4)[None], cache)
    assert loaded.logits(output.head_input).shape == (1, 4, VOCABULARY)
    assert output.states.shape == (1, 4, HIDDEN)


def test_it_learns() -> None:
    """One update with the objective of its record lowers the loss."""
    verifier = Verifier(make("llama"))
    draft = SpeculatorModel.from_config(GATE.new_config(verifier.config), verifier)
    objective = GATE.objective(draft, verifier.head, GATE.objective_settings)
    ids = tokens(2, 12)
    streams = verifier.prefill(ids, capture=objective.capture_layers(verifier.num_layers)).captured
    positions = torch.arange(12).expand(2, -1)
    mask = torch.ones_like(ids, dtype=torch.bool)
    batch = TrainingBatch(ids, mask, positions, torch.zeros_like(ids), streams)
    before = objective(batch).loss
    before.backward()
    torch.optim.SGD(draft.parameters(), lr=0.1).step()
    assert objective(batch).loss < before


def test_an_entry_point_is_found_without_an_import(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an installed package announces it."""
    (tmp_path / "announced_draft.py").write_text(
        "import dataclasses\n"
        "from speculators import SpeculatorModelConfig\n"
        "from speculators.configs.schemas import EagleSchema\n"
        "from speculators.models.eagle import EAGLE\n"
        "class Schema(EagleSchema):\n"
        "    speculators_model_type: str = 'announced'\n"
        "class Config(SpeculatorModelConfig):\n"
        "    schema_class = Schema\n"
        "SPEC = dataclasses.replace(EAGLE, name='announced', config_class=Config)\n"
    )
    info = tmp_path / "announced_draft-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: announced-draft\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[speculators.algorithms]\nannounced = announced_draft:SPEC\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert "announced" in algorithm_names()
    content = EAGLE.new_config(LlamaConfig()).to_dict() | {"speculators_model_type": "announced"}
    assert type(SpeculatorModelConfig.from_dict(content)).__module__ == "announced_draft"
    assert find_algorithm("announced").config_class.__module__ == "announced_draft"


def test_an_unknown_algorithm_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"no algorithm 'eagel'; expected one of .*eagle, eagle3"):
        find_algorithm("eagel")


def test_a_name_is_taken_once_and_is_the_configurations() -> None:
    other = AlgorithmSpec("eagle", *(getattr(EAGLE, f) for f in _FIELDS))
    with pytest.raises(ValueError, match=r"'eagle' is registered already, by speculators\.models"):
        register_algorithm(other)
    with pytest.raises(ValueError, match="'mine' has a configuration of type 'eagle'"):
        register_algorithm(AlgorithmSpec("mine", *(getattr(EAGLE, f) for f in _FIELDS)))


_FIELDS = (
    "config_class",
    "model_class",
    "hidden_states",
    "new_config",
    "objective",
    "objective_settings",
)
