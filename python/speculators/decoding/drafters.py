"""What drafts tokens: the protocol that the decoding loop speaks, and the n-gram drafter.

A drafter follows a batch of sequences. It is told what became of its tokens and shown the
verifier's residual streams, so that it can keep a cache of its own and never reads a prefix twice.
The n-gram drafter (prompt lookup; A. Saxena, 2023) needs neither model nor training. It is the
baseline that costs nothing: a trained draft has to beat it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from speculators.models.verifier.tree import TokenTree
from speculators.ops.draft_tree import DraftTree
from speculators.ops.tree_verification import SamplingMode


@dataclasses.dataclass(frozen=True)
class Proposal:
    """A chain of drafted tokens for each of B sequences.

    Attributes:
        tokens: int64 ``[B, K]``, the verifier's ids, on the verifier's device. K may be less than
            asked for, and 0.
        probabilities: float32 ``[B, K, V]``, the distribution over the verifier's vocabulary that
            each token was DRAWN from; None for tokens that were not drawn but chosen, whatever
            scores they were chosen by.
        counts: how many tokens of each row are real, the first ones; None: all.
    """

    tokens: Tensor
    probabilities: Tensor | None = None
    counts: Sequence[int] | None = None

    @property
    def mode(self) -> SamplingMode:
        """How its tokens came about, which decides how they are verified when sampling."""
        drawn = self.probabilities is not None
        return SamplingMode.WITH_REPLACEMENT if drawn else SamplingMode.POINT_MASS


class Drafter(Protocol):
    """Drafts for one batch at a time; ``prefill`` begins a new one.

    Attributes:
        capture: the residual streams of the verifier that it wants to be shown.
    """

    capture: tuple[int, ...]

    def prefill(
        self,
        input_ids: Tensor,
        lengths: Sequence[int],
        next_tokens: Tensor,
        streams: Mapping[int, Tensor],
    ) -> None:
        """Begins a batch.

        Args:
            input_ids: int64 ``[B, T]``, the prompts, padded on the left.
            lengths: the tokens of each prompt; they come last in its row.
            next_tokens: int64 ``[B]``, the verifier's token after each prompt.
            streams: stream id to ``[B, T, H]``, aligned with ``input_ids``.
        """

    def propose(self, count: int, uniforms: Tensor | None) -> Proposal:
        """Drafts the tokens after those known so far.

        Args:
            count: how many, at least 1; a row may get fewer.
            uniforms: float64 ``[B, count]`` in [0, 1), the random numbers for a drafter that draws
                its tokens; None where the verifier is greedy.
        """

    def update(self, tokens: Tensor, counts: Sequence[int], streams: Mapping[int, Tensor]) -> None:
        """Tells what the verifier made of the tokens proposed last; those not in it are void.

        Args:
            tokens: int64 ``[B, R]``, new tokens: those accepted, and the verifier's own.
            counts: how many of each row are real, the first ones, at least 1.
            streams: stream id to ``[B, R, H]``; row i is of the token BEFORE token i.
        """

    def select(self, rows: Sequence[int]) -> None:
        """Keeps these rows of the batch only, in this order; the others have ended."""


class Finishing(Drafter, Protocol):
    """A drafter that wants to know how texts end."""

    def finish(self, row: int, tokens: Sequence[int]) -> None:
        """Tells the last tokens of a row that has ended, which no ``update`` tells.

        Args:
            row: its place in the batch; ``select`` drops it next, if rows go on.
            tokens: what was emitted of the last verification.
        """


@dataclasses.dataclass(frozen=True)
class TreeProposal:
    """A drafted tree for each of B sequences.

    Attributes:
        tree: N nodes each, the root included; ids are the verifier's.
        layout: what the verifier needs to read it; None: it is a chain.
        mode: how siblings came about, which decides how they are verified when sampling.
        probabilities: float32 ``[B, R, V]``: row i is what node i's children were drawn from; None
            where they were not drawn.
    """

    tree: DraftTree
    layout: TokenTree | None = None
    mode: SamplingMode = SamplingMode.POINT_MASS
    probabilities: Tensor | None = None


class TreeDrafting(Drafter, Protocol):
    """A drafter of trees. ``propose`` serves where there is no room for one.

    Attributes:
        tree_nodes: drafted nodes of a tree, at most.
        tree_depth: of the deepest node, at most.
    """

    tree_nodes: int
    tree_depth: int

    def propose_tree(self, roots: Tensor, uniforms: Tensor | None) -> TreeProposal:
        """Drafts the trees after the tokens known so far.

        Args:
            roots: int64 ``[B]``, the last token of each sequence.
            uniforms: float64 ``[B, tree_nodes]`` in [0, 1), for children that are drawn; None
                where the verifier is greedy.
        """


class NgramDrafter:
    """Continues with what followed the same last tokens before, in prompt or output.

    The longest match counts, and of several the latest. What it copies may run into its own copy,
    so that a repetition goes on for as long as is asked.

    Args:
        max_match: the longest match that is looked for, in tokens.
        min_match: the shortest that counts, at least 1.

    Raises:
        ValueError: not 1 <= min_match <= max_match.
    """

    capture: tuple[int, ...] = ()

    def __init__(self, max_match: int = 4, min_match: int = 2) -> None:
        if not 1 <= min_match <= max_match:
            raise ValueError(
                f"min_match is {min_match} and max_match {max_match}; expected "
                "1 <= min_match <= max_match"
            )
        self._sizes = range(max_match, min_match - 1, -1)
        self._histories: list[_History] = []
        self._device = torch.device("cpu")

    def prefill(
        self,
        input_ids: Tensor,
        lengths: Sequence[int],
        next_tokens: Tensor,
        streams: Mapping[int, Tensor],
    ) -> None:
        """See :class:`Drafter`."""
        del streams
        self._device = next_tokens.device
        self._histories = []
        prompts, nexts = input_ids.tolist(), next_tokens.tolist()
        for prompt, length, token in zip(prompts, lengths, nexts, strict=True):
            history = _History(self._sizes)
            history.extend([*prompt[len(prompt) - length :], token])
            self._histories.append(history)

    def propose(self, count: int, uniforms: Tensor | None) -> Proposal:
        """See :class:`Drafter`."""
        del uniforms
        drafts = [history.continuation(count) for history in self._histories]
        counts = [len(draft) for draft in drafts]
        width = max(counts)
        padded = [draft + [0] * (width - len(draft)) for draft in drafts]
        tokens = torch.tensor(padded, dtype=torch.int64, device=self._device)
        return Proposal(tokens.reshape(len(drafts), width), counts=counts)

    def update(self, tokens: Tensor, counts: Sequence[int], streams: Mapping[int, Tensor]) -> None:
        """See :class:`Drafter`."""
        del streams
        for history, row, count in zip(self._histories, tokens.tolist(), counts, strict=True):
            history.extend(row[:count])

    def select(self, rows: Sequence[int]) -> None:
        """See :class:`Drafter`."""
        self._histories = [self._histories[row] for row in rows]


class _History:
    """One sequence's tokens, and where each n-gram in it was followed by a token last."""

    def __init__(self, sizes: range) -> None:
        self._sizes = sizes
        self._tokens: list[int] = []
        self._places: dict[tuple[int, ...], int] = {}

    def extend(self, new: Sequence[int]) -> None:
        tokens = self._tokens
        for token in new:
            # Only now does the n-gram that ended here have a token after it.
            for size in self._sizes:
                if size <= len(tokens):
                    self._places[tuple(tokens[-size:])] = len(tokens)
            tokens.append(token)

    def continuation(self, count: int) -> list[int]:
        tokens = self._tokens
        for size in self._sizes:
            place = self._places.get(tuple(tokens[-size:])) if size <= len(tokens) else None
            if place is not None:
                period = len(tokens) - place
                return [tokens[place + i % period] for i in range(count)]
        return []
