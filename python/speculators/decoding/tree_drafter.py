"""``TreeDrafter``: a draft model that drafts several tokens after each, for one verification.

What holds for a chain holds on each branch: a row takes its token, the states that its parent's row
put out, and one position more than that; it sees the committed rows and its own ancestors. All
nodes of a depth that get children run in one pass. Nodes are numbered as
:mod:`speculators.ops.draft_tree` says.
"""

import torch
from torch import Tensor

from speculators.decoding.chain import ChainDrafter
from speculators.decoding.drafters import TreeProposal
from speculators.decoding.sampling import GREEDY, Sampling, draw
from speculators.decoding.trees import DynamicTree, Level, StaticTree, Tree, layout
from speculators.models.speculator_model import SpeculatorModel
from speculators.models.verifier.tree import TokenTree
from speculators.models.verifier.verifier import Verifier
from speculators.ops.draft_tree import DraftTree, mask_of
from speculators.ops.tree_verification import SamplingMode, build_tree


class TreeDrafter(ChainDrafter):
    """Drafts trees, and chains where there is no room for a tree; a ``TreeDrafting``.

    Args:
        model: as for a chain.
        verifier: the verifier that it drafts for.
        shape: of the trees.
        sampling: as for a chain. The children in a dynamic tree are chosen, never drawn.

    Raises:
        ValueError: the draft does not fit the verifier.
        UnsupportedVerifierError: the verifier cannot read trees.
    """

    def __init__(
        self,
        model: SpeculatorModel,
        verifier: Verifier,
        shape: Tree,
        sampling: Sampling = GREEDY,
    ) -> None:
        super().__init__(model, verifier, sampling)
        verifier.check_trees()
        self.tree_nodes, self.tree_depth = shape.nodes, shape.depth
        self._shape = shape
        self._layout = layout(shape, verifier.device) if isinstance(shape, StaticTree) else None

    @torch.no_grad()
    def propose_tree(self, roots: Tensor, uniforms: Tensor | None) -> TreeProposal:
        """See :class:`~speculators.decoding.drafters.TreeDrafting`."""
        self._cache.drop_drafted()
        if isinstance(self._shape, DynamicTree):
            return self._dynamic(roots, self._shape)
        return self._static(roots, uniforms, replacement=self._shape.replacement)

    def _dynamic(self, roots: Tensor, shape: DynamicTree) -> TreeProposal:
        width = min(shape.children, self._logits.shape[-1])
        chosen = _log_probabilities(self._logits).topk(width)
        scores, tokens = chosen.values, self._verifier_tokens(chosen.indices)  # [B, C]
        batch = len(scores)
        parents = torch.full_like(tokens, -1)
        all_tokens, all_parents, all_scores = [tokens], [parents], [scores]
        candidates = torch.arange(width, device=tokens.device).expand(batch, -1)
        states = self._states.expand(-1, width, -1)
        sees = torch.eye(width, dtype=torch.bool, device=tokens.device).expand(batch, -1, -1)
        for depth in range(1, shape.depth):
            states, logits = self._draft_rows(tokens, states, depth, sees)
            log_p = _log_probabilities(logits) + scores[..., None]
            chosen = log_p.topk(width)
            new_tokens = self._verifier_tokens(chosen.indices).flatten(1)  # [B, C * C]
            first = sum(part.shape[1] for part in all_tokens)
            all_tokens.append(new_tokens)
            all_parents.append(candidates.repeat_interleave(width, 1))
            all_scores.append(chosen.values.flatten(1))
            if depth + 1 == shape.depth:
                break
            # Its best nodes are the rows of the next depth.
            scores, best = all_scores[-1].topk(width)
            tokens = new_tokens.gather(1, best)
            candidates = first + best
            row = best // width
            states = states.gather(1, row[..., None].expand(-1, -1, states.shape[2]))
            above = sees.gather(1, row[..., None].expand(-1, -1, sees.shape[2]))
            itself = torch.eye(width, dtype=torch.bool, device=tokens.device)
            sees = torch.cat([above, itself.expand(batch, -1, -1)], 2)
        selected = build_tree(
            torch.cat(all_tokens, 1),
            torch.cat(all_parents, 1),
            torch.cat(all_scores, 1),
            roots,
            torch.zeros_like(roots),
            shape.nodes,
        )
        positions = selected.positions  # the root's is 0, so these are depths
        return TreeProposal(selected, TokenTree(positions, mask_of(selected.ancestors)))

    def _static(self, roots: Tensor, uniforms: Tensor | None, *, replacement: bool) -> TreeProposal:
        assert self._layout is not None  # noqa: S101 - for the type checker
        plan, drawn = self._layout, uniforms is not None and not self._sampling.greedy
        batch, depth_states = len(self._logits), self._states
        logits = self._logits[:, None]  # [B, P, W], of the nodes that have children
        all_tokens, all_missing, probabilities = [], [], []
        parents_missing = torch.zeros(batch, 1, dtype=torch.bool, device=roots.device)
        begin = 0
        for depth, level in enumerate(plan.levels, 1):
            width = len(level.of_rank)
            if drawn and uniforms is not None:
                q = self._wide(self._sampling.distribution(logits))
                numbers = uniforms[:, begin : begin + len(level.ranks)]
                tokens, missing = _draw_children(q, level, numbers, replacement=replacement)
                probabilities.append(q)
            else:
                best = self._verifier_tokens(logits.topk(min(width, logits.shape[-1])).indices)
                missing = (level.ranks >= best.shape[2]).expand(batch, -1)
                tokens = best[:, level.parents, level.ranks.clamp(max=best.shape[2] - 1)]
            begin += len(level.ranks)
            missing = missing | parents_missing[:, level.parents]
            all_tokens.append(tokens)
            all_missing.append(missing)
            if len(level.inner):
                parents_missing = missing[:, level.inner]
                states = depth_states[:, level.parents[level.inner]]
                depth_states, logits = self._draft_rows(
                    tokens[:, level.inner], states, depth, level.sees[None]
                )
        tokens, missing = torch.cat(all_tokens, 1), torch.cat(all_missing, 1)
        tree = DraftTree(
            torch.cat([roots[:, None], tokens], 1),
            torch.nn.functional.pad(
                plan.parents[1:].expand_as(missing).masked_fill(missing, -1), (1, 0), value=-1
            ),
        )
        layout_of_rows = TokenTree(
            plan.depths.expand(len(roots), -1), plan.sees.expand(len(roots), -1, -1)
        )
        if not drawn:
            return TreeProposal(tree, layout_of_rows)
        mode = SamplingMode.WITH_REPLACEMENT if replacement else SamplingMode.WITHOUT_REPLACEMENT
        return TreeProposal(tree, layout_of_rows, mode, self._by_node(probabilities))

    def _by_node(self, probabilities: list[Tensor]) -> Tensor:
        """What inner nodes' children were drawn from, by level, to rows numbered as nodes."""
        assert self._layout is not None  # noqa: S101 - for the type checker
        of_levels = torch.cat(probabilities, 1)
        q = of_levels.new_zeros(len(of_levels), self._layout.inner_end, of_levels.shape[2])
        return q.index_copy(1, self._layout.inner, of_levels)

    def _draft_rows(
        self, tokens: Tensor, states: Tensor, depth: int, sees: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One pass for nodes ``[B, R]`` of a depth: their states and logits ``[B, R, W]``."""
        positions = (self._cache.committed + depth - 1).expand(-1, tokens.shape[1])
        self._cache.draft(sees)
        output = self._model(tokens, states, positions, self._cache)
        return output.states, self._model.logits(output.head_input)


def _log_probabilities(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1)


def _draw_children(
    q: Tensor, level: Level, uniforms: Tensor, *, replacement: bool
) -> tuple[Tensor, Tensor]:
    """Draws the children of P nodes, one rank after the other.

    Args:
        q: ``[B, P, V]``, what each node's children are drawn from.
        level: the M children.
        uniforms: float64 ``[B, M]``.
        replacement: else a token that was drawn is out for the later ones.

    Returns:
        The children ``[B, M]``, and which could not be drawn because no token was left.
    """
    batch, _, vocabulary = q.shape
    parents = level.parents
    tokens = parents.new_zeros(batch, len(parents))
    missing = torch.zeros_like(tokens, dtype=torch.bool)
    left = q.clone()
    for children in level.of_rank:
        weights = left[:, parents[children]]  # [B, M', V]
        flat = draw(weights.flatten(0, 1), uniforms[:, children].flatten())
        drawn = flat.clamp(max=vocabulary - 1).view(batch, -1)
        tokens[:, children] = drawn
        missing[:, children] = weights.sum(-1) <= 0
        if not replacement:
            left[:, parents[children]] = weights.scatter(2, drawn[..., None], 0.0)
    return tokens, missing
