"""The lossless loop: draft, verify, keep what is accepted, and so on until every sequence ends.

Both models keep a cache, so no token is read twice. The verifier reads the last token and the
drafted ones in one pass, and forgets those that it rejects; the drafter is shown its states of the
rest. Without a drafter the same loop decodes plainly, so that the two can be compared. Sequences
that have ended leave the batch. Once per pass the tokens come to the host, where it is decided
which sequences end.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from speculators.decoding.acceptance import AcceptanceCounts
from speculators.decoding.draft_models import Draft, drafter_for, num_draft_tokens
from speculators.decoding.drafters import Finishing, Proposal, TreeDrafting, TreeProposal
from speculators.decoding.sampling import RandomNumbers
from speculators.decoding.settings import GenerationSettings, Prompts, check_prompts, pad_prompts
from speculators.decoding.stopping import FinishReason, Stopping
from speculators.models.verifier.cache import VerifierState
from speculators.models.verifier.verifier import Verifier
from speculators.ops import tree_verification
from speculators.ops.draft_tree import chain_tree
from speculators.ops.tree_verification import TreeVerdict

Generator = torch.Generator | Sequence[torch.Generator] | None


@dataclasses.dataclass
class GenerationOutput:
    """What a batch of prompts was continued with; lists have one entry for each prompt.

    Attributes:
        sequences: the new tokens, the one that ended the text included.
        finish_reasons: ``"eos"``, ``"stop"`` or ``"length"``; None while a stream still runs.
        traces: how many drafted tokens were accepted in each verification. Each emitted one more,
            but for what the end of the text cut off: see :mod:`speculators.decoding.acceptance`.
        acceptance: the counts of all sequences together.
    """

    sequences: list[list[int]]
    finish_reasons: list[FinishReason | None]
    traces: list[list[int]]
    acceptance: AcceptanceCounts


def generate(
    verifier: Verifier,
    draft: Draft,
    prompts: Prompts,
    settings: GenerationSettings | None = None,
    *,
    attention_mask: Tensor | None = None,
    generator: Generator = None,
    stream: Callable[[list[list[int]]], None] | None = None,
) -> GenerationOutput:
    """Continues prompts with what the verifier alone would say, in fewer passes of it.

    Greedy decoding gives the verifier's own greedy tokens, sampling its own distribution, whatever
    the draft is. (Logits of many rows are rounded otherwise than those of one; where two tokens are
    closer than that, greedy decoding may take the other.)

    Args:
        verifier: the model whose text it is.
        draft: a draft model, another drafter, or None for plain decoding.
        prompts: token ids, one list for each, or int64 ``[B, T]``.
        settings: lengths, sampling and where to stop; by default greedy decoding of 256 tokens.
        attention_mask: for a tensor of prompts that is padded: 0 for padding, on the left.
        generator: of random numbers, for the batch or for each sequence; None: torch's own.
        stream: called after each pass with the new tokens of every sequence, maybe none.

    Raises:
        ValueError: prompts or settings do not fit the verifier, or the draft does not.
    """
    generation = _Generation(verifier, draft, prompts, attention_mask, settings, generator)
    for new in generation.steps():
        if stream is not None:
            stream(new)
    return generation.output


def generate_stream(
    verifier: Verifier,
    draft: Draft,
    prompts: Prompts,
    settings: GenerationSettings | None = None,
    *,
    attention_mask: Tensor | None = None,
    generator: Generator = None,
) -> Iterator[list[list[int]]]:
    """As :func:`generate`, but yields the new tokens of every sequence after each pass."""
    return _Generation(verifier, draft, prompts, attention_mask, settings, generator).steps()


class _Generation:
    """One batch while it is generated; rows are the sequences that go on."""

    def __init__(
        self,
        verifier: Verifier,
        draft: Draft,
        prompts: Prompts,
        attention_mask: Tensor | None,
        settings: GenerationSettings | None,
        generator: Generator,
    ) -> None:
        self._settings = settings = settings or GenerationSettings()
        self._verifier = verifier
        self._drafter = drafter_for(draft, verifier, settings)
        self._count = num_draft_tokens(draft, settings)
        # Of the trees that are drafted, 0 for chains.
        self._nodes: int = getattr(self._drafter, "tree_nodes", 0)
        self._depth: int = getattr(self._drafter, "tree_depth", 0)
        self._capture = self._drafter.capture if self._drafter else ()
        self._prompts, self._mask = pad_prompts(prompts, attention_mask)
        lengths = check_prompts(self._prompts, self._mask, verifier.vocab_size)
        batch = len(lengths)
        self._max_length = _least(
            settings.max_length or getattr(verifier.config, "max_position_embeddings", None),
            verifier.growth_limit(lengths),
        )
        self._random = RandomNumbers(generator, batch, verifier.device)
        ids = settings.eos_token_ids
        self._stopping = Stopping(
            frozenset(verifier.eos_token_ids if ids is None else ids),
            settings.stop_strings,
            verifier.tokenizer if settings.stop_strings else None,
        )
        self.output = GenerationOutput(
            [[] for _ in range(batch)],
            [None] * batch,
            [[] for _ in range(batch)],
            AcceptanceCounts(),
        )
        self._state: VerifierState
        # Of the rows: the number of the sequence, and its tokens in the verifier's cache.
        self._rows = list(range(batch))
        self._cached: list[int] = []
        self._limits = [self._limit(length) for length in lengths]  # new tokens of every sequence
        self._last = torch.empty(0)  # int64 [rows, 1], tokens that the verifier has not read

    def steps(self) -> Iterator[list[list[int]]]:
        """Runs it, and yields the new tokens of every sequence after each pass."""
        yield self._prefill()
        while self._rows:
            yield self._step()

    @torch.inference_mode()
    def _prefill(self) -> list[list[int]]:
        output = self._verifier.prefill(self._prompts, self._mask, capture=self._capture)
        assert output.state is not None  # noqa: S101 - for the type checker
        assert output.logits is not None  # noqa: S101
        self._state = output.state
        self._cached = self._state.host_lengths
        greedy = self._settings.sampling.greedy
        uniforms = None if greedy else self._random.uniforms(1, self._rows)
        # A tree of the prompt's last token alone.
        root = TreeProposal(chain_tree(self._prompts[:, -1:].to(output.logits.device)))
        tokens = self._verify(output.logits[:, -1:], root, uniforms).next_tokens
        new = [[token] for token in tokens.tolist()]
        emitted, kept = self._emit(new)
        if kept:
            index = self._keep(kept)
            self._last = _rows_of(tokens[:, None], index)
            if self._drafter is not None:
                self._drafter.prefill(
                    _rows_of(self._prompts.to(tokens.device), index),
                    self._cached,
                    self._last[:, 0],
                    {k: _rows_of(stream, index) for k, stream in output.captured.items()},
                )
        return emitted

    @torch.inference_mode()
    def _step(self) -> list[list[int]]:
        greedy = self._settings.sampling.greedy
        # As many in every step, and those to verify by always at the same place: a sequence's
        # numbers must not depend on what others do.
        most = max(self._count, self._nodes)
        uniforms = None if greedy else self._random.uniforms(2 * most + 1, self._rows)
        proposal = self._propose(uniforms)
        tree, layout = proposal.tree, proposal.layout
        nodes = tree.tokens.shape[1]
        output = self._verifier.step(tree.tokens, self._state, tree=layout, capture=self._capture)
        assert output.logits is not None  # noqa: S101 - for the type checker
        later = None if uniforms is None else uniforms[:, most : most + nodes]
        verdict = self._verify(output.logits, proposal, later)
        tokens, drafted = verdict.emitted(tree), tree.parents >= 0
        depths = drafted.sum(1) if layout is None else (layout.depths * drafted).amax(1)
        rows = torch.cat([depths[:, None], verdict.accepted[:, None], tokens], 1).tolist()
        new = [row[2 : row[1] + 3] for row in rows]
        self._record(new, [row[0] for row in rows])
        emitted, kept = self._advance(new)
        if kept:
            counts = [len(new[row]) for row in kept]
            index = self._keep(kept)
            self._cached = [n + count for n, count in zip(self._cached, counts, strict=True)]
            self._last = _rows_of(verdict.next_tokens[:, None], index)
            streams = output.captured
            if layout is not None:
                # What stays in the cache: the root, and the accepted nodes.
                path = torch.nn.functional.pad(verdict.path, (1, 0))[:, : max(counts)].clamp(min=0)
                self._verifier.keep_path(self._state, nodes, _rows_of(path, index), counts)
                streams = {
                    k: stream.gather(1, path[..., None].expand(-1, -1, stream.shape[2]))
                    for k, stream in streams.items()
                }
            elif min(counts) < nodes:
                self._verifier.crop(self._state, self._cached)
            self._update_drafter(tokens.clamp(min=0), counts, streams, index)
        return emitted

    def _room(self) -> int:
        """How many tokens may be drafted with positions for them and for the one after them."""
        if self._max_length is None:
            return sys.maxsize
        return self._max_length - 2 - max(self._cached)

    def _propose(self, uniforms: Tensor | None) -> TreeProposal:
        """A draft that neither goes beyond the verifier's positions nor predicts beyond them."""
        room = self._room()
        if self._nodes and room >= self._depth:
            drafter = cast("TreeDrafting", self._drafter)
            numbers = None if uniforms is None else uniforms[:, : self._nodes]
            return drafter.propose_tree(self._last[:, 0], numbers)
        count, chain = min(self._count, room), Proposal(self._last[:, :0])
        if self._drafter is not None and count > 0:
            numbers = None if uniforms is None else uniforms[:, :count]
            chain = self._drafter.propose(count, numbers)
        tokens = torch.cat([self._last, chain.tokens], 1)
        counts = None if chain.counts is None else torch.tensor(chain.counts, device=tokens.device)
        return TreeProposal(chain_tree(tokens, counts), None, chain.mode, chain.probabilities)

    def _verify(
        self, logits: Tensor, proposal: TreeProposal, uniforms: Tensor | None
    ) -> TreeVerdict:
        if logits.dtype == torch.float16:
            logits = logits.float()  # the operators have no float16
        if uniforms is None:
            return tree_verification.verify_greedy(logits, proposal.tree)
        sampling = self._settings.sampling
        return tree_verification.verify_sampling(
            logits,
            proposal.tree,
            uniforms,
            mode=proposal.mode,
            draft_probabilities=proposal.probabilities,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
        )

    def _update_drafter(
        self, tokens: Tensor, counts: list[int], streams: Mapping[int, Tensor], index: Tensor | None
    ) -> None:
        if self._drafter is None:
            return
        width = max(counts)
        if index is not None:
            self._drafter.select(index.tolist())
        self._drafter.update(
            _rows_of(tokens, index)[:, :width],
            counts,
            {k: _rows_of(stream, index)[:, :width] for k, stream in streams.items()},
        )

    def _record(self, new: list[list[int]], drafted: list[int]) -> None:
        for row, tokens, depth in zip(self._rows, new, drafted, strict=True):
            accepted = len(tokens) - 1
            self.output.traces[row].append(accepted)
            self.output.acceptance.record(depth, accepted)

    def _advance(self, new: list[list[int]]) -> tuple[list[list[int]], list[int]]:
        """Emits, and tells a drafter that wants to know how the texts end that do."""
        sequences = self._rows
        emitted, kept = self._emit(new)
        if hasattr(self._drafter, "finish"):
            drafter = cast("Finishing", self._drafter)
            for row in sorted(set(range(len(sequences))) - set(kept)):
                drafter.finish(row, emitted[sequences[row]])
        return emitted, kept

    def _emit(self, new: list[list[int]]) -> tuple[list[list[int]], list[int]]:
        """Appends new tokens to the sequences of the rows, up to where those end.

        Returns:
            What is emitted of every sequence, and which rows go on.
        """
        emitted: list[list[int]] = [[] for _ in self.output.sequences]
        kept = []
        for row, (sequence, tokens) in enumerate(zip(self._rows, new, strict=True)):
            so_far = self.output.sequences[sequence]
            keep, reason = self._stopping.cut(so_far, tokens, self._limits[sequence])
            emitted[sequence] = tokens[:keep]
            so_far += tokens[:keep]
            self.output.finish_reasons[sequence] = reason
            if reason is None:
                kept.append(row)
        self._rows = [self._rows[row] for row in kept]
        return emitted, kept

    def _keep(self, kept: list[int]) -> Tensor | None:
        """Drops the rows that have ended from what is kept of them.

        Returns:
            int64, the rows that stay, on the host; None if all do.
        """
        if len(kept) == len(self._cached):
            return None
        self._cached = [self._cached[row] for row in kept]
        self._state.select(kept)
        return torch.tensor(kept)

    def _limit(self, length: int) -> int:
        """How many new tokens a prompt of so many tokens may get."""
        if self._max_length is None:
            return self._settings.max_new_tokens
        if length >= self._max_length:
            raise ValueError(
                f"a prompt has {length} tokens; expected fewer than {self._max_length}, the most "
                "that a sequence may have: shorten it, or set max_length"
            )
        return min(self._settings.max_new_tokens, self._max_length - length)


def _least(one: int | None, other: int | None) -> int | None:
    return min((limit for limit in (one, other) if limit is not None), default=None)


def _rows_of(tensor: Tensor, index: Tensor | None) -> Tensor:
    return tensor if index is None else tensor[index]
