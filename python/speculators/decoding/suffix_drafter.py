"""``SuffixDrafter``: continues as the same last tokens were continued before, by counts.

SuffixDecoding (Oliaro et al., 2024, arXiv:2411.04975): one index holds prompt and output of a
sequence, another what was written earlier. Each drafts from its own matches, and the draft that
promises more accepted tokens is taken. Where the n-gram drafter copies the latest match, this one
weighs all of them, and knows how sure it is.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from speculators.decoding.drafters import Proposal, TreeProposal
from speculators.models.verifier.tree import TokenTree
from speculators.ops.draft_tree import DraftTree
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
        doubt: how much a match is distrusted, see ``SuffixIndex.propose`` in ``ops.host``. With 2
            the estimates are about right on the tiny verifier's texts: what followed a match of m
            tokens that occurs once follows again in m of m + 2 cases.
        capacity: tokens of a sequence that are kept, the newest ones.
        tree_nodes: tokens of a tree, where matches go on in several ways; 0 drafts chains.

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
        factor: float = 8.0,
        min_probability: float = 0.02,
        doubt: float = 2.0,
        capacity: int = 2**17,
        tree_nodes: int = 0,
    ) -> None:
        if tree_nodes < 0:
            raise ValueError(f"tree_nodes is {tree_nodes}; expected 0 (chains) or at least 1")
        self.tree_nodes = self.tree_depth = tree_nodes  # a tree may be a chain
        self._corpus = SuffixIndex(max_match=MAX_MATCH) if remember and corpus is None else corpus
        self._remember = remember
        self._min_match = min_match
        self._factor = factor
        self._min_probability = min_probability
        self._doubt = doubt
        self._capacity = capacity
        self._rows: list[_Row] = []
        self._device = torch.device("cpu")
        self._draft(_Row(self._new_index(), []), 1, tree=False)  # the index checks the numbers

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
            row = _Row(self._new_index(), prompt[len(prompt) - length :])
            row.add([token])
            self._rows.append(row)

    def propose(self, count: int, uniforms: Tensor | None) -> Proposal:
        """See :class:`~speculators.decoding.drafters.Drafter`."""
        del uniforms
        return self.proposal(self.propose_chains(count))

    def propose_tree(self, roots: Tensor, uniforms: Tensor | None) -> TreeProposal:
        """See :class:`~speculators.decoding.drafters.TreeDrafting`."""
        del uniforms
        drafts = self.propose_trees(self.tree_nodes)
        width = 1 + max(len(draft.tokens) for draft in drafts)
        tokens = roots[:, None].cpu().repeat(1, width)
        parents = torch.full_like(tokens, -1)
        depths = torch.zeros_like(tokens)
        sees = torch.eye(width, dtype=torch.bool).repeat(len(drafts), 1, 1)
        for row, draft in enumerate(drafts):
            for node, parent in enumerate((draft.parents + 1).tolist(), 1):
                parents[row, node] = parent
                depths[row, node] = depths[row, parent] + 1
                sees[row, node] |= sees[row, parent]
            tokens[row, 1 : 1 + len(draft.tokens)] = torch.from_numpy(draft.tokens)
        device = self._device
        return TreeProposal(
            DraftTree(tokens.to(device), parents.to(device)),
            TokenTree(depths.to(device), sees.to(device)),
        )

    def update(self, tokens: Tensor, counts: Sequence[int], streams: Mapping[int, Tensor]) -> None:
        """See :class:`~speculators.decoding.drafters.Drafter`."""
        del streams
        for row, new, count in zip(self._rows, tokens.tolist(), counts, strict=True):
            row.add(new[:count])

    def select(self, rows: Sequence[int]) -> None:
        """See :class:`~speculators.decoding.drafters.Drafter`."""
        self._keep([self._rows[row] for row in set(range(len(self._rows))) - set(rows)])
        self._rows = [self._rows[row] for row in rows]

    def finish(self, row: int, tokens: Sequence[int]) -> None:
        """See :class:`~speculators.decoding.drafters.Finishing`."""
        self._rows[row].written += tokens

    def propose_chains(self, count: int) -> list[SuffixDraft]:
        """Of every row the better chain of at most ``count`` tokens; it may have none."""
        return [self._draft(row, count, tree=False) for row in self._rows]

    def propose_trees(self, count: int) -> list[SuffixDraft]:
        """Of every row the better tree of at most ``count`` tokens, parents before children."""
        return [self._draft(row, count, tree=True) for row in self._rows]

    def proposal(self, chains: Sequence[SuffixDraft]) -> Proposal:
        """Chains as a proposal; their tokens are chosen, not drawn."""
        counts = [len(chain.tokens) for chain in chains]
        tokens = torch.zeros(len(chains), max(counts), dtype=torch.int64)
        for row, chain in enumerate(chains):
            tokens[row, : counts[row]] = torch.from_numpy(chain.tokens)
        return Proposal(tokens.to(self._device), counts=counts)

    def _new_index(self) -> SuffixIndex:
        return SuffixIndex(self._capacity, MAX_MATCH)

    def _draft(self, row: "_Row", count: int, *, tree: bool) -> SuffixDraft:
        options: dict[str, Any] = {
            "factor": self._factor,
            "min_match": self._min_match,
            "min_probability": self._min_probability,
            "doubt": self._doubt,
            "tree": tree,
        }
        draft = row.index.propose(count, **options)
        if self._corpus is not None and draft.score < count:
            other = self._corpus.propose(count, context=row.recent, **options)
            draft = max(draft, other, key=lambda found: found.score)  # the first on ties
        return draft

    def _keep(self, ended: Iterable["_Row"]) -> None:
        if self._remember and self._corpus is not None:
            for row in ended:
                self._corpus.extend(row.written)
                self._corpus.end_sequence()


class _Row:
    """One sequence: the index of it, its last tokens, and those that are no prompt."""

    def __init__(self, index: SuffixIndex, prompt: Sequence[int]) -> None:
        self.index = index
        self.recent = list(prompt[-MAX_MATCH:])
        self.written: list[int] = []
        index.extend(prompt)

    def add(self, tokens: Sequence[int]) -> None:
        self.index.extend(tokens)
        self.recent = [*self.recent, *tokens][-MAX_MATCH:]
        self.written += tokens
