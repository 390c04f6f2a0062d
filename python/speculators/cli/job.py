"""The main job: prepare, generate, train, evaluate, each taken up where it was left.

The stages are library functions that know nothing of each other; here they are put in a row, with
the folders between them::

    OUTPUT/config.json, model.safetensors, README.md          the draft, to load and to serve
    OUTPUT/report.json, report.md, acceptance.png, run.yaml   what it brings, and how it was made
    OUTPUT/data/prepared, OUTPUT/data/hidden_states           what it was made from
    OUTPUT/training                                           checkpoints and logs
"""

import contextlib
import dataclasses
import pathlib
import sys
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import datasets
import torch
import transformers

from speculators.cli.evaluation import load_verifier, measure, suffix_drafter, trees
from speculators.cli.failures import UsageError
from speculators.cli.progress import ConsoleProgress
from speculators.cli.recipe import Recipe
from speculators.data.generate import GenerateReport, generate
from speculators.data.prepare import PreparedDataset, PrepareReport, prepare, token_counts
from speculators.data.regenerate import RegenerateSettings
from speculators.data.sources import HiddenStateSource, TransformersSource, make_source
from speculators.data.store import HiddenStateStore
from speculators.evaluation.evaluate import NGRAM, AnyDrafter
from speculators.evaluation.prompts import Prompt, read_prompts
from speculators.evaluation.report import EvaluationReport
from speculators.integrations.vllm.hidden_states.client import Patience
from speculators.integrations.vllm.hidden_states.comparison import Tolerance
from speculators.integrations.vllm.hidden_states.files import FilesSource
from speculators.integrations.vllm.hidden_states.source import VllmOptions, make_vllm_source
from speculators.models.speculator_model import SpeculatorModel
from speculators.models.verifier.verifier import Verifier
from speculators.models.vocabulary import VocabularyMapping
from speculators.training.run import TrainingReport, documents_of, train
from speculators.training.validation import validation_prompts


@dataclasses.dataclass(frozen=True)
class Folders:
    """Where the job's parts lie.

    Attributes:
        output: the draft and its report.
        data: prepared rows and hidden states; several jobs for one verifier may share it.
    """

    output: pathlib.Path
    data: pathlib.Path

    @property
    def prepared(self) -> pathlib.Path:
        """Token ids and loss masks."""
        return self.data / "prepared"

    @property
    def hidden_states(self) -> pathlib.Path:
        """The verifier's hidden states."""
        return self.data / "hidden_states"

    @property
    def training(self) -> pathlib.Path:
        """Checkpoints and logs."""
        return self.output / "training"


class Job:
    """One recipe at work; each stage can be run alone.

    Args:
        recipe: what to do.
        folders: where.
        progress: shows how far it is.
        overwrite: whether stale data of other settings is replaced.

    Raises:
        UsageError: the recipe names no verifier.
    """

    def __init__(
        self,
        recipe: Recipe,
        folders: Folders,
        progress: ConsoleProgress,
        *,
        overwrite: bool = False,
    ) -> None:
        self.recipe = recipe
        self.folders = folders
        self.progress = progress
        self._overwrite = overwrite
        self._verifier: Verifier | None = None
        # The stages show their own progress.
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
        if recipe.verifier.path is None:
            raise UsageError(
                "there is no verifier; give one with --verifier: a folder, or a name on the Hub"
            )

    @property
    def verifier(self) -> Verifier:
        """The verifier, loaded when first asked for."""
        if self._verifier is None:
            self._verifier = load_verifier(self.recipe.verifier, self.verifier_path)
        return self._verifier

    @property
    def verifier_path(self) -> str:
        """The folder by its real path, which outlives links to it; or the name on the Hub."""
        path = pathlib.Path(str(self.recipe.verifier.path))
        config = path / "config.json"
        if config.is_file():
            return str(config.resolve().parent)
        if path.is_dir() or path.is_absolute():
            raise UsageError(f"{path} has no config.json; expected a verifier's folder")
        return str(self.recipe.verifier.path)

    def prepare(self) -> PrepareReport:
        """Rows to token ids and loss masks."""
        if self.recipe.data is None:
            raise UsageError("there is no data; give some with --data: files, or a dataset")
        settings = self.recipe.prepare
        regenerate = self.recipe.generate.regenerate
        report = prepare(
            self.recipe.data,
            self.folders.prepared,
            self.verifier.tokenizer,
            max_length=settings.max_length,
            split=settings.split,
            last_turn_only=settings.last_turn_only,
            add_generation_prompt=regenerate,
            on_malformed=settings.on_malformed,
            require_learnable=not regenerate,
            num_samples=settings.num_samples,
            template_arguments=settings.template_arguments,
            overwrite=self._overwrite,
        )
        self.progress.message(
            f"prepared {report.kept} of {report.rows} rows, {report.tokens} tokens"
            + (f", {report.malformed} malformed rows skipped" if report.malformed else "")
        )
        return report

    def generate(self) -> GenerateReport:
        """Token ids to hidden states."""
        settings = self.recipe.generate
        spec, config = self.recipe.spec, self._config()
        layers = {*spec.capture_layers(config, self.verifier.num_layers), self.verifier.num_layers}
        regenerate = None
        if settings.regenerate:
            regenerate = RegenerateSettings(
                settings.temperature, settings.top_p, settings.max_new_tokens, self.recipe.seed
            )
        prepared = PreparedDataset.open(self.folders.prepared)
        with self._source(layers, int(prepared.lengths.max())) as source:
            report = generate(
                prepared,
                self.folders.hidden_states,
                source,
                regenerate=regenerate,
                store_dtype=settings.store_dtype,
                batch_tokens=settings.batch_tokens,
                overwrite=self._overwrite,
                progress=self.progress,
            )
        self.progress.message(
            f"hidden states of {report.documents} documents, {report.tokens} tokens, "
            f"{report.learnable} of them to learn"
        )
        return report

    def train(self, *, resume: bool = True) -> TrainingReport:
        """Hidden states to a draft, which is put into the output folder."""
        torch.manual_seed(self.recipe.seed)
        store = HiddenStateStore.open(self.folders.hidden_states)
        draft = self._new_draft(store).to(self.verifier.device)
        spec = self.recipe.spec
        objective = spec.objective(draft, self.verifier.head, self.recipe.objective_settings)
        report = train(
            draft,
            objective,
            store,
            self.recipe.training,
            self.folders.training,
            verifier=self.verifier,
            resume="auto" if resume else False,
            made_from={"seed": self.recipe.seed, "init_from": self.recipe.init_from},
            progress=self.progress,
        )
        best = SpeculatorModel.from_pretrained(report.draft)
        best.config.speculators_provenance = {
            "hidden_states": store.content_hash,
            "objective": self.recipe.objective_settings.model_dump(mode="json"),
            "training": self.recipe.training.model_dump(mode="json"),
            "updates": report.best_update or report.updates,
        }
        publish(best, self.folders.output)
        self.recipe.write(self.folders.output / "run.yaml")
        self.progress.message(f"trained {report.updates} updates: {self.folders.output}")
        return report

    def evaluate(self) -> EvaluationReport:
        """The draft on held-out prompts, and its report in the output folder."""
        settings = self.recipe.evaluate
        prompts = (
            self._held_back_prompts()
            if settings.prompts is None
            else read_prompts(settings.prompts, self.verifier.tokenizer, limit=settings.limit)
        )
        draft = SpeculatorModel.from_pretrained(self.folders.output, verifier=self.verifier)
        drafters: dict[str, AnyDrafter] = {self.recipe.algorithm: draft.to(self.verifier.device)}
        if settings.ngram:
            drafters["n-gram"] = NGRAM
        if settings.suffix:
            drafters["suffix"] = suffix_drafter(self.recipe, self.verifier)
        drafters |= trees(self.recipe, self.verifier, drafters)
        report = measure(self.verifier, drafters, prompts, self.recipe, self.progress)
        report.write(self.folders.output)
        return report

    @contextlib.contextmanager
    def _source(self, layers: Iterable[int], longest: int) -> Iterator[HiddenStateSource]:
        """What reads documents of at most ``longest`` tokens; it is closed at the end."""
        settings = self.recipe.generate
        if settings.source not in {"transformers", "vllm", "files"}:
            yield make_source(settings.source, self.verifier_path, layers)
            return
        here = TransformersSource(self._generating_verifier(), layers)
        if settings.source == "transformers":
            yield here
        elif settings.source == "files":
            if settings.files is None:
                raise UsageError("there are no files; give their folder with --generate.files")
            yield FilesSource(settings.files, here, report=self.progress.message)
        else:
            with make_vllm_source(
                self.verifier_path,
                layers,
                reference=here,
                options=vllm_options(self.recipe, longest),
                report=self.progress.message,
            ) as source:
                yield source

    def _generating_verifier(self) -> Verifier:
        """The verifier in the dtype that it generates in."""
        dtype = self.recipe.generate.dtype
        if dtype in {None, self.recipe.verifier.dtype}:
            return self.verifier
        settings = self.recipe.verifier.model_copy(update={"dtype": dtype})
        return load_verifier(settings, self.verifier_path)

    def _held_back_prompts(self) -> list[Prompt]:
        """The beginnings of documents that training held back."""
        store = HiddenStateStore.open(self.folders.hidden_states, layer_ids=())
        _, documents = documents_of(store, self.recipe.training)
        settings = self.recipe.evaluate
        positions = getattr(self.verifier.config, "max_position_embeddings", None)
        context = (positions or sys.maxsize) - settings.max_new_tokens
        count = settings.limit or len(documents)
        found = validation_prompts(store, documents, count, max(1, context))
        if not found:
            raise UsageError(
                "training held no documents back to evaluate on; give --evaluate.prompts=FILE, or "
                "--training.validation.documents=N and train again"
            )
        self.progress.message(f"evaluating on {len(found)} documents that training held back")
        return [Prompt(torch.tensor(ids)) for ids in found]

    def _config(self) -> Any:
        """The configuration of a new draft."""
        return self.recipe.spec.new_config(
            self.verifier.model.config, self.verifier_path, **self.recipe.draft
        )

    def _new_draft(self, store: HiddenStateStore) -> SpeculatorModel:
        if self.recipe.init_from is not None:
            return SpeculatorModel.from_pretrained(
                self.recipe.init_from, verifier=self.verifier, dtype=torch.float32
            )
        config = self._config()
        size = config.to_dict().get("draft_vocab_size")
        vocabulary = None
        if size is not None and size < self.verifier.vocab_size:
            counts = token_counts(store, self.verifier.vocab_size)
            vocabulary = VocabularyMapping.from_counts(counts, size)
            self.progress.message(
                f"draft vocabulary: {size} of {self.verifier.vocab_size} tokens, "
                f"{vocabulary.coverage(counts):.2%} of what is to be learned"
            )
        return SpeculatorModel.from_config(config, self.verifier, vocabulary=vocabulary)


def vllm_options(recipe: Recipe, longest: int) -> VllmOptions:
    """For documents of at most ``longest`` tokens, and their answers."""
    settings, verifier = recipe.generate, recipe.verifier
    given = settings.vllm
    flags = ["--trust-remote-code"] if verifier.trust_remote_code else []
    if verifier.revision is not None:
        flags.append(f"--revision={verifier.revision}")
    return VllmOptions(
        endpoint=given.endpoint,
        python=given.python,
        flags=[*flags, *given.flags],
        eager=not settings.regenerate,
        max_model_len=longest + (settings.max_new_tokens if settings.regenerate else 0) + 1,
        max_requests=given.max_requests,
        storage=given.storage,
        start_timeout=given.start_timeout,
        patience=Patience(attempts=given.attempts),
        tolerance=Tolerance(given.cosine, given.max_difference),
    )


def publish(draft: SpeculatorModel, output: pathlib.Path) -> None:
    """Puts a draft's files into a folder that holds other things, too, config.json last.

    Each file takes its place in one rename; without config.json, readers see no draft at all.
    """
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".draft.", dir=output) as folder:
        whole = pathlib.Path(folder) / "draft"
        draft.save_pretrained(whole)
        (output / "config.json").unlink(missing_ok=True)
        for stale in output.glob("model*.safetensors*"):
            stale.unlink()
        for file in sorted(whole.iterdir(), key=lambda path: path.name == "config.json"):
            file.replace(output / file.name)
