"""What ``generate`` computes and in which order: documents as prepared, or with new responses.

Batches are cut from the first document on, whatever is done already, so that a run that goes on
draws the same responses from the same seeds as one that was never stopped.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from speculators.data.ordering import derived_seed, length_batches, processing_order
from speculators.data.regenerate import RegenerateSettings, prompt_length, with_response


class TokenizedDocuments(Protocol):
    """What ``prepare`` wrote, as ``generate`` reads it."""

    @property
    def content_hash(self) -> str:
        """What it was made from."""
        ...

    @property
    def lengths(self) -> Tensor:
        """int64 ``[len(self)]``, tokens of each document, at least 1."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> tuple[Tensor, Tensor]:
        """``input_ids`` int64 ``[L]`` and ``loss_mask`` bool ``[L]``."""
        ...


@runtime_checkable
class ResponseWriter(Protocol):
    """A source of hidden states that can also write responses."""

    def write_responses(
        self, prompts: Sequence[Tensor], settings: RegenerateSettings, seed: int
    ) -> list[Tensor]:
        """One response to each prompt, as ``regenerate.write_responses`` says."""
        ...


@dataclasses.dataclass(frozen=True)
class TokenizedDocument:
    """A document: its number in the prepared data, int64 ``[L]`` and bool ``[L]``."""

    number: int
    input_ids: Tensor
    loss_mask: Tensor


class Workload:
    """All documents of a store, in the order of computing.

    Attributes:
        order: the documents' numbers.
        sizes: their tokens in that order, with new responses at most.
        batches: ranges of places in that order; the documents of one are made together.

    Args:
        prepared: the documents.
        batch_tokens: tokens in a batch, padding included.
        writer: what writes new responses; None leaves the documents as they are.
        settings: of the new responses.

    Raises:
        ValueError: new responses are wanted, and a document begins with a learnable token.
    """

    def __init__(
        self,
        prepared: TokenizedDocuments,
        batch_tokens: int,
        writer: ResponseWriter | None = None,
        settings: RegenerateSettings | None = None,
    ) -> None:
        self._prepared = prepared
        self._regenerate = None if writer is None or settings is None else (writer, settings)
        sizes: list[int] = prepared.lengths.tolist()
        if self._regenerate is not None:
            new = self._regenerate[1].max_new_tokens
            sizes = [len(self._prompt(number)) + new for number in range(len(prepared))]
        self.order = processing_order(sizes)
        self.sizes = [sizes[number] for number in self.order]
        self.batches = list(length_batches(self.sizes, batch_tokens))

    @property
    def regenerates(self) -> bool:
        """Whether responses are written."""
        return self._regenerate is not None

    def make(self, batch: range) -> list[TokenizedDocument]:
        """The documents of a batch."""
        numbers = [self.order[place] for place in batch]
        if self._regenerate is None:
            return [TokenizedDocument(number, *self._prepared[number]) for number in numbers]
        writer, settings = self._regenerate
        prompts = [self._prompt(number) for number in numbers]
        seed = derived_seed(settings.seed, numbers[0])
        responses = writer.write_responses(prompts, settings, seed)
        return [
            TokenizedDocument(number, *with_response(prompt, response))
            for number, prompt, response in zip(numbers, prompts, responses, strict=True)
        ]

    def _prompt(self, number: int) -> Tensor:
        input_ids, loss_mask = self._prepared[number]
        length = prompt_length(loss_mask)
        if length == 0:
            raise ValueError(
                f"document {number} begins with a learnable token, so there is no prompt for a new "
                "response; prepare the data with the template's user turns, or do not regenerate"
            )
        return input_ids[:length]
