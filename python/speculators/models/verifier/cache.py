"""The KV cache of a verifier, and how rejected tokens leave it.

transformers' cache for a sliding-window layer forgets what has left the window, so that rejected
tokens cannot be taken back. Ours keeps every token in every layer, and the window is in the mask
alone: the logits are the same, and any number of tokens can be cropped, for the price of memory.

Rows are aligned to the right: row b holds its tokens in the last ``lengths[b]`` slots. The distance
between two slots is then the distance between their tokens, which sliding windows count. Where rows
keep different numbers of tokens, they are shifted to stay so; keys carry their rotation with them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from speculators.models.verifier.architecture import UnsupportedVerifierError


@dataclasses.dataclass
class VerifierState:
    """What a verifier remembers of a batch; ``Verifier.step`` and ``Verifier.crop`` change it.

    Attributes:
        cache: the keys and values, ``[B, N, S, D]`` per layer, S slots.
        lengths: int64 ``[B]``, the tokens of each row; they fill the last slots.
        host_lengths: the same numbers on the host, so that it need not wait for the device.
    """

    cache: Cache
    lengths: Tensor
    host_lengths: list[int]

    @property
    def slots(self) -> int:
        """The width of the cache, the longest row's number of tokens."""
        return int(self.cache.get_seq_length())

    @property
    def padded(self) -> bool:
        """Whether some row has fewer tokens than there are slots."""
        return min(self.host_lengths) < self.slots

    def attention_mask(self, new_tokens: int) -> Tensor | None:
        """Bool ``[B, S + new_tokens]``, true where there is a token; None where all are."""
        if not self.padded:
            return None
        slots = self.slots
        slot = torch.arange(slots + new_tokens, device=self.lengths.device)
        return slot >= slots - self.lengths[:, None]

    def select(self, rows: Sequence[int]) -> None:
        """Keeps these rows only, in this order, and no slots that are padding in all of them."""
        index = torch.tensor(rows, device=self.lengths.device)
        self.lengths = self.lengths[index]
        self.host_lengths = [self.host_lengths[row] for row in rows]
        first = self.slots - max(self.host_lengths)
        for layer in cast("list[GrowingLayer]", self.cache.layers):
            layer.select(index, first)


class GrowingLayer(DynamicLayer):
    """Keys and values with room for more, so that a step writes its own and copies no others.

    ``keys`` and ``values`` are views of what is filled. Whoever else replaces them (as methods of
    transformers do) makes the room void, and the next update makes new room.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._room: dict[str, Tensor] = {}  # [B, N, capacity, D]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Appends keys and values ``[B, N, R, D]``; returns all of them, ``[B, N, S + R, D]``."""
        del args, kwargs
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append("keys", self.keys, key_states)
        self.values = self._append("values", self.values, value_states)
        return self.keys, self.values

    def take(self, sources: Tensor) -> None:
        """Keeps some slots of each row: slot j of row b takes what is in ``sources[b, j]``.

        They are gathered into new room, so that the next update does not copy them once more.
        """
        rows, slots = sources.shape
        self._move(rows, slots, lambda old, new: take_slots(old, sources, new))

    def select(self, rows: Tensor, first: int) -> None:
        """Keeps some rows, int64 ``[B]``, and their slots from ``first`` on, in new room."""

        def move(old: Tensor, new: Tensor) -> Tensor:
            return torch.index_select(old[:, :, first:], 0, rows.to(old.device), out=new)

        self._move(len(rows), self.get_seq_length() - first, move)

    def reset(self) -> None:
        """Forgets everything."""
        self._room.clear()
        super().reset()

    def _append(self, name: str, old: Tensor | None, new: Tensor) -> Tensor:
        if old is None or old.numel() == 0:  # a prompt; it often is all there will be
            return new
        filled, needed = old.shape[2], old.shape[2] + new.shape[2]
        room = self._room.get(name)
        ours = room is not None and room.data_ptr() == old.data_ptr()
        if room is None or not ours or room.shape[2] < needed:
            room = self._new_room(name, old, len(old), needed)
            room[:, :, :filled] = old
        room[:, :, filled:needed] = new
        return room[:, :, :needed]

    def _move(self, rows: int, slots: int, move: Callable[[Tensor, Tensor], Tensor]) -> None:
        if self.keys is not None and self.values is not None:
            room = self._new_room("keys", self.keys, rows, slots)
            self.keys = move(self.keys, room[:, :, :slots])
            room = self._new_room("values", self.values, rows, slots)
            self.values = move(self.values, room[:, :, :slots])

    def _new_room(self, name: str, old: Tensor, rows: int, needed: int) -> Tensor:
        capacity = needed + max(64, needed // 2)
        room = self._room[name] = old.new_empty(rows, old.shape[1], capacity, old.shape[3])
        return room


def new_cache(config: PreTrainedConfig) -> Cache:
    """An empty cache for a model of this text configuration that can be cropped.

    Raises:
        UnsupportedVerifierError: some layer keeps no plain keys and values.
    """
    cache = DynamicCache(config=config)
    for number, layer in enumerate(cache.layers):
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            raise UnsupportedVerifierError(
                f"layer {number} of model type {config.model_type!r} keeps a recurrent state "
                f"({type(layer).__name__}), from which rejected tokens cannot be taken back; "
                "expected attention with keys and values in every layer"
            )
        if type(layer) not in {DynamicLayer, DynamicSlidingWindowLayer}:
            raise UnsupportedVerifierError(
                f"layer {number} of model type {config.model_type!r} needs a cache of class "
                f"{type(layer).__name__}; supported are full, sliding-window and chunked attention"
            )
        cache.layers[number] = GrowingLayer()
    return cache


def crop(state: VerifierState, lengths: int | Sequence[int] | Tensor) -> None:
    """Drops the last tokens of each row, in place.

    Args:
        state: the state to change.
        lengths: how many tokens each row keeps, one number or one for each row; best no tensor on
            a device, which has to be waited for.

    Raises:
        ValueError: a row would keep fewer than 1 token, or more than it has, or ``lengths`` are no
            integers ``[B]``.
    """
    given, old = torch.as_tensor(lengths, device="cpu"), state.host_lengths
    if given.is_floating_point() or given.shape not in {torch.Size([]), state.lengths.shape}:
        raise ValueError(
            f"lengths are {given.dtype} {list(given.shape)}; expected one integer, or integers "
            f"{list(state.lengths.shape)}"
        )
    keep = given.long().expand(len(old)).tolist()
    if not all(1 <= kept <= length for kept, length in zip(keep, old, strict=True)):
        raise ValueError(
            f"cannot crop rows of {old} tokens to {keep}; expected from 1 to as many as there are"
        )
    new = torch.tensor(keep, device=state.lengths.device)
    removed = [length - kept for kept, length in zip(keep, old, strict=True)]
    if min(removed) == max(removed):
        if removed[0] > 0:
            state.cache.crop(-removed[0])
    else:
        # What lay removed[b] slots before the old end comes to the new one, and so on to the left.
        slots = max(keep)
        shift = state.slots - slots - (state.lengths - new)
        sources = torch.arange(slots, device=new.device) + shift[:, None]
        sources = sources.clamp(min=0)  # padding takes anything
        for layer in cast("list[GrowingLayer]", state.cache.layers):
            layer.take(sources)
    state.lengths, state.host_lengths = new, keep


def take_slots(cached: Tensor, sources: Tensor, out: Tensor | None = None) -> Tensor:
    """``[B, N, S, D]`` and the slots ``[B, R]`` that each row keeps, to ``[B, N, R, D]``."""
    index = sources.to(cached.device)[:, None, :, None]
    index = index.expand(-1, cached.shape[1], -1, cached.shape[3])
    return torch.gather(cached, 2, index, out=out)
