"""A drafter that knows the continuation and proposes it, or something else on purpose.

It also keeps what the loop tells it, so that a test can see whether that was true.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from speculators.decoding.drafters import Proposal


class ScriptedDrafter:
    """Proposes each sequence's continuation, token by token through ``change``.

    Args:
        prompts: of the batch.
        continuations: what the verifier will say, as far as is known; behind it comes token 0.
        change: called with the sequence, the place in its continuation, and the token there;
            returns the token to propose.
        capture: residual streams to be shown.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        continuations: Sequence[Sequence[int]],
        change: Callable[[int, int, int], int] = lambda _row, _place, token: token,
        capture: tuple[int, ...] = (),
    ) -> None:
        self.capture = capture
        self.told = [list(prompt) for prompt in prompts]  # prompts, then what the loop says
        self.shown: list[list[Mapping[int, Tensor]]] = [[] for _ in prompts]
        self._begins = [len(prompt) for prompt in prompts]
        self._continuations = continuations
        self._change = change
        self._rows: list[int] = []

    def prefill(
        self,
        input_ids: Tensor,
        lengths: Sequence[int],
        next_tokens: Tensor,
        streams: Mapping[int, Tensor],
    ) -> None:
        """Finds its sequences by their prompts: those that ended at once are not there."""
        prompts = [row[len(row) - n :] for row, n in zip(input_ids.tolist(), lengths, strict=True)]
        self._rows = [self.told.index(prompt) for prompt in prompts]
        for place, row in enumerate(self._rows):
            self.told[row].append(int(next_tokens[place]))
            begin = input_ids.shape[1] - lengths[place]
            self.shown[row].append({k: stream[place, begin:] for k, stream in streams.items()})

    def propose(self, count: int, uniforms: Tensor | None) -> Proposal:
        """The next tokens of the script."""
        del uniforms
        return Proposal(torch.tensor([self._next(row, count) for row in self._rows]))

    def _next(self, row: int, count: int) -> list[int]:
        place = len(self.told[row]) - self._begins[row]
        known = [*self._continuations[row][place : place + count], *[0] * count][:count]
        return [self._change(row, place + i, token) for i, token in enumerate(known)]

    def update(self, tokens: Tensor, counts: Sequence[int], streams: Mapping[int, Tensor]) -> None:
        """Keeps what it is told."""
        for place, row in enumerate(self._rows):
            self.told[row] += tokens[place, : counts[place]].tolist()
            self.shown[row].append(
                {k: stream[place, : counts[place]] for k, stream in streams.items()}
            )

    def select(self, rows: Sequence[int]) -> None:
        """Keeps some sequences."""
        self._rows = [self._rows[row] for row in rows]
