"""Whether vLLM can serve a draft's directory as it was trained, asked before vLLM starts.

vLLM notices little of what is wrong with a draft: a tensor that is not there stays what happened to
lie in memory, a missing key has a default of its own, and a verifier of the same size will do. The
server then runs, its output is right, since the verifier decides, and hardly a token of the draft
is accepted. So everything that has to fit is compared here, in seconds and without vLLM, and all
that does not is in ONE error.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any

import torch

from speculators.configs.errors import ConfigError
from speculators.configs.model_config import CONFIG_NAME, SpeculatorModelConfig
from speculators.configs.proposals import (
    GreedyTokenProposalConfig,
    SamplingTokenProposalConfig,
    TokenProposalConfig,
)
from speculators.models.algorithm import HiddenStates, find_algorithm
from speculators.models.hub import local_directory
from speculators.models.speculator_model import SpeculatorModel
from speculators.models.vocabulary import VocabularyMapping
from speculators.models.weights import CheckpointError, TensorSpec, read_tensors

# How many auxiliary streams vLLM gives a Llama draft whose decoder's configuration names no number.
_DEFAULT_STREAMS = 3
# What makes vLLM's layers have biases; no draft of ours has tensors for them.
_BIASES = ("bias", "qkv_bias")
# Keys of EAGLE-3 that mean something else to vLLM if they are missing than if they are written.
_WRITTEN = {"eagle3": ("norm_before_residual", "draft_vocab_size")}


class UnfitDraftError(ValueError):
    """VLLM would not serve the draft, or not as it was trained; the message has all reasons."""


@dataclasses.dataclass(frozen=True)
class ServedDraft:
    """A draft that fits, and how vLLM is to use it.

    Attributes:
        directory: where it lies.
        speculators_model_type: its type, such as ``"eagle3"``.
        method: vLLM's name for its way of drafting.
        verifier: a directory or a name on the Hub.
        num_draft_tokens: drafted before each verification.
        warnings: what does not keep it from being served, each a line.
        trust_remote_code: whether code that comes with the verifier may run.
        revision: of the verifier on the Hub.
    """

    directory: pathlib.Path
    speculators_model_type: str
    method: str
    verifier: str
    num_draft_tokens: int
    warnings: tuple[str, ...] = ()
    trust_remote_code: bool = False
    revision: str | None = None

    def speculative_config(self) -> dict[str, Any]:
        """What vLLM's ``--speculative-config`` takes, as JSON."""
        return {
            "method": self.method,
            "model": str(self.directory),
            "num_speculative_tokens": self.num_draft_tokens,
        }


def check_draft(
    draft: str | os.PathLike[str],
    *,
    verifier: str | None = None,
    num_draft_tokens: int | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> ServedDraft:
    """Compares a draft with itself, with its verifier, and with what vLLM makes of it.

    Args:
        draft: its directory, or its name on the Hub.
        verifier: a directory or a name on the Hub; by default the one that the draft names.
        num_draft_tokens: drafted before each verification; by default as the draft's configuration
            says.
        trust_remote_code: whether code that comes with the verifier's configuration may run.
        revision: of the verifier on the Hub.

    Raises:
        OSError: there is no such draft.
        UnfitDraftError: something does not fit; everything that does not is named.
    """
    directory = local_directory(draft).absolute()
    try:
        raw = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ConfigError(f"config.json holds a {type(raw).__name__}; expected an object")
        config = SpeculatorModelConfig.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise _error(directory, _lines(error, "config.json")) from None
    check = _Check(directory, raw, config)
    try:
        named = check.verifier_name(verifier)
        check.written_keys()
        check.draft_vocabulary()
        check.tensors()
        check.streams()
        method = check.method()
        count = check.proposal(num_draft_tokens)
        if named is not None:
            check.compare_verifier(named, trust_remote_code, revision)
    except ConfigError as error:  # no model can be made of it, and so nothing compared
        check.problems += _lines(error, "config.json")
    if check.problems:
        raise _error(directory, check.problems)
    return ServedDraft(
        directory=directory,
        speculators_model_type=config.speculators_model_type,
        method=str(method),
        verifier=str(named),
        num_draft_tokens=count,
        warnings=tuple(check.warnings),
        trust_remote_code=trust_remote_code,
        revision=revision,
    )


class _Check:
    """The single questions; each adds to ``problems`` what it finds."""

    def __init__(
        self, directory: pathlib.Path, raw: dict[str, Any], config: SpeculatorModelConfig
    ) -> None:
        self.directory, self.raw, self.config = directory, raw, config
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self.spec = find_algorithm(config.speculators_model_type)
        self.layer: dict[str, Any] = raw["transformer_layer_config"]
        self._model: SpeculatorModel | None = None

    @property
    def model(self) -> SpeculatorModel:
        if self._model is None:
            with torch.device("meta"):
                self._model = self.spec.model_class(self.config)
        return self._model

    # ---- the configuration

    def method(self) -> str | None:
        if self.spec.vllm_method is None:
            self.problems.append(
                f"speculators_model_type: found {self.spec.name!r}, which vLLM cannot draft with; "
                "expected a type whose AlgorithmSpec has a vllm_method"
            )
        return self.spec.vllm_method

    def written_keys(self) -> None:
        for key in _WRITTEN.get(self.spec.name, ()):
            if self.raw.get(key) is None:
                found = getattr(self.config, key)
                self.problems.append(
                    f"{key}: missing from config.json, which vLLM takes for another value than the "
                    f"{json.dumps(found)} that it means; write it"
                )
        for key in _BIASES:
            if self.layer.get(key):
                self.problems.append(
                    f"transformer_layer_config.{key}: found {json.dumps(self.layer[key])}, for "
                    "which vLLM's layers have biases that the draft does not have; remove it"
                )

    def draft_vocabulary(self) -> None:
        """Its size, before a model is made, which cannot be of any size."""
        found = getattr(self.config.schema, "draft_vocab_size", None)
        most = self.config.transformer_layer_config.vocab_size
        if found is not None and found > most:
            raise ConfigError(
                f"draft_vocab_size: found {found}; expected at most the {most} tokens of "
                "transformer_layer_config.vocab_size"
            )

    def streams(self) -> None:
        """The auxiliary streams: named, and as many as vLLM's fusion takes."""
        if self.spec.hidden_states is not HiddenStates.AUXILIARY:
            return
        ids = self.config.aux_layer_ids
        if not ids:
            self.problems.append(
                f"eagle_aux_hidden_state_layer_ids: found {json.dumps(ids)}, so that vLLM takes "
                "layers of its own choice; write the increasing numbers of the layers that the "
                "draft was trained on"
            )
            return
        keys = ["num_aux_hidden_states"]
        default: int = _DEFAULT_STREAMS
        if self.layer["model_type"] != "llama":
            keys, default = ["num_aux_layers", *keys], len(ids)
        found = next((self.layer[key] for key in keys if self.layer.get(key) is not None), default)
        if found != len(ids):
            self.problems.append(
                f"transformer_layer_config.num_aux_hidden_states: vLLM takes {found} layers of the "
                f"verifier, and the draft reads {len(ids)}; write "
                f'"num_aux_hidden_states": {len(ids)} there'
            )

    def proposal(self, wanted: int | None) -> int:
        """Tokens to draft; a chain is all that vLLM can do."""
        if wanted is not None and wanted < 1:
            self.problems.append(f"--k: found {wanted}; expected at least 1")
            return 1
        block = self.config.speculators_config
        chosen: TokenProposalConfig = next(
            method
            for method in block.proposal_methods
            if method.proposal_type == block.default_proposal_method
        )
        lossless = {"verifier_accept_k": 1, "accept_tolerance": 0, "accept_lenience": 1}
        for key, value in lossless.items():
            found = getattr(chosen, key, value)
            if found != value:
                self.warnings.append(
                    f"{key} is {found} in config.json; vLLM passes over it and changes no output"
                )
        if wanted is not None:
            return wanted
        if isinstance(chosen, GreedyTokenProposalConfig | SamplingTokenProposalConfig):
            return chosen.speculative_tokens
        self.problems.append(
            f"speculators_config.default_proposal_method: found {chosen.proposal_type!r}, and vLLM "
            "drafts chains only; say how many tokens with --k"
        )
        return 1

    # ---- the tensors

    def tensors(self) -> None:
        expected = {
            name: TensorSpec(
                tuple(tensor.shape), "float" if tensor.is_floating_point() else tensor.dtype
            )
            for name, tensor in self.model.state_dict().items()
        }
        # vLLM gives the draft the verifier's where it has none of its own. A head it gives as it
        # is, so that there must be a place for each of the verifier's tokens.
        borrowed = set(self.model.borrowable)
        if self.model.draft_vocab_size != self.model.vocab_size:
            borrowed.discard("lm_head.weight")
        try:
            found = read_tensors(self.directory, expected, optional=borrowed)
            if "d2t" in found:
                VocabularyMapping(found["d2t"], found["t2d"])  # checks itself
        except ValueError as error:  # CheckpointError is one
            self.problems += _lines(error)

    # ---- the verifier

    def verifier_name(self, wanted: str | None) -> str | None:
        named: str | None = wanted or self.config.speculators_config.verifier.name_or_path
        if named is None:
            self.problems.append(
                "speculators_config.verifier.name_or_path: found null; say where the verifier is "
                "with --verifier"
            )
            return None
        path = pathlib.Path(named)
        # What else has at most one slash may be on the Hub.
        is_path = path.is_absolute() or named.startswith((".", "~")) or named.count("/") > 1
        if is_path and not path.is_dir():
            self.problems.append(
                f"verifier: found {named}, which is no directory here; say where it is with "
                "--verifier"
            )
            return None
        return named

    def compare_verifier(self, name: str, trust_remote_code: bool, revision: str | None) -> None:
        from transformers import AutoConfig

        try:
            whole = AutoConfig.from_pretrained(
                name, trust_remote_code=trust_remote_code, revision=revision
            )
        except (OSError, ValueError) as error:
            self.problems += [f"verifier: {_lines(error)[0]}"]
            return
        text = whole.get_text_config(decoder=True)
        width, vocabulary = self.model.verifier_hidden_size, self.model.vocab_size
        self._compare("hidden size", width, text.hidden_size)
        self._compare("vocabulary", vocabulary, text.vocab_size)
        ids, layers = self.config.aux_layer_ids or (), text.num_hidden_layers
        if ids and max(ids) > layers:
            self.problems.append(
                f"eagle_aux_hidden_state_layer_ids: found {json.dumps(list(ids))}, and the "
                f"verifier {name} has {layers} layers; expected numbers from 0 to {layers}"
            )
        expected = list(self.config.speculators_config.verifier.architectures)
        found = list(whole.architectures or ())
        if expected and found and not set(expected) & set(found):
            self.warnings.append(
                f"the draft was made for a {expected[0]}, and {name} is a {found[0]}; its tokens "
                "may hardly be accepted"
            )

    def _compare(self, what: str, drafts: int, verifiers: int) -> None:
        if drafts != verifiers:
            self.problems.append(
                f"{what}: the draft was made for a verifier of {drafts}, and the verifier has "
                f"{verifiers}; give the verifier that the draft belongs to with --verifier"
            )


def _lines(error: Exception, source: str = "") -> list[str]:
    """The single problems of an error of the library; of another one, its first line."""
    first, *further = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, ConfigError | CheckpointError) and further:
        return [line.strip() for line in further]
    return [f"{source}: {first}" if source and source not in first else first]


def _error(directory: pathlib.Path, problems: list[str]) -> UnfitDraftError:
    summary = f"{directory} cannot be served by vLLM as it is:"
    return UnfitDraftError("\n  ".join([summary, *problems]))
