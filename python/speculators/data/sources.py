"""Where hidden states come from: a protocol, a registry of back ends, and transformers in process.

``generate`` knows only the protocol. A back end of another package (a server, another engine)
registers a factory under a name; nothing here imports it.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from speculators.data.artifact import hash_json
from speculators.data.ordering import length_batches
from speculators.data.regenerate import RegenerateSettings, write_responses
from speculators.models.verifier.architecture import UnsupportedVerifierError
from speculators.models.verifier.verifier import Verifier

_WEIGHTS_PER_TENSOR = 64
# What a configuration says about where and how it was saved; the dtype is that of the weights.
_NOT_THE_MODEL = {"_name_or_path", "architectures", "dtype", "transformers_version"}


class HiddenStateSource(Protocol):
    """A verifier that reads documents and gives its residual streams.

    Attributes:
        layer_ids: the residual streams it gives, sorted; k is what enters layer k, n what enters
            the final norm.
        hidden_size: H.
        verifier: the verifier's name, for people.
        identity: what decides about the states, for the content hash: values that JSON knows. The
            back end and the verifier's place do not belong here if the states are the same.
    """

    layer_ids: tuple[int, ...]
    hidden_size: int
    verifier: str
    identity: Mapping[str, Any]

    def hidden_states(
        self, documents: Sequence[Tensor], batch_tokens: int
    ) -> Iterable[dict[int, Tensor]]:
        """The residual streams of some documents, those of one shard, in their order.

        May work ahead of what is consumed, as a remote back end will with many requests at once.

        Args:
            documents: int64 ``[L]`` each; neighbours have similar lengths.
            batch_tokens: how many tokens, padding included, to compute at once.

        Returns:
            For each document ``layer_ids`` to ``[L, H]``, as if it were alone; any float dtype.
        """
        ...


class TransformersSource:
    """A verifier of transformers in this process; it can write responses, too.

    Args:
        verifier: the model.
        layer_ids: the residual streams wanted.
        packing: whether documents share a row without padding instead of being padded to the
            longest of the batch. By default with flash attention only, which skips what documents
            must not see; other kernels compute and discard it. Verifiers that do not separate
            packed documents are padded in any case.

    Raises:
        ValueError: a layer id is out of range or repeats.
    """

    def __init__(
        self, verifier: Verifier, layer_ids: Iterable[int], *, packing: bool | None = None
    ) -> None:
        self.model = verifier
        self.layer_ids = tuple(sorted(layer_ids))
        self.hidden_size = verifier.hidden_size
        self.verifier = str(getattr(verifier.model, "name_or_path", "") or "") or "(unnamed)"
        if packing is None:
            attention = str(getattr(verifier.config, "_attn_implementation", ""))
            packing = attention.startswith("flash_attention")
        self._packing = packing
        # A wrong layer id is an error here, before any work.
        self._streams(torch.zeros(1, 1, dtype=torch.int64), {})
        config = {k: v for k, v in verifier.config.to_dict().items() if k not in _NOT_THE_MODEL}
        self.identity: Mapping[str, Any] = {
            "config": hash_json(_plain(config)),
            "weights": hash_weights(verifier.model),
        }

    @classmethod
    def from_pretrained(
        cls,
        verifier: str | os.PathLike[str],
        layer_ids: Iterable[int],
        *,
        packing: bool | None = None,
        **options: Any,
    ) -> "TransformersSource":
        """Loads the verifier; ``options`` are those of ``Verifier.from_pretrained``."""
        return cls(Verifier.from_pretrained(verifier, **options), layer_ids, packing=packing)

    def hidden_states(
        self, documents: Sequence[Tensor], batch_tokens: int
    ) -> Iterator[dict[int, Tensor]]:
        """As the protocol says; on the CPU, in the verifier's dtype."""
        for batch in self._batches(documents, batch_tokens):
            if self._packing:
                try:
                    yield from self._packed(batch)
                    continue
                except UnsupportedVerifierError:
                    self._packing = False
            yield from self._padded(batch)

    def _batches(self, documents: Sequence[Tensor], batch_tokens: int) -> Iterator[list[Tensor]]:
        """Neighbours that the verifier may read together."""
        for places in length_batches([len(document) for document in documents], batch_tokens):
            yield from self.model.readable_together(documents[place] for place in places)

    def write_responses(
        self, prompts: Sequence[Tensor], settings: RegenerateSettings, seed: int
    ) -> list[Tensor]:
        """As ``regenerate.write_responses``, in one batch."""
        return write_responses(self.model, prompts, settings, seed)

    def _padded(self, documents: Sequence[Tensor]) -> list[dict[int, Tensor]]:
        width = max(len(document) for document in documents)
        rows = torch.zeros(len(documents), width, dtype=torch.int64)
        mask = torch.zeros(len(documents), width, dtype=torch.int64)
        for row, document in enumerate(documents):
            rows[row, width - len(document) :] = document
            mask[row, width - len(document) :] = 1
        streams = self._streams(rows, {"attention_mask": mask})
        return [
            {k: states[row, width - len(document) :] for k, states in streams.items()}
            for row, document in enumerate(documents)
        ]

    def _packed(self, documents: Sequence[Tensor]) -> list[dict[int, Tensor]]:
        lengths = [len(document) for document in documents]
        ends = torch.tensor([0, *lengths]).cumsum(0)
        streams = self._streams(torch.cat(list(documents))[None], {"cu_seqlens": ends})
        parts = {k: states[0].split(lengths) for k, states in streams.items()}
        return [{k: parts[k][place] for k in parts} for place in range(len(documents))]

    def _streams(self, rows: Tensor, batch: dict[str, Tensor]) -> dict[int, Tensor]:
        output = self.model.prefill(
            rows, **batch, capture=self.layer_ids, logits="none", use_cache=False
        )
        return {k: states.cpu() for k, states in output.captured.items()}


def hash_weights(model: torch.nn.Module) -> str:
    """SHA-256 of some weights of every parameter: it tells a fine-tuned model from its origin.

    All the weights of a large model would take minutes. Those whose values are not in memory (on
    the meta device, swapped out) count by name and shape only.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(repr((name, list(parameter.shape), str(parameter.dtype))).encode())
        if parameter.is_meta or parameter.numel() == 0:
            continue
        flat = parameter.detach().reshape(-1)
        step = max(1, flat.numel() // _WEIGHTS_PER_TENSOR)
        sample = flat[::step][:_WEIGHTS_PER_TENSOR].to("cpu", torch.float64)
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """A configuration's values as JSON knows them; infinite limits and dtypes are texts."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if key not in _NOT_THE_MODEL}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | str | None) else str(value)


Factory = Callable[..., HiddenStateSource]

_FACTORIES: dict[str, Factory] = {"transformers": TransformersSource.from_pretrained}


def register_source(name: str, factory: Factory) -> None:
    """Makes a back end known by name.

    Args:
        name: what users write.
        factory: called with a verifier's path or name on the Hub, the layer ids, and the back
            end's own options by keyword.

    Raises:
        ValueError: the name is taken by another factory.
    """
    if _FACTORIES.setdefault(name, factory) != factory:
        raise ValueError(f"a hidden-state source {name!r} is registered already; choose a new name")


def make_source(
    name: str, verifier: str | os.PathLike[str], layer_ids: Iterable[int], **options: Any
) -> HiddenStateSource:
    """Makes the source that was registered under a name.

    Args:
        name: such as ``"transformers"``.
        verifier: a path, or a model's name on the Hub.
        layer_ids: the residual streams wanted.
        **options: the back end's own.

    Raises:
        ValueError: no source has this name.
    """
    if name not in _FACTORIES:
        raise ValueError(
            f"unknown hidden-state source {name!r}; known are {', '.join(sorted(_FACTORIES))}"
        )
    return _FACTORIES[name](verifier, layer_ids, **options)
