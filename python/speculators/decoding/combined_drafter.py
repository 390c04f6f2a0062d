"""``CombinedDrafter``: a draft model and matches; for each row the one that expects more wins.

Both follow the whole text. The model's cache takes the verifier's states of the new tokens, whoever
drafted them, so that it is what it would be had the model drafted all along.

What matches expect is their score. What the model expects is how many of its tokens were accepted
on average in the same row until now. Its own probabilities would be another measure, but they say
how likely a token is where the verifier samples; where it is greedy, far more is accepted than they
promise (on the tiny verifier ten times as much), and matches would win where they should not.

The choice must not spoil the output. It is made before the model drafts, from the text so far
alone: to look at tokens that were drawn from q, and drop them if they seem bad, would change their
distribution, and q would no longer be what they were drawn from. Rows of matches have all mass on
their tokens, which in a proposal with q is a q of ones and zeros.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from speculators.decoding.drafters import Drafter, Proposal
from speculators.decoding.suffix_drafter import SuffixDrafter
from speculators.ops.host import SuffixDraft


class CombinedDrafter:
    """Drafts with a model or from matches; a :class:`~speculators.decoding.drafters.Drafter`.

    Where matches win in all rows, the model does not run.

    Args:
        model: the model's drafter, which drafts as many tokens as it is asked for.
        suffix: the matches'.
    """

    def __init__(self, model: Drafter, suffix: SuffixDrafter) -> None:
        self.capture = model.capture
        self._model = model
        self._suffix = suffix
        # Of each row: whether its last draft was the model's; how many such there were, and how
        # many tokens of them were accepted.
        self._was_model: list[bool] = []
        self._drafts: list[int] = []
        self._accepted: list[int] = []

    def prefill(
        self,
        input_ids: Tensor,
        lengths: Sequence[int],
        next_tokens: Tensor,
        streams: Mapping[int, Tensor],
    ) -> None:
        """See :class:`~speculators.decoding.drafters.Drafter`."""
        self._model.prefill(input_ids, lengths, next_tokens, streams)
        self._suffix.prefill(input_ids, lengths, next_tokens, streams)
        self._was_model = [False] * len(lengths)
        self._drafts = [0] * len(lengths)
        self._accepted = [0] * len(lengths)

    def propose(self, count: int, uniforms: Tensor | None) -> Proposal:
        """See :class:`~speculators.decoding.drafters.Drafter`."""
        chains = self._suffix.propose_chains(count)
        expected = self._expected(count)
        wins = [chain.score > least for chain, least in zip(chains, expected, strict=True)]
        self._was_model = [not won for won in wins]
        if all(wins):
            return self._suffix.proposal(chains)
        return _exchange(self._model.propose(count, uniforms), chains, wins)

    def _expected(self, count: int) -> list[float]:
        """Of every row the mean of the model's accepted tokens, after one draft that had them all.

        So the model drafts first. Nothing that is drawn for this step may come in here.
        """
        return [
            (count + accepted) / (1 + drafts)
            for accepted, drafts in zip(self._accepted, self._drafts, strict=True)
        ]

    def update(self, tokens: Tensor, counts: Sequence[int], streams: Mapping[int, Tensor]) -> None:
        """See :class:`~speculators.decoding.drafters.Drafter`."""
        self._model.update(tokens, counts, streams)
        self._suffix.update(tokens, counts, streams)
        for row, count in enumerate(counts):
            if self._was_model[row]:
                self._drafts[row] += 1
                self._accepted[row] += count - 1

    def select(self, rows: Sequence[int]) -> None:
        """See :class:`~speculators.decoding.drafters.Drafter`."""
        self._model.select(rows)
        self._suffix.select(rows)
        self._was_model = [self._was_model[row] for row in rows]
        self._drafts = [self._drafts[row] for row in rows]
        self._accepted = [self._accepted[row] for row in rows]

    def finish(self, row: int, tokens: Sequence[int]) -> None:
        """See :class:`~speculators.decoding.drafters.Finishing`."""
        self._suffix.finish(row, tokens)


def _exchange(proposal: Proposal, chains: Sequence[SuffixDraft], wins: Sequence[bool]) -> Proposal:
    """The model's proposal with the chains in the rows where they win."""
    width = proposal.tokens.shape[1]
    if not any(wins):
        return proposal
    tokens, q_BKV = proposal.tokens.clone(), proposal.probabilities
    q_BKV = None if q_BKV is None else q_BKV.clone()
    counts = [width] * len(wins)
    for row, chain in enumerate(chains):
        if wins[row]:
            counts[row] = length = len(chain.tokens)
            chosen = torch.from_numpy(chain.tokens).to(tokens)
            tokens[row, :length] = chosen
            if q_BKV is not None:
                q_BKV[row, :length] = 0.0
                q_BKV[row, torch.arange(length, device=tokens.device), chosen] = 1.0
    return Proposal(tokens, q_BKV, counts)
