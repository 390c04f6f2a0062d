"""A recipe: all that the main job can be told, as one typed tree.

A value comes from a flag, else from the recipe's YAML file, else from the defaults here. Names are
the same everywhere: ``training.optimizer.learning_rate`` in the file is
``--training.optimizer.learning-rate`` on the command line. What a run was made with is written
beside its results, in the same form, so that it can be run again.
"""

import difflib
import inspect
import pathlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import pydantic
import yaml
from pydantic import Field

from speculators.atomic import atomic_file
from speculators.configs.errors import ConfigError
from speculators.decoding.trees import Tree, parse_tree
from speculators.models.algorithm import AlgorithmSpec, find_algorithm
from speculators.models.objective import ObjectiveSettings
from speculators.training.settings import TrainingSettings, merge_settings


class _Settings(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class VerifierSettings(_Settings):
    """Which model the draft is for.

    Attributes:
        path: a folder, or a name on the Hub.
        dtype: of its weights: as stored (``"auto"``), or another.
        device: where it runs; None: the first GPU if there is one, else the CPU.
        revision: a branch, tag or commit on the Hub.
        trust_remote_code: runs code that comes with the model.
    """

    path: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False


class PrepareSettings(_Settings):
    """From rows to token ids; see ``speculators.data.prepare``.

    Attributes:
        max_length: rows keep their first so many tokens.
        split: of a dataset.
        last_turn_only: learn only the assistant's last turn.
        on_malformed: whether malformed rows are skipped and counted, or an error.
        num_samples: use only so many rows.
        template_arguments: further variables of the chat template.
    """

    max_length: int = Field(default=2048, ge=1)
    split: str = "train"
    last_turn_only: bool = False
    on_malformed: Literal["skip", "error"] = "skip"
    num_samples: int | None = Field(default=None, ge=1)
    template_arguments: dict[str, Any] = {}


class VllmSettings(_Settings):
    """How ``generate.source=vllm`` uses vLLM; see ``integrations.vllm.hidden_states``.

    Attributes:
        endpoint: a server that runs already; None starts one.
        python: of the environment with vLLM, if it is not this one.
        flags: further ones of ``vllm serve``, such as ``["--tensor-parallel-size=2"]``.
        max_requests: in flight.
        storage: the folder through which states come, best one in memory; None: a temporary one.
        start_timeout: seconds until the server must answer.
        attempts: of a request that fails in a way that may pass.
        cosine: the first documents are compared with transformers; 95 % of their tokens must have a
            cosine of so much.
        max_difference: of two entries there, as a share of the stream's largest.
    """

    endpoint: str | None = None
    python: str | None = None
    flags: list[str] = []
    max_requests: int = Field(default=32, ge=1)
    storage: str | None = None
    start_timeout: float = Field(default=900.0, gt=0)
    attempts: int = Field(default=6, ge=1)
    cosine: float = Field(default=0.999, le=1)
    max_difference: float = Field(default=0.05, ge=0)


class GenerateSettings(_Settings):
    """From token ids to hidden states; see ``speculators.data.generate``.

    Attributes:
        source: the back end, by name: ``transformers``, ``vllm``, or ``files``.
        dtype: of the verifier's weights while it writes answers and states; None: as
            ``verifier.dtype`` says. Served verifiers mostly run in bfloat16.
        regenerate: lets the verifier write the answers; drafts are judged by what it says.
        temperature: of the answers; 0 for the likeliest tokens.
        top_p: of the answers.
        max_new_tokens: of an answer.
        store_dtype: of the stored states; ``int8`` and ``fp8`` (e4m3) with a scale for each token
            and stream. ``bf16`` is another name of ``bfloat16``.
        batch_tokens: tokens computed at once.
        files: for ``files``: the folder with ``hs_0.safetensors`` and so on.
        vllm: for ``vllm``: how it is used.
    """

    source: str = "transformers"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    regenerate: bool = False
    temperature: float = Field(default=0.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int = Field(default=512, ge=1)
    store_dtype: Annotated[
        Literal["bfloat16", "float32", "int8", "fp8"],
        pydantic.BeforeValidator(lambda name: "bfloat16" if name == "bf16" else name),
    ] = "bfloat16"
    batch_tokens: int = Field(default=16384, ge=1)
    files: str | None = None
    vllm: VllmSettings = VllmSettings()


class EvaluateSettings(_Settings):
    """How the draft is measured; see ``speculators.evaluation``.

    Attributes:
        prompts: a file of held-out prompts; None: documents that training held back.
        limit: use only so many.
        k: tokens drafted before each verification; None: as the draft's configuration says.
        tree: trees that each draft model, and suffix drafting, is measured with, too:
            ``"dynamic"`` (EAGLE-2), the children of each node by depth such as ``"4,2,1"``, or a
            .json file of paths of ranks.
        nodes: of a dynamic tree.
        depth: of a dynamic tree.
        children: of a node in a dynamic tree, and how many nodes of each depth have any.
        max_new_tokens: of each answer.
        batch_size: prompts decoded at once.
        temperature: 0 for greedy decoding.
        ngram: whether ``train`` measures prompt lookup, which needs no draft model, beside it;
            ``evaluate`` measures what it is given.
        suffix: the same for suffix drafting, which needs none either.
        suffix_corpus: earlier outputs that suffix drafting finds matches in, besides prompt and
            output: a folder of generate or prepare, or a file as for training.
        repeats: how often everything is timed.
    """

    prompts: str | None = None
    limit: int | None = Field(default=64, ge=1)
    k: int | None = Field(default=None, ge=1)
    tree: str | None = None
    nodes: int = Field(default=48, ge=1)
    depth: int = Field(default=6, ge=1)
    children: int = Field(default=10, ge=1)
    max_new_tokens: int = Field(default=128, ge=1)
    batch_size: int = Field(default=1, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    ngram: bool = True
    suffix: bool = False
    suffix_corpus: str | None = None
    repeats: int = Field(default=1, ge=1)

    def shape(self) -> Tree | None:
        """The tree, if there is one.

        Raises:
            ConfigError: it is no shape, or its file cannot be read.
        """
        if self.tree is None:
            return None
        try:
            return parse_tree(self.tree, self.nodes, self.depth, self.children)
        except (OSError, ValueError) as error:
            raise ConfigError(f"evaluate.tree: {error}") from error


class Recipe(_Settings):
    """The main job, whole.

    Attributes:
        algorithm: by name, such as ``"hass"``.
        verifier: which model the draft is for.
        data: what to train on: files, or a dataset.
        seed: of everything random; ``training.seed`` is this one unless it is given.
        init_from: a draft to go on from, in place of a new one.
        prepare: from rows to token ids.
        generate: from token ids to hidden states.
        draft: the algorithm's own options, such as ``speculative_tokens``.
        objective: what is minimised, where it is not the algorithm's default.
        training: how.
        evaluate: how the draft is measured.
    """

    algorithm: str = "hass"
    verifier: VerifierSettings = VerifierSettings()
    data: str | None = None
    seed: int = 0
    init_from: str | None = None
    prepare: PrepareSettings = PrepareSettings()
    generate: GenerateSettings = GenerateSettings()
    draft: dict[str, Any] = {}
    objective: dict[str, Any] = {}
    training: TrainingSettings = TrainingSettings()
    evaluate: EvaluateSettings = EvaluateSettings()

    @pydantic.model_validator(mode="after")
    def _share_seed(self) -> Self:
        if "seed" not in self.training.model_fields_set:
            self.__dict__["training"] = self.training.model_copy(update={"seed": self.seed})
        return self

    @property
    def spec(self) -> AlgorithmSpec:
        """The algorithm's record."""
        return find_algorithm(self.algorithm)

    @property
    def objective_settings(self) -> ObjectiveSettings:
        """The algorithm's defaults, with this recipe's changes."""
        defaults = self.spec.objective_settings
        return merge_settings(type(defaults), defaults.model_dump(), self.objective)

    def check(self) -> "Recipe":
        """Looks at what only the algorithm can know: its name, its options, its objective.

        Raises:
            ValueError: there is no such algorithm.
            ConfigError: it has no such option.
        """
        known = [
            name
            for name, parameter in inspect.signature(self.spec.new_config).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        ]
        for name in self.draft.keys() - set(known):
            close = difflib.get_close_matches(name, known, 1)
            raise ConfigError(
                f"draft.{name}: {self.algorithm} has no such option; "
                + (f"did you mean draft.{close[0]}?" if close else f"expected one of {known}")
            )
        _ = self.objective_settings
        self.evaluate.shape()
        return self

    def write(self, path: pathlib.Path) -> None:
        """Writes the recipe as YAML, whole, defaults included."""
        with atomic_file(path, "w") as file:
            yaml.safe_dump(self.model_dump(mode="json"), file, sort_keys=False)


def read_recipe(path: pathlib.Path | None, flags: Mapping[str, Any]) -> Recipe:
    """A recipe's file with flags over it.

    Args:
        path: the file; None for the defaults. Relative paths in it are relative to its folder.
        flags: dotted names to values.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: the file is no YAML, or a name or a value is wrong.
    """
    layers: list[Mapping[str, Any]] = [flags]
    if path is not None:
        layers.insert(0, _read(path))
    source = "the recipe" if path is None else f"the recipe {path}"
    return merge_settings(Recipe, *layers, source=source).check()


def parse_flags(words: Sequence[str]) -> dict[str, Any]:
    """Settings from ``--section.name=value`` or ``--section.name value``; values are YAML.

    Raises:
        ConfigError: a word is not of this form.
    """
    flags: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not name or not (equals or rest):
            raise ConfigError(
                f"{word!r} is no setting; expected --name=value, such as --training.epochs=3"
            )
        flags[name.replace("-", "_")] = _value(text if equals else rest.pop(0))
    return flags


def _value(text: str) -> Any:
    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:  # YAML 1.1 takes 1e-4 for a word
            return float(value)
        except ValueError:
            return value
    return value


_PATHS = (
    (None, "data"),
    (None, "init_from"),
    ("verifier", "path"),
    ("generate", "files"),
    ("evaluate", "prompts"),
    ("evaluate", "suffix_corpus"),
)


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {type(content).__name__}; expected settings by name")
    for section, name in _PATHS:
        place = content if section is None else content.get(section)
        if isinstance(place, dict) and isinstance(place.get(name), str):
            # Behind a link, such as Bazel's, files stay where they are.
            beside = path.resolve().parent / place[name]
            if beside.exists():
                place[name] = str(beside)
    return content
