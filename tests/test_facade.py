"""``import speculators`` is lazy: it brings nothing along, and its names work all the same."""

import importlib
import subprocess
import sys

import pytest

import speculators


def test_import_brings_nothing_but_the_standard_library() -> None:
    """Whatever is not ours and not in the standard library costs start-up time of every command."""
    program = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "import speculators\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - sys.stdlib_module_names - {'speculators'}))\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert process.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["", ".models", ".models.verifier"])
def test_every_public_name_can_be_had(package: str) -> None:
    module = importlib.import_module(f"speculators{package}")
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert name in dir(module)


def test_names_that_other_code_imports() -> None:
    """Under the names that the documentation of the format's other library gives."""
    from speculators.models import eagle, eagle3, hass
    from speculators.proposals import GreedyTokenProposalConfig

    assert speculators.GreedyTokenProposalConfig is GreedyTokenProposalConfig
    assert speculators.Eagle3SpeculatorConfig is eagle3.Eagle3SpeculatorConfig
    assert speculators.EagleSpeculatorConfig is eagle.EagleSpeculatorConfig
    assert speculators.HassSpeculatorConfig is hass.HassSpeculatorConfig


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'optimise'"):
        _ = speculators.optimise
