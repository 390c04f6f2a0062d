"""A few tensors of every type that a draft stores, and what a model would expect of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from speculators.models.weights import CheckpointError, TensorSpec, read_tensors

SPECS = {
    "a": TensorSpec((2, 3)),
    "b": TensorSpec((4,)),
    "ids": TensorSpec((4,), torch.int64),
    "mask": TensorSpec((), torch.bool),
}


def tensors() -> dict[str, Tensor]:
    """The tensors that ``SPECS`` expects."""
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(2, 3, generator=generator),
        "b": torch.randn(4, generator=generator).bfloat16(),
        "ids": torch.tensor([-1, 0, 2**62, 3]),
        "mask": torch.tensor(True),
    }


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Asserts that names, types, shapes and bits are the same."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert (
            found[name]
            .contiguous()
            .view(-1)
            .view(torch.uint8)
            .equal(tensor.contiguous().view(-1).view(torch.uint8))
        )


def refuse(directory: Path, *words: str, **settings: Any) -> str:
    """Asserts that reading fails, with these words; returns the whole message."""
    with pytest.raises(CheckpointError) as caught:
        read_tensors(directory, SPECS, **settings)
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)
