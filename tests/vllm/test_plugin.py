"""The plugin: twice is once, and a vLLM that it does not know it leaves alone."""

import json
import os
import pathlib
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from tests.vllm import trained_drafts
from vllm import ModelRegistry
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.transformers_utils.configs.speculators import algos
from vllm.transformers_utils.configs.speculators.base import SpeculatorsConfig
from vllm.utils import cpu_triton_utils

from speculators.configs import errors
from speculators.integrations.vllm.plugin import cpu_sampling, internals, speculator_types
from speculators.integrations.vllm.plugin import registration as plugin
from speculators.models import SpeculatorModel, find_algorithm


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not run the plugin; what a test does is undone."""
    monkeypatch.setattr(plugin, "_warned", set())
    for name in speculator_types.TYPES:
        monkeypatch.delitem(algos.SUPPORTED_SPECULATORS_TYPES, name, raising=False)
    function = SpeculatorsConfig.__dict__["build_vllm_speculative_config"]
    monkeypatch.setattr(SpeculatorsConfig, "build_vllm_speculative_config", function)
    function = cpu_triton_utils._expand_kernel_impl
    monkeypatch.setattr(cpu_triton_utils, "_expand_kernel_impl", function)
    current_platform.import_kernels()


def registered() -> tuple[Any, ...]:
    """All that the plugin changes."""
    return (
        dict(algos.SUPPORTED_SPECULATORS_TYPES),
        SpeculatorsConfig.__dict__["build_vllm_speculative_config"],
        cpu_triton_utils._expand_kernel_impl,
        ModelRegistry.models[speculator_types.ARCHITECTURE],
    )


def test_twice_is_once() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plugin.register()
        once = registered()
        plugin.register()
    assert registered() == once
    assert {"eagle", "hass"} <= set(algos.SUPPORTED_SPECULATORS_TYPES)


def test_a_type_that_vllm_knows_by_itself_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def own(config_dict: dict[str, Any], pre_trained_config: dict[str, Any]) -> None:
        del config_dict, pre_trained_config

    monkeypatch.setitem(algos.SUPPORTED_SPECULATORS_TYPES, "eagle", own)
    plugin.register()
    assert algos.SUPPORTED_SPECULATORS_TYPES["eagle"] is own
    assert algos.SUPPORTED_SPECULATORS_TYPES["hass"] is speculator_types.update_config


def takes_other_arguments(cls: type, config: dict[str, Any], version: int) -> dict[str, Any]:
    del cls, version
    return config


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (
            lambda patch: patch.delattr(SpeculatorsConfig, "build_vllm_speculative_config"),
            "has no SpeculatorsConfig.build_vllm_speculative_config",
        ),
        (
            lambda patch: patch.setattr(
                SpeculatorsConfig,
                "build_vllm_speculative_config",
                classmethod(takes_other_arguments),
            ),
            r"takes \(config, version\); expected \(config_dict\)",
        ),
        (
            lambda patch: patch.delattr(algos, "SUPPORTED_SPECULATORS_TYPES"),
            "has no SUPPORTED_SPECULATORS_TYPES",
        ),
        (
            lambda patch: patch.setitem(sys.modules, algos.__name__, None),
            f"{algos.__name__} cannot be imported",
        ),
        (
            lambda patch: patch.setattr(ModelRegistry, "get_supported_archs", None, raising=False),
            "TypeError",
        ),
    ],
)
def test_an_unknown_vllm_is_said_once_and_left_alone(
    change: Any, difference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    types = dict(algos.SUPPORTED_SPECULATORS_TYPES)
    change(monkeypatch)
    with pytest.warns(RuntimeWarning, match=difference) as caught:
        plugin.register()
    [message] = [str(w.message) for w in caught if w.category is RuntimeWarning]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plugin.register()
    assert "'eagle' and 'hass' will not be served" in message
    assert f"vLLM {internals.TESTED}" in message
    assert getattr(algos, "SUPPORTED_SPECULATORS_TYPES", types) == types


def test_one_part_that_fails_keeps_no_other_from_working(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cpu_triton_utils, "_expand_kernel_impl")
    with pytest.warns(RuntimeWarning, match="may not be lossless on a CPU"):
        plugin.register()
    assert "hass" in algos.SUPPORTED_SPECULATORS_TYPES


def test_vllm_finds_the_entry_point(tmp_path: pathlib.Path) -> None:
    info = tmp_path / "speculators-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: speculators\nVersion: 0\n")
    entry = "[vllm.general_plugins]\nspeculators = speculators.integrations.vllm:register\n"
    (info / "entry_points.txt").write_text(entry)
    program = (
        "from vllm.plugins import load_general_plugins; load_general_plugins()\n"
        "from vllm.transformers_utils.configs.speculators import algos\n"
        "print(sorted(algos.SUPPORTED_SPECULATORS_TYPES))"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    process = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert "'eagle'" in process.stdout
    assert "'hass'" in process.stdout


# ---- configuration


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A HASS draft; its verifier lies beside it."""
    root = tmp_path_factory.mktemp("draft")
    verifier = trained_drafts.make_verifier("llama", root / "verifier")
    config = find_algorithm("hass").new_config(verifier.config, str(root / "verifier"))
    SpeculatorModel.from_config(config, verifier).save_pretrained(root / "draft")
    return root / "draft"


@pytest.mark.parametrize("with_model_type", [True, False])
def test_vllm_reads_a_directory_as_a_model(
    draft: pathlib.Path, tmp_path: pathlib.Path, with_model_type: bool
) -> None:
    content = json.loads((draft / "config.json").read_text())
    content.pop("model_type", None)
    if with_model_type:
        content["model_type"] = "speculators"
    (tmp_path / "config.json").write_text(json.dumps(content))
    plugin.register()
    arguments = EngineArgs(model=str(tmp_path), max_model_len=64, skip_tokenizer_init=True)
    speculative = arguments.create_engine_config().speculative_config
    assert speculative is not None
    assert speculative.method == "eagle"
    assert speculative.num_speculative_tokens == 5
    assert speculative.draft_model_config.architectures == [speculator_types.ARCHITECTURE]


def test_vllm_needs_no_plugin_for_eagle3(tmp_path: pathlib.Path) -> None:
    verifier = trained_drafts.make_verifier("llama", tmp_path / "verifier")
    config = find_algorithm("eagle3").new_config(verifier.config, str(tmp_path / "verifier"))
    SpeculatorModel.from_config(config, verifier).save_pretrained(tmp_path / "draft")
    program = (
        "import sys\n"
        "from vllm.engine.arg_utils import EngineArgs\n"
        "arguments = EngineArgs(model=sys.argv[1], max_model_len=64, skip_tokenizer_init=True)\n"
        "print('method:', arguments.create_engine_config().speculative_config.method)\n"
        "print('ours:', 'speculators' in sys.modules)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "draft")],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"VLLM_PLUGINS": ""},
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-2:] == ["method: eagle3", "ours: False"]


def test_a_configuration_that_is_not_valid_is_refused(draft: pathlib.Path) -> None:
    content = json.loads((draft / "config.json").read_text())
    content["fusion_bias"] = "perhaps"
    with pytest.raises(errors.ConfigError, match='fusion_bias: found "perhaps"'):
        speculator_types.update_config(content, content["transformer_layer_config"])


def test_what_an_older_file_leaves_out_is_filled_in(draft: pathlib.Path) -> None:
    content = json.loads((draft / "config.json").read_text())
    layer = content["transformer_layer_config"]
    for key in ("hidden_act", "rope_parameters", "mlp_bias"):
        del layer[key]
    layer["rope_theta"] = 5e5  # where transformers 4 has it
    speculator_types.update_config(content, layer)
    assert layer["hidden_act"] == "silu"
    assert layer["rope_parameters"]["rope_theta"] == 5e5
    assert layer["mlp_bias"] is False


# ---- sampling on a CPU


def expand(function: Any, values: list[float], dtype: torch.dtype, ends: list[int]) -> list[float]:
    output = torch.full((ends[-1],), -7, dtype=dtype)
    ends_tensor = torch.tensor(ends, dtype=torch.int32)
    function(output, torch.tensor(values, dtype=dtype), ends_tensor, 0, 3)
    result: list[float] = output.tolist()
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64])
def test_each_requests_value_is_repeated(dtype: torch.dtype) -> None:
    expected = [5, 5, 3, 8, 8, 8]
    assert expand(cpu_sampling.expand_batch, [5, 0, 9, 8], dtype, [2, 3, 3, 6]) == expected
    plugin.register()
    guard = cpu_triton_utils._expand_kernel_impl
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert expand(guard, [5, 0, 9, 8], dtype, [2, 3, 3, 6]) == expected


def test_the_defect_is_mended_and_said_once() -> None:
    def defective(
        output: Any, input_val: Any, cu_num_tokens: Any, replace_from: int, replace_to: int
    ) -> None:
        cpu_sampling.expand_batch(
            output.long(), input_val.long(), cu_num_tokens, replace_from, replace_to
        )

    guard = cpu_sampling.guarded(defective)
    with pytest.warns(RuntimeWarning, match="has a defect"):
        first = expand(guard, [0.5, 2.0], torch.float32, [1, 3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = expand(guard, [0.5, 0.0], torch.float32, [2, 3])
    assert (first, second) == ([0.5, 2, 2], [0.5, 0.5, 3])


def test_a_function_without_the_defect_is_left_alone() -> None:
    calls = []

    def sound(*arguments: Any) -> None:
        calls.append(arguments)
        cpu_sampling.expand_batch(*arguments)

    guard = cpu_sampling.guarded(sound)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expand(guard, [0.5, 2.0], torch.float32, [1, 3])
    tried = len(calls)
    expand(guard, [0.5, 2.0], torch.float32, [1, 3])
    assert len(calls) == tried + 1
