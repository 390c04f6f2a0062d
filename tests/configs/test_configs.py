"""The on-disk format: nothing is lost, defaults are the format's, and what is wrong is named."""

import copy
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, PretrainedConfig, Qwen3Config

import speculators
from speculators import (
    ConfigError,
    DynamicTreeTokenProposalConfig,
    Eagle3SpeculatorConfig,
    EagleSpeculatorConfig,
    GreedyTokenProposalConfig,
    HassSpeculatorConfig,
    SamplingTokenProposalConfig,
    SpeculatorModelConfig,
    SpeculatorsConfig,
    StaticTreeTokenProposalConfig,
    TokenProposalConfig,
    VerifierConfig,
)
from speculators.configs import model_config, schemas

# A file as the peer library writes it: no model_type, an empty auto_map, keys we do not know.
PEER_FILE: dict[str, Any] = {
    "architectures": ["Eagle3DraftModel"],
    "auto_map": {},
    "dtype": "bfloat16",
    "draft_vocab_size": 64,
    "eagle_aux_hidden_state_layer_ids": [2, 14, 25],
    "embed_requires_grad": False,
    "fc_norm": False,
    "future_key": {"nested": [1, None, "x"]},
    "norm_before_fc": True,
    "norm_before_residual": True,
    "norm_output": True,
    "speculators_config": {
        "algorithm": "eagle3",
        "default_proposal_method": "greedy",
        "future_key": 1,
        "proposal_methods": [
            {
                "accept_tolerance": 0.0,
                "future_key": 2,
                "proposal_type": "greedy",
                "speculative_tokens": 3,
                "verifier_accept_k": 1,
            }
        ],
        "verifier": {
            "architectures": ["Qwen3ForCausalLM"],
            "future_key": 3,
            "name_or_path": "Qwen/Qwen3-8B",
        },
    },
    "speculators_model_type": "eagle3",
    "speculators_version": "0.9.0",
    "target_hidden_size": None,
    "tie_word_embeddings": False,
    "transformer_layer_config": {"model_type": "qwen3", "hidden_size": 32, "future_key": 4},
    "transformers_version": "5.17.0",
}


def usage(**changes: Any) -> SpeculatorsConfig:
    fields: dict[str, Any] = {
        "algorithm": "eagle3",
        "proposal_methods": [GreedyTokenProposalConfig(speculative_tokens=3)],
        "default_proposal_method": "greedy",
        "verifier": VerifierConfig(name_or_path="verifier"),
    }
    return SpeculatorsConfig(**{**fields, **changes})


def eagle3(**fields: Any) -> Eagle3SpeculatorConfig:
    layer = LlamaConfig(hidden_size=32, num_hidden_layers=1)
    return Eagle3SpeculatorConfig(
        transformer_layer_config=layer, speculators_config=usage(), **fields
    )


def test_a_file_of_the_peer_survives_a_round_trip(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PEER_FILE))
    config = SpeculatorModelConfig.from_pretrained(tmp_path)
    assert isinstance(config, Eagle3SpeculatorConfig)
    config.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written == {key: value for key, value in PEER_FILE.items() if key != "auto_map"}
    assert SpeculatorModelConfig.from_pretrained(tmp_path / "again") == config


@pytest.mark.parametrize(
    ("config_class", "name", "architecture", "defaults"),
    [
        (
            EagleSpeculatorConfig,
            "eagle",
            "EagleSpeculator",
            {
                "transformer_layer_architecture": "auto",
                "layernorms": False,
                "fusion_bias": False,
            },
        ),
        (
            HassSpeculatorConfig,
            "hass",
            "HassSpeculator",
            {"transformer_layer_architecture": "auto", "layernorms": False, "fusion_bias": True},
        ),
        (
            Eagle3SpeculatorConfig,
            "eagle3",
            "Eagle3DraftModel",
            {
                "draft_vocab_size": 32000,
                "target_hidden_size": None,
                "eagle_aux_hidden_state_layer_ids": None,
                "norm_before_residual": False,
                "norm_before_fc": False,
                "fc_norm": False,
                "norm_output": False,
                "embed_requires_grad": False,
            },
        ),
    ],
)
def test_every_default_is_written(
    config_class: type[SpeculatorModelConfig],
    name: str,
    architecture: str,
    defaults: dict[str, Any],
    tmp_path: pathlib.Path,
) -> None:
    layer = Qwen3Config(hidden_size=48, num_hidden_layers=1)
    config_class(transformer_layer_config=layer, speculators_config=usage()).save_pretrained(
        tmp_path
    )
    written = json.loads((tmp_path / "config.json").read_text())
    assert {key: written[key] for key in defaults} == defaults
    assert written["speculators_model_type"] == name
    assert written["architectures"] == [architecture]
    assert written["speculators_version"] == speculators.__version__
    assert type(SpeculatorModelConfig.from_pretrained(tmp_path)) is config_class
    assert type(config_class.from_pretrained(tmp_path)) is config_class


def test_the_layer_config_is_whole_and_typed(tmp_path: pathlib.Path) -> None:
    """A server reads the layer's dict without transformers' defaults, so they must stand in it."""
    config = eagle3()
    config.save_pretrained(tmp_path)
    layer = json.loads((tmp_path / "config.json").read_text())["transformer_layer_config"]
    assert layer["model_type"] == "llama"
    assert layer["rms_norm_eps"] == LlamaConfig().rms_norm_eps
    assert "id2label" not in layer
    again = SpeculatorModelConfig.from_pretrained(tmp_path).transformer_layer_config
    assert isinstance(again, LlamaConfig)
    assert again.to_dict() == LlamaConfig(hidden_size=32, num_hidden_layers=1).to_dict()


@pytest.mark.parametrize(
    ("proposal", "fields"),
    [
        (
            GreedyTokenProposalConfig,
            {"speculative_tokens": 5, "verifier_accept_k": 1, "accept_tolerance": 0.0},
        ),
        (SamplingTokenProposalConfig, {"speculative_tokens": 5, "accept_lenience": 1.0}),
        (
            StaticTreeTokenProposalConfig,
            {"initial_branching_factor": 4, "branching_factor": 2, "depth": 5},
        ),
        (
            DynamicTreeTokenProposalConfig,
            {"speculative_tokens": 48, "expansion_factor": 10, "depth": 6},
        ),
    ],
)
def test_each_proposal_type_is_read_as_itself(
    proposal: Callable[[], TokenProposalConfig], fields: dict[str, Any]
) -> None:
    made = proposal()
    assert made.model_dump() == {"proposal_type": made.proposal_type, **fields}
    method = {"proposal_type": made.proposal_type}
    config = usage(proposal_methods=[method], default_proposal_method=made.proposal_type)
    assert config.proposal_methods == [made]
    assert config.model_dump()["proposal_methods"] == [made.model_dump()]


def test_changes_are_checked_and_written() -> None:
    config = eagle3()
    config.norm_output = True
    config.dtype = torch.bfloat16
    config.transformer_layer_config = LlamaConfig(hidden_size=64)
    content = config.to_dict()
    assert (content["norm_output"], content["dtype"]) == (True, "bfloat16")
    assert content["transformer_layer_config"]["hidden_size"] == 64
    assert config.transformer_layer_config.hidden_size == 64
    with pytest.raises(ConfigError, match="draft_vocab_size: found 0"):
        config.draft_vocab_size = 0
    assert config.draft_vocab_size == 32000
    config.norm_before_fc = True
    with pytest.raises(ConfigError, match="norm_before_fc and fc_norm are both true"):
        config.fc_norm = True
    assert (config.norm_before_fc, config.fc_norm) == (True, False)
    assert SpeculatorModelConfig.from_dict(config.to_dict()) == config


def test_overrides_on_loading(tmp_path: pathlib.Path) -> None:
    eagle3().save_pretrained(tmp_path)
    config = SpeculatorModelConfig.from_pretrained(tmp_path, norm_output=True)
    assert config.norm_output
    config, unused = SpeculatorModelConfig.from_pretrained(
        tmp_path, colour="red", return_unused_kwargs=True
    )
    assert unused == {"colour": "red"}
    with pytest.raises(ConfigError, match="norm_output: found 3"):
        SpeculatorModelConfig.from_pretrained(tmp_path, norm_output=3)


def test_copies_are_equal_and_apart() -> None:
    config = eagle3()
    other = copy.deepcopy(config)
    assert other == config
    other.speculators_config.verifier.name_or_path = "another"
    assert other != config
    assert repr(config).startswith("Eagle3SpeculatorConfig {")


def test_an_older_file_says_torch_dtype() -> None:
    content = {**PEER_FILE, "torch_dtype": "float16"}
    del content["dtype"]
    config = SpeculatorModelConfig.from_dict(content)
    assert config.dtype == torch.float16
    assert config.to_dict()["torch_dtype"] == "float16"
    assert "dtype" not in config.to_dict()


def without(*keys: str) -> dict[str, Any]:
    content = copy.deepcopy(PEER_FILE)
    block = content
    for key in keys[:-1]:
        block = block[key]
    del block[keys[-1]]
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "speculators_model_type: found null; expected one of eagle, hass, eagle3"),
        ({**PEER_FILE, "speculators_model_type": "eagle4"}, 'found "eagle4"; expected one of'),
        ({**PEER_FILE, "draft_vocab_size": "many"}, 'draft_vocab_size: found "many"; input should'),
        ({**PEER_FILE, "fc_norm": True}, "norm_before_fc and fc_norm are both true"),
        (
            {**PEER_FILE, "eagle_aux_hidden_state_layer_ids": [2, 25, 14]},
            r"is \[2, 25, 14\], expected",
        ),
        ({**PEER_FILE, "eagle_aux_hidden_state_layer_ids": [2, 2]}, "expected increasing numbers"),
        ({**PEER_FILE, "eagle_aux_hidden_state_layer_ids": [-1]}, "found -1; input should be"),
        ({**PEER_FILE, "transformer_layer_config": {}}, "model_type is missing"),
        (without("speculators_config"), "speculators_config: missing"),
        (without("speculators_config", "verifier"), r"speculators_config\.verifier: missing"),
    ],
)
def test_what_is_wrong_is_named(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SpeculatorModelConfig.from_dict(content)


def test_everything_that_is_wrong_is_in_one_error() -> None:
    content = {**without("speculators_config"), "draft_vocab_size": 0, "norm_output": "perhaps"}
    with pytest.raises(ConfigError) as caught:
        SpeculatorModelConfig.from_dict(content)
    for field in ("speculators_config", "draft_vocab_size", "norm_output"):
        assert f"\n  {field}: " in str(caught.value)


def test_the_error_names_the_directory(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**PEER_FILE, "draft_vocab_size": 0}))
    with pytest.raises(ConfigError, match=str(tmp_path)):
        SpeculatorModelConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"proposal_methods": []}, "at least 1 item"),
        ({"default_proposal_method": "sampling"}, "expected the proposal_type of one of"),
        ({"proposal_methods": [{"proposal_type": "gredy"}]}, "'gredy', expected one of greedy"),
        ({"proposal_methods": [{}]}, "proposal_type is None"),
    ],
)
def test_a_usage_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        usage(**changes)


def test_a_directory_of_another_type_is_refused(tmp_path: pathlib.Path) -> None:
    eagle3().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r'found "eagle3"; expected one of eagle$'):
        EagleSpeculatorConfig.from_pretrained(tmp_path)


def test_a_failed_write_leaves_the_old_file(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = eagle3()
    config.save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_bytes()

    def fail(_: int) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("os.fsync", fail)
    config.norm_output = True
    with pytest.raises(OSError, match="the disk is full"):
        config.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_bytes() == before


def test_the_verifier_from_its_own_configuration(tmp_path: pathlib.Path) -> None:
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    verifier = VerifierConfig.from_pretrained(tmp_path)
    assert verifier.architectures == ["LlamaForCausalLM"]
    assert verifier.name_or_path == str(tmp_path)
    nameless = VerifierConfig.from_config(PretrainedConfig())
    assert (nameless.name_or_path, nameless.architectures) == (None, [])


def test_a_type_can_be_added_and_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_config, "_TYPES", dict(model_config._TYPES))

    class ToySchema(schemas.SpeculatorSchema):
        architectures: list[str] = ["ToyDraftModel"]  # noqa: RUF012 - pydantic copies defaults
        speculators_model_type: str = "toy"
        depth: int = 2

    class ToyConfig(SpeculatorModelConfig):
        schema_class = ToySchema

    class OtherConfig(SpeculatorModelConfig):
        schema_class = ToySchema

    model_config.register_config(ToyConfig)
    made = ToyConfig(**{**eagle3().to_dict(), "speculators_model_type": "toy", "depth": 3})
    assert SpeculatorModelConfig.from_dict(made.to_dict()) == made
    with pytest.raises(ValueError, match=r"'toy' is registered already, by .*ToyConfig"):
        model_config.register_config(OtherConfig)


@pytest.mark.parametrize(
    "imports",
    [
        "import speculators; from transformers import AutoConfig",
        "from speculators import EagleSpeculatorConfig; from transformers import AutoConfig",
    ],
)
def test_auto_config_knows_our_type_where_we_came_first(
    imports: str, tmp_path: pathlib.Path
) -> None:
    eagle3(draft_vocab_size=77).save_pretrained(tmp_path)
    program = (
        f"{imports}\n"
        "import speculators, sys\n"
        "config = AutoConfig.from_pretrained(sys.argv[1])\n"
        "assert config.draft_vocab_size == 77\n"
        "assert type(config) is speculators.Eagle3SpeculatorConfig\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)


def test_auto_config_knows_our_type_where_transformers_came_first(tmp_path: pathlib.Path) -> None:
    """As in this process: the imports above are in that order."""
    eagle3(draft_vocab_size=77).save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is Eagle3SpeculatorConfig


def test_the_documented_name_of_the_proposals() -> None:
    assert speculators.proposals.GreedyTokenProposalConfig is GreedyTokenProposalConfig
