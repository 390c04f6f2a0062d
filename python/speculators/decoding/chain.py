"""``ChainDrafter``: a draft model that drafts one token after the other.

Row t of a draft takes token t + 1 and the verifier's states of token t, at position t. When the
verifier has spoken, the rows of its new tokens are committed with ITS states, in place of the
drafted rows, which had the draft's own; the last of them gives the first token of the next chain.
Each further token takes the token before it and the row's own state, one position on. So the draft
sees while drafting what it saw in training, and runs one pass for the new tokens and one for each
drafted token but the first.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from speculators.decoding.drafters import Proposal
from speculators.decoding.sampling import GREEDY, Sampling, draw
from speculators.models.draft_cache import DraftCache
from speculators.models.speculator_model import SpeculatorModel
from speculators.models.verifier.verifier import Verifier


class ChainDrafter:
    """Drafts with a model; a :class:`~speculators.decoding.drafters.Drafter`.

    Args:
        model: the draft, on the verifier's device; the verifier is attached to it.
        verifier: the verifier that it drafts for.
        sampling: the settings that its tokens are drawn with, and which make its q of its logits;
            greedy settings take the most likely token, and such a proposal has no q.

    Raises:
        ValueError: the draft was made for a verifier of other sizes or layers.
    """

    def __init__(
        self, model: SpeculatorModel, verifier: Verifier, sampling: Sampling = GREEDY
    ) -> None:
        model.attach_verifier(verifier)
        self.capture: tuple[int, ...] = model.spec.capture_layers(model.config, verifier.num_layers)
        self._model = model
        self._head = verifier.head
        self._sampling = sampling
        self._vocab_size = verifier.vocab_size
        # The verifier's id of each of the draft's tokens; made once, as it costs more than a step.
        draft_ids = torch.arange(model.draft_vocab_size, device=verifier.device)
        self._verifier_ids = None if model.vocabulary is None else model.to_verifier_ids(draft_ids)
        self._cache = DraftCache(0)
        # Of the last committed row: what the next step takes, and the first token's logits.
        self._states = self._logits = torch.empty(0)

    @torch.no_grad()
    def prefill(
        self,
        input_ids: Tensor,
        lengths: Sequence[int],
        next_tokens: Tensor,
        streams: Mapping[int, Tensor],
    ) -> None:
        """See :class:`~speculators.decoding.drafters.Drafter`."""
        self._cache = DraftCache(len(lengths))
        tokens = torch.cat([input_ids[:, 1:], next_tokens[:, None]], 1)
        width = tokens.shape[1]
        if min(lengths) < width:  # the draft's rows begin on the left
            begins = width - torch.tensor(lengths, device=tokens.device)[:, None]
            source = torch.arange(max(lengths), device=tokens.device) + begins
            source = source.clamp(max=width - 1)
            tokens = tokens.gather(1, source)
            row = torch.arange(len(lengths), device=tokens.device)[:, None]
            streams = {k: stream[row, source] for k, stream in streams.items()}
        self.update(tokens, lengths, streams)

    @torch.no_grad()
    def propose(self, count: int, uniforms: Tensor | None) -> Proposal:
        """See :class:`~speculators.decoding.drafters.Drafter`."""
        self._cache.drop_drafted()
        states, logits = self._states, self._logits
        positions = self._cache.committed
        tokens: list[Tensor] = []
        probabilities: list[Tensor] = []
        for step in range(count):
            token, q = self._choose(logits, None if uniforms is None else uniforms[:, step])
            tokens.append(token)
            if q is not None:
                probabilities.append(q)
            if step + 1 < count:
                self._cache.draft()
                output = self._model(token[:, None], states, positions + step, self._cache)
                states = output.states
                logits = self._model.logits(output.head_input[:, -1])
        q_BKV = torch.stack(probabilities, 1) if probabilities else None
        return Proposal(torch.stack(tokens, 1), q_BKV)

    @torch.no_grad()
    def update(self, tokens: Tensor, counts: Sequence[int], streams: Mapping[int, Tensor]) -> None:
        """See :class:`~speculators.decoding.drafters.Drafter`."""
        model, device = self._model, tokens.device
        self._cache.drop_drafted()
        hidden = model.spec.draft_input(streams, self._head, model.config)
        hidden = hidden.to(next(model.parameters()).dtype)
        first = self._cache.committed.to(device)
        positions = first + torch.arange(tokens.shape[1], device=device)
        self._cache.extend(counts)
        output = model(tokens, model.combine_hidden_states(hidden), positions, self._cache)
        row = torch.arange(len(counts), device=device)
        last = (self._cache.committed - first)[:, 0] - 1
        self._states = output.states[row, last][:, None]
        self._logits = model.logits(output.head_input[row, last])

    def select(self, rows: Sequence[int]) -> None:
        """See :class:`~speculators.decoding.drafters.Drafter`."""
        self._cache.select(rows)
        index = torch.tensor(rows, device=self._logits.device)
        self._states, self._logits = self._states[index], self._logits[index]

    def _choose(self, logits: Tensor, uniforms: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The next token ``[B]``, as the verifier numbers it, and its q ``[B, V]`` if drawn."""
        if uniforms is None or self._sampling.greedy:
            token, q = logits.argmax(-1), None
        else:
            q = self._sampling.distribution(logits)
            token = draw(q, uniforms)
        return self._verifier_tokens(token), None if q is None else self._wide(q)

    def _verifier_tokens(self, tokens: Tensor) -> Tensor:
        """The draft's token ids as the verifier numbers them."""
        return tokens if self._verifier_ids is None else self._verifier_ids[tokens]

    def _wide(self, q: Tensor) -> Tensor:
        """``[..., W]`` over the draft's vocabulary to ``[..., V]`` over the verifier's."""
        if self._verifier_ids is None:
            return q
        wide = q.new_zeros(*q.shape[:-1], self._vocab_size)
        return wide.index_copy(-1, self._verifier_ids, q)
