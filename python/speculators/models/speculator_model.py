"""``SpeculatorModel``: what all draft models have in common.

A draft model is its few layers; the embedding and the head that some types borrow from the verifier
are no part of it. They are attached, not owned: a draft that is moved, cast or saved leaves the
verifier as it is. One forward serves training and drafting; what differs is the ``DraftAttention``
that comes with the batch.
"""

import abc
import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from speculators.atomic import atomic_directory
from speculators.configs.model_config import SpeculatorModelConfig
from speculators.models.algorithm import AlgorithmSpec, find_algorithm
from speculators.models.decoder import DecoderParts
from speculators.models.draft_attention import DraftAttention
from speculators.models.hub import local_directory, push
from speculators.models.model_card import model_card
from speculators.models.verifier.parts import VerifierParts
from speculators.models.verifier.verifier import Verifier
from speculators.models.vocabulary import VocabularyMapping
from speculators.models.weights import CheckpointError, TensorSpec, read_tensors, write_tensors

AnyVerifier = Verifier | VerifierParts | str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class DraftOutput:
    """One forward pass of a draft.

    Attributes:
        states: ``[B, R, H]``, what the next drafting step takes at the same rows.
        head_input: ``[B, R, H]``, what :meth:`SpeculatorModel.logits` takes.
    """

    states: Tensor
    head_input: Tensor


class SpeculatorModel(nn.Module, abc.ABC):
    """A draft model; :meth:`from_pretrained` gives the class that a directory asks for.

    Row t of a sequence takes token t + 1 and the verifier's state of token t, at position t; its
    logits are for token t + 2. Each further step takes the token just drafted and the row's own
    ``states``, at the next position.

    Args:
        config: its configuration.
    """

    def __init__(self, config: SpeculatorModelConfig) -> None:
        super().__init__()
        self.config = config
        self.parts = DecoderParts(config.transformer_layer_config)
        self.rotary_emb = self.parts.rotary_embedding()
        self._verifier: VerifierParts | None = None

    # ---- what a type defines

    @abc.abstractmethod
    def forward(
        self, input_ids: Tensor, states: Tensor, position_ids: Tensor, attention: DraftAttention
    ) -> DraftOutput:
        """One step of R rows for each of B sequences.

        Args:
            input_ids: int64 ``[B, R]``, the verifier's ids: of row t the token t + 1.
            states: ``[B, R, H]``, from :meth:`combine_hidden_states`, or the step before's.
            position_ids: int64 ``[B, R]``: t, one more in each drafting step.
            attention: of this batch; it remembers the passes before.
        """

    def combine_hidden_states(self, hidden_states: Tensor) -> Tensor:
        """From the verifier's states, as ``AlgorithmSpec.draft_input`` gives them, to the draft's.

        Args:
            hidden_states: ``[..., n H]``.

        Returns:
            ``[..., H]``.
        """
        return hidden_states

    def logits(self, head_input: Tensor) -> Tensor:
        """The draft's logits, by default from the verifier's head.

        Args:
            head_input: ``[..., H]``, of :class:`DraftOutput`.

        Returns:
            ``[..., W]``, over the draft's vocabulary.
        """
        head = self.verifier_parts.head
        return head.logits(head_input.to(head.dtype))

    def head_parameters(self) -> tuple[nn.Parameter, ...]:
        """The draft's own parameters that :meth:`logits` uses."""
        return ()

    @property
    def borrowable(self) -> tuple[str, ...]:
        """Tensors of the draft's own that it can take from a verifier if its file lacks them."""
        return ()

    def borrow(self, name: str) -> Tensor:
        """One of the :attr:`borrowable` tensors, from the attached verifier."""
        raise NotImplementedError(f"{type(self).__name__} cannot take {name} from a verifier")

    # ---- what all types share

    @property
    def spec(self) -> AlgorithmSpec:
        """The record of the draft's algorithm."""
        return find_algorithm(self.config.speculators_model_type)

    @property
    def hidden_size(self) -> int:
        """H, the width of the draft's states."""
        return int(self.parts.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """V, tokens that the verifier knows."""
        return int(self.parts.config.vocab_size)

    @property
    def draft_vocab_size(self) -> int:
        """W, tokens that the draft can propose."""
        return self.vocab_size

    @property
    def vocabulary(self) -> VocabularyMapping | None:
        """Which tokens the draft knows; None where it knows all."""
        return None

    def to_verifier_ids(self, draft_ids: Tensor) -> Tensor:
        """From ids of the draft's vocabulary, int64 of any shape, to the verifier's."""
        return draft_ids

    @property
    def verifier_parts(self) -> VerifierParts:
        """The verifier's embedding and head.

        Raises:
            RuntimeError: no verifier is attached.
        """
        if self._verifier is None:
            raise RuntimeError(
                f"{type(self).__name__} drafts with its verifier's embedding and head, and has no "
                "verifier; give one to from_pretrained(..., verifier=...) or attach_verifier(...)"
            )
        return self._verifier

    def attach_verifier(self, verifier: AnyVerifier) -> Self:
        """Gives the draft the verifier that it drafts for.

        Args:
            verifier: the verifier, its parts, or a directory or Hub id to read them from.

        Returns:
            The draft itself.

        Raises:
            ValueError: the verifier's sizes are not those that the draft was made for.
        """
        parts = VerifierParts.of(verifier)
        expected = (self.vocab_size, self.verifier_hidden_size)
        if tuple(parts.embedding.shape) != expected:
            raise ValueError(
                f"the verifier's embedding is {list(parts.embedding.shape)}, but "
                f"{type(self).__name__} was made for {list(expected)} (vocabulary, hidden size); "
                "give the verifier that the draft belongs to"
            )
        self._verifier = parts
        return self

    @property
    def verifier_hidden_size(self) -> int:
        """The width of the verifier's residual stream."""
        return self.hidden_size

    def embed(self, input_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The verifier's embedding, as its file has it: a scale that the verifier applies is not.

        Args:
            input_ids: int64 ``[...]``.
            dtype: of the result ``[..., H]``.
        """
        return functional.embedding(input_ids, self.verifier_parts.embedding).to(dtype)

    def initialize(self) -> None:
        """Fills all weights: normal with the layers' ``initializer_range``, biases 0, norms 1."""
        deviation = self.parts.config.initializer_range
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=deviation)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)

    # ---- making, reading and writing

    @classmethod
    def from_config(
        cls,
        config: SpeculatorModelConfig,
        verifier: AnyVerifier | None = None,
        *,
        vocabulary: VocabularyMapping | None = None,
    ) -> "SpeculatorModel":
        """A new draft in float32; what it can take from the verifier it takes, the rest is random.

        Args:
            config: any type's; it decides the class.
            verifier: the verifier, its parts, or where to read them.
            vocabulary: the draft vocabulary, where the type has one.

        Raises:
            ValueError: the verifier or the vocabulary does not fit the configuration.
        """
        model = _class_of(config, cls)(config)
        model.initialize()
        model.set_vocabulary(vocabulary)
        if verifier is not None:
            model.attach_verifier(verifier)
            model._borrow(model.borrowable)  # noqa: SLF001 - our own class
        return model

    def set_vocabulary(self, vocabulary: VocabularyMapping | None) -> None:
        """Takes a draft vocabulary.

        Raises:
            ValueError: the type has none, or one of another size.
        """
        if vocabulary is not None:
            raise ValueError(
                f"{type(self).__name__} proposes all tokens of its verifier; expected "
                "vocabulary=None"
            )

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        *,
        verifier: AnyVerifier | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> "SpeculatorModel":
        """Loads a draft; nothing that comes with it is executed.

        Args:
            path_or_id: a directory or a Hub id.
            verifier: the verifier, its parts, or where to read them. Without it a draft can be
                looked at and saved, and most types cannot draft.
            dtype: of the weights; by default as stored.
            device: where the draft shall lie; the CPU by default.
            revision: a branch, tag or commit on the Hub.
            token: for the Hub.
            cache_dir: of the Hub's files.
            local_files_only: never asks the Hub.

        Raises:
            OSError: there is no such directory or repository.
            ConfigError: its configuration is not valid, or of another type than this class's.
            CheckpointError: tensors are missing, unexpected or of the wrong shape; all are named.
        """
        directory = local_directory(
            path_or_id,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        config = SpeculatorModelConfig.from_pretrained(directory)
        with torch.device("meta"):
            model = _class_of(config, cls)(config)
        if verifier is not None:
            model.attach_verifier(verifier)
        model._load(directory, dtype)  # noqa: SLF001 - our own class
        return model.to(device).eval()

    def _load(self, directory: pathlib.Path, dtype: torch.dtype | None) -> None:
        expected = {
            name: TensorSpec(
                tuple(tensor.shape), "float" if tensor.is_floating_point() else tensor.dtype
            )
            for name, tensor in self.state_dict().items()
        }
        optional = self.borrowable if self._verifier is not None else ()
        tensors = read_tensors(directory, expected, optional=optional, dtype=dtype)
        self.load_state_dict(tensors, strict=False, assign=True)
        try:
            _ = self.vocabulary  # checks itself
        except ValueError as error:
            raise CheckpointError(f"{directory}: {error}") from None
        self._borrow(set(expected) - set(tensors))

    def _borrow(self, names: Iterable[str]) -> None:
        dtype = next(self.parameters()).dtype
        borrowed = {name: self.borrow(name).detach().to(dtype, copy=True) for name in names}
        self.load_state_dict(borrowed, strict=False, assign=True)

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        max_shard_size: str = "5GB",
    ) -> None:
        """Writes config.json, the weights and a model card, all or nothing.

        Args:
            directory: where to; made if need be.
            overwrite: whether a directory that is not empty may be exchanged, as a whole.
            max_shard_size: of one file of weights.

        Raises:
            FileExistsError: the directory is not empty.
        """
        self._record_dtype()
        with atomic_directory(directory, overwrite=overwrite) as new:
            self.config.save_pretrained(new)
            write_tensors(new, self.state_dict(), max_shard_size=max_shard_size)
            (new / "README.md").write_text(model_card(self.config), encoding="utf-8")

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Uploads what :meth:`save_pretrained` writes.

        Args:
            repo_id: ``"organisation/name"``; made if need be.
            **kwargs: ``private``, ``token``, ``revision``, ``commit_message``.

        Returns:
            The address of the commit.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push(folder, repo_id, **kwargs)

    def _record_dtype(self) -> None:
        """Writes the weights' dtype into the configuration, unless that says so already."""
        dtype = str(next(self.parameters()).dtype).removeprefix("torch.")
        schema = self.config.schema
        if dtype != (schema.dtype or (schema.model_extra or {}).get("torch_dtype")):
            self.config.dtype = dtype


def _class_of(config: SpeculatorModelConfig, cls: type[SpeculatorModel]) -> type[SpeculatorModel]:
    chosen = find_algorithm(config.speculators_model_type).model_class
    if not issubclass(chosen, cls):
        raise TypeError(
            f"the configuration is of type {config.speculators_model_type!r}, whose class is "
            f"{chosen.__name__}; expected {cls.__name__}, or call SpeculatorModel's method"
        )
    return chosen
