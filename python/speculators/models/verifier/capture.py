"""Residual streams by hooks: only the chosen ones are kept, and the model stays as it was.

transformers' ``output_hidden_states`` keeps every layer and returns the last one normed. A pre-hook
on layer k sees exactly what enters layer k, and one on the final norm what leaves the last layer.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from speculators.models.verifier.architecture import Architecture, UnsupportedVerifierError


def check_layer_ids(ids: Iterable[int], num_layers: int) -> tuple[int, ...]:
    """Layer ids as a tuple.

    Raises:
        ValueError: an id is no integer from 0 to ``num_layers``, or occurs twice.
    """
    checked = tuple(ids)
    for k in checked:
        if not isinstance(k, int) or isinstance(k, bool) or not 0 <= k <= num_layers:
            raise ValueError(
                f"layer id {k!r} is out of range; expected an integer from 0 (the embedding) to "
                f"{num_layers} (after the last layer, before the final norm)"
            )
    if len(set(checked)) != len(checked):
        raise ValueError(f"layer ids {list(checked)} repeat; expected each at most once")
    return checked


@contextlib.contextmanager
def residual_streams(parts: Architecture, ids: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """Captures residual streams of the forward pass that runs in the block.

    Args:
        parts: the model.
        ids: residual streams: k is what enters layer k, n what enters the final norm.

    Yields:
        A dictionary that the pass fills: id to ``[B, T, H]``, no copy, in the order of ``ids``. The
        hooks are gone when the block ends, whichever way.

    Raises:
        ValueError: an id is out of range or repeats.
        UnsupportedVerifierError: (at the end of the block) a stream did not pass exactly once, or
            is no ``[B, T, H]``. Only the final norm may run more often; its last pass counts.
    """
    wanted = check_layer_ids(ids, len(parts.layers))
    modules = [*parts.layers, parts.final_norm]
    seen: dict[int, list[Any]] = {k: [] for k in wanted}
    captured: dict[int, Tensor] = {}
    with contextlib.ExitStack() as hooks:
        for k in wanted:
            handle = modules[k].register_forward_pre_hook(_record(seen[k]), with_kwargs=True)
            hooks.callback(handle.remove)
        yield captured
    for k, streams in seen.items():
        if k == len(parts.layers):
            del streams[:-1]  # NanoChat applies its final norm to the embedding, too
        shape = list(streams[0].shape) if streams and isinstance(streams[0], Tensor) else None
        if len(streams) != 1 or shape is None or len(shape) != 3:
            raise UnsupportedVerifierError(
                f"residual stream {k} of {type(parts.decoder).__name__} passed {len(streams)} times"
                f" with shape {shape}; expected one [batch, tokens, hidden] tensor per forward pass"
            )
        captured[k] = streams[0]


def _record(
    streams: list[Any],
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        streams.append(args[0] if args else kwargs.get("hidden_states"))

    return hook
