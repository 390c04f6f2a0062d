"""The shape of a batch: padding on the left, or documents packed into rows."""

import torch
from torch import Tensor


def check_token_ids(input_ids: Tensor) -> None:
    """Raises ValueError unless these are token ids, integers ``[B, T]`` with B, T >= 1."""
    if input_ids.ndim != 2 or input_ids.numel() == 0 or input_ids.is_floating_point():
        raise ValueError(
            f"input_ids are {input_ids.dtype} {list(input_ids.shape)}; expected integers [B, T], "
            "with at least one row and one token"
        )


def row_lengths(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The number of tokens in each row.

    Args:
        input_ids: ``[B, T]``.
        attention_mask: ``[B, T]``, 0 (padding) or 1, or None where there is no padding.

    Returns:
        int64 ``[B]``.

    Raises:
        ValueError: the padding is not on the left, or a row is padding alone.
    """
    batch, tokens = input_ids.shape
    if attention_mask is None:
        return torch.full((batch,), tokens, device=input_ids.device)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask is {list(attention_mask.shape)}; expected {list(input_ids.shape)}, "
            "as input_ids"
        )
    mask = attention_mask.bool()
    if not bool(mask[:, -1].all()) or bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise ValueError(
            "attention_mask has padding after a token, or a row of padding alone; expected all "
            "padding on the left (tokenizer.padding_side = 'left')"
        )
    return mask.sum(1)


def packed_positions(
    input_ids: Tensor, cu_seqlens: Tensor | None, position_ids: Tensor | None
) -> Tensor:
    """The position of each token in its own document.

    Args:
        input_ids: ``[B, T]``.
        cu_seqlens: int ``[documents + 1]``, for B = 1; or
        position_ids: int64 ``[B, T]``.

    Returns:
        int64 ``[B, T]``, counting up from 0 in each document.

    Raises:
        ValueError: both are given, or they describe no packing of these rows.
    """
    batch, tokens = input_ids.shape
    if cu_seqlens is not None:
        if position_ids is not None or batch != 1:
            raise ValueError(
                f"cu_seqlens pack one row without position_ids; got {batch} rows"
                + ("" if position_ids is None else " and position_ids")
            )
        lengths = cu_seqlens.diff()
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens or bool((lengths < 1).any()):
            raise ValueError(
                f"cu_seqlens are {cu_seqlens.tolist()}; expected to rise from 0 to the row's "
                f"{tokens} tokens"
            )
        begin = cu_seqlens[:-1].repeat_interleave(lengths).to(input_ids.device)
        return (torch.arange(tokens, device=input_ids.device) - begin)[None]
    if position_ids is not None:
        position_ids = position_ids.to(input_ids.device)
    if position_ids is None or position_ids.shape != input_ids.shape:
        found = None if position_ids is None else list(position_ids.shape)
        raise ValueError(f"position_ids are {found}; expected {list(input_ids.shape)}")
    follows = (position_ids[:, 1:] == position_ids[:, :-1] + 1) | (position_ids[:, 1:] == 0)
    if not bool((position_ids[:, 0] == 0).all() and follows.all()):
        raise ValueError(
            "position_ids do not count up from 0 in each document; expected rows such as "
            "[0, 1, 2, 0, 1], one 0 where each document begins"
        )
    return position_ids
