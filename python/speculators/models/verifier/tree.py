"""A tree of tokens in one pass of a verifier: who sees whom, and what of it the cache keeps.

Every node sees the tokens before the tree, its ancestors and itself, at the position that it has on
its own branch. So a node's logits are those that the branch would give as a chain, and one pass
verifies many continuations that begin alike (Miao et al., "SpecInfer", 2024, section 4).
"""

import dataclasses
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from speculators.models.verifier.architecture import UnsupportedVerifierError
from speculators.models.verifier.cache import GrowingLayer, VerifierState, take_slots


@dataclasses.dataclass(frozen=True)
class TokenTree:
    """How the M tokens of a pass hang together, for each of B rows.

    Attributes:
        depths: int64 ``[B, M]``, 0 for the root.
        sees: bool ``[B, M, M]``, the ancestors of each node and itself. What pads a smaller tree
            must see itself, too.
    """

    depths: Tensor
    sees: Tensor


def tree_masks(
    config: PreTrainedConfig, state: VerifierState, tree: TokenTree, dtype: torch.dtype
) -> Tensor | dict[str, Tensor]:
    """The attention masks that a decoder of transformers takes as they are.

    Args:
        config: the text part's.
        state: before the pass, S slots wide.
        tree: its M tokens.
        dtype: of the weights.

    Returns:
        ``[B, 1, M, S + M]``, 0 where a node sees a slot and the least number where not; by kind of
        layer if the decoder has several.

    Raises:
        UnsupportedVerifierError: some layer attends in chunks.
    """
    device = state.lengths.device
    slot = torch.arange(state.slots, device=device)
    position = slot - (state.slots - state.lengths[:, None])  # negative where there is no token
    batch, nodes = tree.depths.shape
    sees = torch.cat([(position >= 0)[:, None].expand(batch, nodes, -1), tree.sees], 2)
    node_position = state.lengths[:, None] + tree.depths
    distance = node_position[..., None] - torch.cat([position, node_position], 1)[:, None]

    def mask(kind: str) -> Tensor:
        seen = sees
        if kind == "sliding_attention":
            seen = sees & (distance < config.sliding_window)
        elif kind != "full_attention":
            raise UnsupportedVerifierError(
                f"a layer of model type {config.model_type!r} has {kind}; expected full or "
                "sliding-window attention in a verifier of trees: draft chains instead"
            )
        hidden = torch.finfo(dtype).min
        return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, hidden)[
            :, None
        ]

    kinds = sorted(set(_layer_kinds(config)))
    if len(kinds) == 1:
        return mask(kinds[0])
    return {kind: mask(kind) for kind in kinds}


def keep_path(state: VerifierState, nodes: int, path: Tensor, counts: Sequence[int]) -> None:
    """Keeps of the tree that was read last only a path in each row, in place.

    Args:
        state: after the pass of the tree.
        nodes: M, the width of the pass.
        path: int64 ``[B, R]``, the nodes to keep, each after its parent.
        counts: how many nodes of each row are real, the first ones, at least 1.

    Raises:
        ValueError: the shapes do not fit, or a count is out of its range.
    """
    batch = len(state.lengths)
    if path.ndim != 2 or len(path) != batch or len(counts) != batch:
        raise ValueError(
            f"the path is {list(path.shape)} and there are {len(counts)} counts; expected "
            f"[{batch}, R] and {batch}"
        )
    if not all(1 <= count <= path.shape[1] for count in counts):
        raise ValueError(f"counts are {list(counts)}; expected 1 to {path.shape[1]}")
    before = state.slots - nodes  # of the longest row
    kept = max(counts)
    if min(counts) == kept:
        # The path takes the place of the tree's first nodes; nothing before it moves.
        for layer in cast("list[GrowingLayer]", state.cache.layers):
            if layer.keys is not None and layer.values is not None:
                for cached in (layer.keys, layer.values):
                    cached[:, :, before : before + kept] = take_slots(
                        cached, before + path[:, :kept]
                    )
        if kept < nodes:
            state.cache.crop(kept - nodes)
        state.lengths = state.lengths - nodes + kept
        state.host_lengths = [length - nodes + kept for length in state.host_lengths]
        return
    host_lengths = [
        length - nodes + count for length, count in zip(state.host_lengths, counts, strict=True)
    ]
    slots = max(host_lengths)
    old = state.lengths - nodes
    lengths = torch.tensor(host_lengths, device=old.device)
    # Token t of a row is in slot t + S - length before the tree, and where its node is from there.
    token = torch.arange(slots, device=old.device) - (slots - lengths[:, None])
    node = path.gather(1, (token - old[:, None]).clamp(0, kept - 1))
    sources = torch.where(token < old[:, None], token + before - old[:, None], before + node)
    for layer in cast("list[GrowingLayer]", state.cache.layers):
        layer.take(sources.clamp(min=0))
    state.lengths, state.host_lengths = lengths, host_lengths


def _layer_kinds(config: PreTrainedConfig) -> Sequence[str]:
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return cast("Sequence[str]", kinds)
    windowed = getattr(config, "sliding_window", None) is not None
    return ["sliding_attention" if windowed else "full_attention"]
