"""Hidden-state packing: rows of several layers' hidden states, side by side in one buffer.

A verifier leaves one ``[T, H]`` tensor per captured layer; a store keeps, for chosen tokens, all
the layers of a token together. In torch that is a stack or a concatenation of everything followed
by an index: two or three copies. The operator makes one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from speculators.ops import backend
from speculators.ops.backend import Backend

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def gather(hidden_states: Sequence[Tensor], index: Tensor) -> Tensor:
    """Packs chosen rows of several tensors into one buffer.

    ``out[r] = concatenate(hidden_states[0][index[r]], hidden_states[1][index[r]], ...)``

    Differentiable in ``hidden_states``. On CUDA nothing waits for the device: an index out of range
    stops the kernel, and the error surfaces at the next synchronisation, as with torch's own
    indexing.

    Args:
        hidden_states: L tensors ``[T, H]``, all of one shape, dtype (bfloat16, float16 or float32)
            and device; rows may be strided (slices of larger tensors are not copied).
        index: ``[rows]``, int64, each in ``[0, T)``, in any order, repeats allowed; same device.

    Returns:
        ``[rows, L * H]``, contiguous, the inputs' dtype and device.

    Raises:
        TypeError: a dtype is not one of those above.
        ValueError: no tensors, or a shape or device that differs.
        IndexError: an index is out of range (on CPU).

    Example:
        >>> layers = [torch.zeros(4, 2), torch.ones(4, 2)]
        >>> gather(layers, torch.tensor([3, 0]))
        tensor([[0., 0., 1., 1.],
                [0., 0., 1., 1.]])
    """
    _check_index(index)
    _check_layers(hidden_states, index.device)
    # On a CUDA device this would wait for it; in a traced graph the values are not known yet.
    if index.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_range(index, hidden_states[0].shape[0])
    if backend.choose(index.device.type).backend is Backend.REFERENCE:
        return gather_reference(hidden_states, index)
    result: Tensor = torch.ops.speculators.hidden_state_gather(list(hidden_states), index)
    return result


def gather_reference(hidden_states: Sequence[Tensor], index: Tensor) -> Tensor:
    """What :func:`gather` computes, in torch's own operators, without checks."""
    return torch.cat([layer.index_select(0, index) for layer in hidden_states], dim=1)


def _check_index(index: Tensor) -> None:
    if index.dtype != torch.int64:
        raise TypeError(f"index is {index.dtype}, expected torch.int64")
    if index.dim() != 1:
        raise ValueError(f"index has the shape {list(index.shape)}, expected one dimension")


def _check_layers(hidden_states: Sequence[Tensor], device: torch.device) -> None:
    if not hidden_states:
        raise ValueError("hidden_states is empty, expected at least one [T, H] tensor")
    first = hidden_states[0]
    if first.dtype not in _DTYPES:
        names = ", ".join(str(dtype) for dtype in _DTYPES)
        raise TypeError(f"hidden_states[0] is {first.dtype}, expected one of {names}")
    if first.dim() != 2:
        raise ValueError(f"hidden_states[0] has the shape {list(first.shape)}, expected [T, H]")
    for number, layer in enumerate(hidden_states):
        name = f"hidden_states[{number}]"
        if layer.dtype != first.dtype:
            raise TypeError(f"{name} is {layer.dtype}, expected {first.dtype} as the first")
        if layer.shape != first.shape:
            found, expected = list(layer.shape), list(first.shape)
            raise ValueError(f"{name} has the shape {found}, expected {expected} as the first")
        if layer.device != device:
            raise ValueError(f"{name} is on {layer.device} but index is on {device}; move one")


def _check_range(index: Tensor, tokens: int) -> None:
    outside = ((index < 0) | (index >= tokens)).nonzero()
    if outside.numel():
        position = int(outside[0])
        raise IndexError(
            f"index[{position}] is {int(index[position])}, expected 0 <= index < {tokens} (T)"
        )


def _gather_fake(hidden_states: Sequence[Tensor], index: Tensor) -> Tensor:
    width = len(hidden_states) * hidden_states[0].shape[1]
    return hidden_states[0].new_empty((index.shape[0], width))


def _save_for_gradient(ctx: Any, inputs: tuple[list[Tensor], Tensor], output: Tensor) -> None:
    del output  # torch names the arguments; the gradient does not need it
    hidden_states, index = inputs
    ctx.save_for_backward(index)
    ctx.shape = hidden_states[0].shape


def _gather_gradient(ctx: Any, grad: Tensor) -> tuple[list[Tensor], None]:
    """The transpose of a gather is a scatter-add: rows that were taken twice add up."""
    (index,) = ctx.saved_tensors
    tokens, width = ctx.shape
    parts = torch.split(grad, width, dim=1)
    return [grad.new_zeros(tokens, width).index_add_(0, index, part) for part in parts], None


if backend.LIBRARIES[Backend.CPU].loaded:
    torch.library.register_fake("speculators::hidden_state_gather", _gather_fake)
    torch.library.register_autograd(
        "speculators::hidden_state_gather", _gather_gradient, setup_context=_save_for_gradient
    )
