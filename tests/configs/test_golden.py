"""Configurations that the peer library wrote: read, and written back the same."""

import json
import pathlib

import pytest

from speculators import (
    Eagle3SpeculatorConfig,
    EagleSpeculatorConfig,
    SpeculatorModelConfig,
)

FILES = sorted(pathlib.Path("tests/golden").glob("*/config.json"))


def test_there_are_golden_files_of_both_types() -> None:
    types = [json.loads(file.read_text())["speculators_model_type"] for file in FILES]
    assert set(types) == {"eagle", "eagle3"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
def test_it_is_written_back_the_same(file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    content = json.loads(file.read_text())
    config = SpeculatorModelConfig.from_pretrained(file.parent)
    classes = {"eagle": EagleSpeculatorConfig, "eagle3": Eagle3SpeculatorConfig}
    assert type(config) is classes[content["speculators_model_type"]]
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == content


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
def test_the_decoders_configuration_is_understood(file: pathlib.Path) -> None:
    layer = SpeculatorModelConfig.from_pretrained(file.parent).transformer_layer_config
    assert layer.hidden_size == 32
    assert layer.vocab_size == 64
    assert layer.rope_parameters["rope_theta"] > 0, "older files say rope_theta at the top"
