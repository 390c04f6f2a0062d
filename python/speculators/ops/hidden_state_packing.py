"""Hidden-state packing: rows of several layers' hidden states, side by side in one buffer.

A verifier leaves one ``[T, H]`` tensor per captured layer; a store keeps, for chosen tokens, all
the layers of a token together, and training wants each layer again, in rows of several documents.
In torch that is a stack or a concatenation of everything followed by an index: two or three copies.
The operators make one, in either direction.

A store is as large as the disk allows, and training reads all of it every epoch. So rows can be
packed into one byte an entry, with a scale for each row and layer: a row is scaled so that its
largest magnitude becomes 127 (``int8``) or 448 (``float8_e4m3fn``), and rounded to the nearest
code, ties to even. With a the largest magnitude of row r in layer l, and c the largest code,

    code = round(x * (c / a))        scale[r, l] = a / c        x is read as code * scale[r, l]

each operation rounded to float32. All back ends give the same bits.

A row with an infinity or a NaN gets the scale NaN, and all of it is read as NaN. That is no error,
because on CUDA to look for it would be to wait for the device; ``scales.isfinite().all()`` is the
question, and is small. A row whose largest magnitude is below 2**-100 gets the scale 0, and is read
as zeros.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from speculators.ops import backend
from speculators.ops.backend import Backend

LARGEST_CODE: Final = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The dtypes with a scale, and their largest code."""

_LEAST_MAGNITUDE: Final = 2.0**-100  # as in number_formats.h
_DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)


@dataclasses.dataclass(frozen=True)
class PackedStates:
    """Rows of several layers' hidden states, side by side.

    Attributes:
        data: ``[rows, L * H]``; int8, float8_e4m3fn, bfloat16, float16 or float32.
        scales: float32 ``[rows, L]`` for the first two, else None.
    """

    data: Tensor
    scales: Tensor | None = None

    def layer(self, number: int, layers: int) -> "PackedStates":
        """One of so many layers; nothing is copied."""
        width = self.data.shape[1] // layers
        data = self.data[:, number * width : (number + 1) * width]
        scales = None if self.scales is None else self.scales[:, number : number + 1]
        return PackedStates(data, scales)


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
    _check_range(index, hidden_states[0].shape[0], "T")
    if backend.choose(index.device.type).backend is Backend.REFERENCE:
        return gather_reference(hidden_states, index)
    result: Tensor = torch.ops.speculators.hidden_state_gather(list(hidden_states), index)
    return result


def gather_reference(hidden_states: Sequence[Tensor], index: Tensor) -> Tensor:
    """What :func:`gather` computes, in torch's own operators, without checks."""
    return torch.cat([layer.index_select(0, index) for layer in hidden_states], dim=1)


def pack(
    hidden_states: Sequence[Tensor], index: Tensor | None = None, *, dtype: torch.dtype
) -> PackedStates:
    """Packs chosen rows of several tensors into one buffer of a smaller dtype.

    Each entry is read from memory once. Not differentiable for dtypes with scales. On CUDA nothing
    waits for the device, as in :func:`gather`.

    Args:
        hidden_states: as in :func:`gather`.
        index: as in :func:`gather`; None: all rows in their order.
        dtype: int8 or float8_e4m3fn, with scales; or bfloat16, float16 or float32, without.

    Returns:
        Data ``[rows, L * H]``, contiguous, and scales ``[rows, L]``.

    Raises:
        TypeError: a dtype is not one of those above.
        ValueError: no tensors, or a shape or device that differs.
        IndexError: an index is out of range (on CPU).

    Example:
        >>> packed = pack([torch.tensor([[1.0, -2.0]]), torch.ones(1, 2)], dtype=torch.int8)
        >>> packed.data
        tensor([[  64, -127,  127,  127]], dtype=torch.int8)
        >>> packed.scales * 127
        tensor([[2., 1.]])
    """
    if dtype not in LARGEST_CODE and dtype not in _DTYPES:
        raise TypeError(f"dtype is {dtype}, expected one of {_names(*LARGEST_CODE, *_DTYPES)}")
    if index is not None:
        _check_index(index)
    _check_layers(hidden_states, None if index is None else index.device)
    first = hidden_states[0]
    if index is not None:
        _check_range(index, first.shape[0], "T")
    if dtype not in LARGEST_CODE:
        if index is None:
            return PackedStates(torch.cat([layer.to(dtype) for layer in hidden_states], dim=1))
        return PackedStates(gather(hidden_states, index).to(dtype))
    if backend.choose(first.device.type).backend is Backend.REFERENCE:
        return PackedStates(*pack_reference(hidden_states, index, dtype))
    packed = torch.ops.speculators.hidden_state_pack(list(hidden_states), index, dtype)
    return PackedStates(*packed)


def pack_reference(
    hidden_states: Sequence[Tensor], index: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What :func:`pack` computes for a dtype with scales, in torch's own operators, unchecked."""
    chosen = [layer if index is None else layer.index_select(0, index) for layer in hidden_states]
    values = torch.stack(chosen, dim=1).float()  # [rows, L, H]
    largest = values.abs().amax(-1) if values.shape[-1] else values.new_zeros(values.shape[:2])
    # A tensor, because torch takes a division by a number for a product with its reciprocal.
    code = torch.full_like(largest, LARGEST_CODE[dtype])
    finite = largest.isfinite()
    counts = finite & (largest >= _LEAST_MAGNITUDE)
    scales = torch.where(counts, largest / code, torch.where(finite, 0.0, torch.nan))
    scaled = values * torch.where(counts, code / largest, 0.0)[..., None]
    scaled = torch.where(finite[..., None], scaled, 0.0)
    codes = scaled.round().to(dtype) if dtype == torch.int8 else scaled.to(dtype)
    return codes.flatten(1), scales


def unpack(packed: PackedStates, layers: int, *, dtype: torch.dtype) -> list[Tensor]:
    """The inverse of :func:`pack`, as far as there is one: each layer as a tensor of its own.

    Args:
        packed: data ``[rows, L * H]`` and scales, as in :func:`unpack_into`.
        layers: L.
        dtype: of the result: bfloat16, float16 or float32.

    Returns:
        L tensors ``[rows, H]``, contiguous.

    Raises:
        TypeError: a dtype is not one of those above.
        ValueError: a shape does not fit.
    """
    if dtype not in _DTYPES:
        raise TypeError(f"dtype is {dtype}, expected one of {_names(*_DTYPES)}")
    data = packed.data
    if data.dim() != 2 or layers < 1 or data.shape[1] % layers:
        raise ValueError(
            f"packed.data has the shape {list(data.shape)}, expected [rows, L * H] of L = {layers}"
        )
    shape = (data.shape[0], data.shape[1] // layers)
    outputs = [data.new_empty(shape, dtype=dtype) for _ in range(layers)]
    unpack_into(outputs, packed)
    return outputs


def unpack_into(
    outputs: Sequence[Tensor], packed: PackedStates, index: Tensor | None = None
) -> None:
    """Puts packed rows where they are wanted, in place.

    ``outputs[l][index[r]] = row r of layer l``

    In outputs ``[B, T, H]`` an index counts through the batch: b T + t. On CUDA nothing waits for
    the device, as in :func:`gather`.

    Args:
        outputs: L tensors ``[N, H]`` or ``[B, T, H]``, all of one shape, dtype (bfloat16, float16
            or float32) and device, contiguous, without gradient (where it is recorded); rows that
            are not named stay as they are.
        packed: data ``[rows, L * H]`` and scales, on the same device; rows may be strided (slices
            of larger tensors are not copied). Data without scales and of another dtype than the
            outputs is converted first.
        index: int64 ``[rows]``, each in ``[0, N)``, all different; None: row r goes to row r.

    Raises:
        TypeError: a dtype is not one of those above, or scales are missing or too many.
        ValueError: a shape or device does not fit, or an output requires gradient.
        IndexError: an index is out of range (on CPU).
    """
    flat = [_flat(number, output) for number, output in enumerate(outputs)]
    _check_layers(flat, None, "outputs")
    _check_packed(packed, flat)
    data, scales, first = packed.data, packed.scales, flat[0]
    if index is not None:
        _check_index(index)
        if index.shape[0] != data.shape[0]:
            raise ValueError(
                f"index has {index.shape[0]} entries, expected one for each of {data.shape[0]} rows"
            )
        if index.device != first.device:
            raise ValueError(f"index is on {index.device} but outputs on {first.device}; move one")
        _check_range(index, first.shape[0], "rows of the outputs")
    elif data.shape[0] > first.shape[0]:
        raise ValueError(
            f"packed.data has {data.shape[0]} rows, and the outputs {first.shape[0]}; expected no "
            "more, or an index"
        )
    data = data if scales is not None else data.to(first.dtype)
    if backend.choose(first.device.type).backend is Backend.REFERENCE:
        unpack_reference(flat, data, scales, index)
    else:
        torch.ops.speculators.hidden_state_unpack_(flat, data, scales, index)
        if not torch.compiler.is_compiling():
            # Whoever saved the outputs for a backward pass learns that they are others now.
            torch.autograd.graph.increment_version(flat)


def unpack_reference(
    outputs: Sequence[Tensor], packed: Tensor, scales: Tensor | None, index: Tensor | None
) -> None:
    """What :func:`unpack_into` does to outputs ``[N, H]``, in torch's own operators, unchecked."""
    rows = torch.arange(packed.shape[0], device=packed.device) if index is None else index
    parts = packed.split(outputs[0].shape[1], dim=1) if packed.shape[1] else [packed] * len(outputs)
    for layer, (output, part) in enumerate(zip(outputs, parts, strict=True)):
        values = part if scales is None else part.float() * scales[:, layer, None]
        output[rows] = values.to(output.dtype)


def _check_index(index: Tensor) -> None:
    if index.dtype != torch.int64:
        raise TypeError(f"index is {index.dtype}, expected torch.int64")
    if index.dim() != 1:
        raise ValueError(f"index has the shape {list(index.shape)}, expected one dimension")


def _check_layers(
    layers: Sequence[Tensor], device: torch.device | None, what: str = "hidden_states"
) -> None:
    """Device: that of the index, if there is one."""
    if not layers:
        raise ValueError(f"{what} is empty, expected at least one tensor [rows, H]")
    first = layers[0]
    if first.dtype not in _DTYPES:
        raise TypeError(f"{what}[0] is {first.dtype}, expected one of {_names(*_DTYPES)}")
    if first.dim() != 2:
        raise ValueError(f"{what}[0] has the shape {list(first.shape)}, expected [rows, H]")
    beside, device = ("the first", first.device) if device is None else ("index", device)
    for number, layer in enumerate(layers):
        name = f"{what}[{number}]"
        if layer.dtype != first.dtype:
            raise TypeError(f"{name} is {layer.dtype}, expected {first.dtype} as the first")
        if layer.shape != first.shape:
            found, expected = list(layer.shape), list(first.shape)
            raise ValueError(f"{name} has the shape {found}, expected {expected} as the first")
        if layer.device != device:
            raise ValueError(f"{name} is on {layer.device} but {beside} is on {device}; move one")


def _check_range(index: Tensor, limit: int, what: str) -> None:
    # On a CUDA device this would wait for it; in a traced graph the values are not known yet.
    if index.device.type != "cpu" or torch.compiler.is_compiling():
        return
    outside = ((index < 0) | (index >= limit)).nonzero()
    if outside.numel():
        position = int(outside[0])
        raise IndexError(
            f"index[{position}] is {int(index[position])}, expected 0 <= index < {limit} ({what})"
        )


def _flat(number: int, output: Tensor) -> Tensor:
    """An output as ``[N, H]``, the same memory."""
    found = f"outputs[{number}] has the shape {list(output.shape)} and strides {output.stride()}"
    if output.dim() not in {2, 3} or not output.is_contiguous():
        raise ValueError(f"{found}; expected a contiguous tensor [N, H] or [B, T, H]")
    if output.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"outputs[{number}] requires gradient, of which what is written in place has none; "
            "expected a tensor without, or torch.no_grad()"
        )
    return output.flatten(0, -2)


def _check_packed(packed: PackedStates, outputs: Sequence[Tensor]) -> None:
    data, scales, device = packed.data, packed.scales, outputs[0].device
    width = len(outputs) * outputs[0].shape[1]
    if data.dtype not in LARGEST_CODE and data.dtype not in _DTYPES:
        expected = _names(*LARGEST_CODE, *_DTYPES)
        raise TypeError(f"packed.data is {data.dtype}, expected one of {expected}")
    if data.dim() != 2 or data.shape[1] != width:
        raise ValueError(
            f"packed.data has the shape {list(data.shape)}, expected [rows, {width}] for "
            f"{len(outputs)} outputs {list(outputs[0].shape)}"
        )
    if data.device != device:
        raise ValueError(f"packed.data is on {data.device} but outputs on {device}; move one")
    if (scales is not None) != (data.dtype in LARGEST_CODE):
        raise TypeError(
            f"packed.data is {data.dtype} {'without' if scales is None else 'with'} scales; "
            f"expected scales for {_names(*LARGEST_CODE)} only"
        )
    if scales is None:
        return
    if scales.dtype != torch.float32:
        raise TypeError(f"packed.scales is {scales.dtype}, expected torch.float32")
    if scales.shape != (data.shape[0], len(outputs)):
        expected = f"{[data.shape[0], len(outputs)]}"
        raise ValueError(f"packed.scales has the shape {list(scales.shape)}, expected {expected}")
    if scales.device != device:
        raise ValueError(f"packed.scales is on {scales.device} but outputs on {device}; move one")


def _names(*dtypes: torch.dtype) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)


def _gather_fake(hidden_states: Sequence[Tensor], index: Tensor) -> Tensor:
    width = len(hidden_states) * hidden_states[0].shape[1]
    return hidden_states[0].new_empty((index.shape[0], width))


def _pack_fake(
    hidden_states: Sequence[Tensor], index: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    first, layers = hidden_states[0], len(hidden_states)
    rows = first.shape[0] if index is None else index.shape[0]
    packed = first.new_empty((rows, layers * first.shape[1]), dtype=dtype)
    return packed, first.new_empty((rows, layers), dtype=torch.float32)


def _unpack_fake(
    outputs: Sequence[Tensor], packed: Tensor, scales: Tensor | None, index: Tensor | None
) -> None:
    del outputs, packed, scales, index  # it writes in place, and makes nothing


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
    torch.library.register_fake("speculators::hidden_state_pack", _pack_fake)
    torch.library.register_fake("speculators::hidden_state_unpack_", _unpack_fake)
    torch.library.register_autograd(
        "speculators::hidden_state_gather", _gather_gradient, setup_context=_save_for_gradient
    )
