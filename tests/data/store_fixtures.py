"""Documents and a verifier without a model, so that every state in a store is known beforehand."""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from speculators.data.generate import generate
from speculators.data.store import HiddenStateStore

HIDDEN = 6
LAYERS = (0, 3, 4)
VOCABULARY = 50


@dataclasses.dataclass
class Documents:
    """What ``prepare`` would have written."""

    rows: list[tuple[Tensor, Tensor]]
    content_hash: str = "prepared"

    @property
    def lengths(self) -> Tensor:
        """Tokens of each document."""
        return torch.tensor([len(row[0]) for row in self.rows])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        return self.rows[number]


def random_documents(lengths: Sequence[int], seed: int = 0) -> Documents:
    """Documents of these lengths; the first token is a prompt, some others are learnable."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        mask = torch.rand(length, generator=generator) < 0.5
        mask[:1] = False
        rows.append((torch.randint(0, VOCABULARY, (length,), generator=generator), mask))
    return Documents(rows)


class KnownSource:
    """Gives ``states_of``; raises what it is told to at the n-th document it is asked for."""

    def __init__(
        self,
        *,
        fail_at: int | None = None,
        error: BaseException | None = None,
        name: str = "known",
        layer_ids: tuple[int, ...] = LAYERS,
    ) -> None:
        self.layer_ids = layer_ids
        self.hidden_size = HIDDEN
        self.verifier = name
        self.identity: Mapping[str, Any] = {"name": name}
        self.seen: list[Tensor] = []
        self._fail_at = fail_at
        self._error = error or RuntimeError("the verifier failed")

    def hidden_states(
        self, documents: Sequence[Tensor], batch_tokens: int
    ) -> Iterator[dict[int, Tensor]]:
        """The states, one document after the other."""
        del batch_tokens
        for document in documents:
            if len(self.seen) == self._fail_at:
                raise self._error
            self.seen.append(document)
            states = states_of(document)
            yield {k: states[k] for k in self.layer_ids}


def states_of(input_ids: Tensor) -> dict[int, Tensor]:
    """float32 ``[L, HIDDEN]`` for each layer, other for every token, position, layer and column."""
    tokens = (input_ids[:, None] + 1) * torch.linspace(0.5, 1.5, HIDDEN)
    positions = torch.arange(len(input_ids))[:, None]
    return {k: torch.sin(tokens * (k + 1) + positions) for k in LAYERS}


def make_store(directory: pathlib.Path, lengths: Sequence[int], **options: Any) -> HiddenStateStore:
    """A store of random documents of these lengths."""
    generate(random_documents(lengths), directory, KnownSource(), **options)
    return HiddenStateStore.open(directory)
