"""``SuffixDrafter``: continues as the same last tokens were continued before, by counts.

SuffixDecoding (Oliaro et al., 2024, arXiv:2411.04975): one index holds prompt and output of a
sequence, another what was written earlier. Each drafts from its own matches, and the draft that
promises more accepted tokens is taken. Where the n-gram drafter copies the latest match, this one
weighs all of them, and knows how sure it is.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from speculators.decoding.drafters import Proposal
from speculators.ops.host import SuffixDraft, SuffixIndex, TokenIds

MAX_MATCH = 32
"""The longest match that is looked for, in tokens; longer ones would tell no more."""


def suffix_corpus(
    texts: Iterable[TokenIds], capacity: int = 2**20, max_match: int = MAX_MATCH
) -> SuffixIndex:
    """An index of texts, such as earlier outputs; it keeps the last ``capacity`` tokens of them.

    Raises:
        ValueError: a token id or a number is out of its range.
    """
    index = SuffixIndex(capacity, max_match)
    for text in texts:
        index.extend(text)
        index.end_sequence()
    return index


class SuffixDrafter:
    """Drafts from matches; a :class:`~speculators.decoding.drafters.Drafter`.

    Args:
        corpus: earlier outputs, see :func:`suffix_corpus`; None: prompt and output alone.
        remember: whether sequences join the corpus when they have ended. What is drafted then
            depends on what was decoded before (the output does not).
        min_match: shorter matches count for nothing.
        factor: a match of m tokens drafts at most ``factor * m``.
        min_probability: of a drafted token, all before it included.
        doubt: how much a match is distrusted; see :meth:`~speculators.ops.host.SuffixIndex.propose`.
        capacity: tokens of a sequence that are kept, the newest ones.

    Raises:
        ValueError: a number is out of its range.
    """

    capture: tuple[int, ...] = ()

    def __init__(
        self,
        corpus: SuffixIndex | None = None,
        *,
        remember: bool = False,
        min_match: int = 1,
        factor: float = 2.0,
        min_probability: float = 0.1,
        doubt: float = 1.0,
        capacity: int = 2**17,
    ) -> None:
        self._corpus = SuffixIndex(max_match=MAX_MATCH) if remember and corpus is None else corpus
        self._remember = remember
        self._min_match = min_match
        self._factor = factor
        self._min_probability = min_probability
        self._doubt = doubt
        self._capacity = capacity
        self._rows: list[_Row] = []
        self._device = torch.device("cpu")
        self._draft(_Row(SuffixIndex(capacity, MAX_MATCH)), 1, tree=False)  # checks the numbers

    def prefill(
        self,
        input_ids: Tensor,
        lengths: Sequence[int],
        next_tokens: Tensor,
        streams: Mapping[int, Tensor],
    ) -> None:
        """See :class:`~speculators.decoding.drafters.Drafter`."""
        del streams
        self._keep(self._rows)
        self._device = next_tokens.device
        self._rows = []
        prompts, nexts = input_ids.tolist(), next_tokens.tolist()
        for prompt, length, token in zip(prompts, lengths, nexts, strict=True):
            row = _Row(SuffixIndex(self._capacity, MAX_MATCH))
            row.add(prompt[len(prompt) - length :])
            row.output = 0
            row.add([token])
            self._rows.append(row)

    def propose(self, count: int, uniforms: Tensor | None) -> Proposal:
        """See :class:`~speculators.decoding.drafters.Drafter`."""
        del uniforms
        return self.proposal(self.propose_chains(count))

    def update(self, tokens: Tensor, counts: Sequence[int], streams: Mapping[int, Tensor]) -> None:
        """See :class:`~speculators.decoding.drafters.Drafter`."""
        del streams
        for row, new, count in zip(self._rows, tokens.tolist(), counts, strict=True):
            row.add(new[:count])

    def select(self, rows: Sequence[int]) -> None:
        """See :class:`~speculators.decoding.drafters.Drafter`."""
        self._keep([self._rows[row] for row in set(range(len(self._rows))) - set(rows)])
        self._rows = [self._rows[row] for row in rows]
