"""Weights: what is written comes back, and what does not fit is named."""

from pathlib import Path
from typing import Any, Self

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tests.models.draft_weights import SPECS, refuse, same, tensors
from torch import Tensor

from speculators.models.weights import TensorSpec, read_tensors, tensor_shapes, write_tensors


class HeadersOnly:
    """safetensors' ``safe_open`` for files of which no tensor must be read."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        self.file: Any = safe_open(*arguments, **keywords)
        self.keys, self.get_slice = self.file.keys, self.file.get_slice

    def get_tensor(self, name: str) -> Tensor:
        """Fails."""
        raise AssertionError(f"{name} was read before all were checked")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.__exit__(None, None, None)


def specs(values: dict[str, Tensor]) -> dict[str, TensorSpec]:
    return {
        name: TensorSpec(tuple(value.shape), "float" if value.is_floating_point() else value.dtype)
        for name, value in values.items()
    }


@pytest.mark.parametrize(("size", "files"), [("5GB", 1), (100, 3), (1, 7)])
def test_what_is_written_comes_back_to_the_bit(tmp_path: Path, size: Any, files: int) -> None:
    base = torch.arange(12.0).view(3, 4)
    special = torch.tensor([float("nan"), float("-inf"), -0.0, 1e-45])
    values = {
        **tensors(),
        "special": special,
        "half": special.half(),
        "double": special.double(),
        "transposed": base.T,
        "row": base[1],
        "whole": base,
        "tied": base,
        "empty": torch.zeros(0, 5),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    write_tensors(tmp_path, values, max_shard_size=size)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) == 1 if files == 1 else len(shards) >= files
    assert (tmp_path / "model.safetensors.index.json").exists() == (len(shards) > 1)
    same(read_tensors(tmp_path, specs(values)), values)
    assert tensor_shapes(tmp_path) == {name: tuple(v.shape) for name, v in values.items()}
    # Others read it as well: transformers asks for the metadata, and for the right to read.
    plain = tmp_path / "plain"
    plain.touch()
    stored: dict[str, Tensor] = {}
    for shard in shards:
        stored |= load_file(shard)
        with safe_open(shard, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        assert shard.stat().st_mode == plain.stat().st_mode
    same(stored, values)


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path, tensors(), metadata={"format": "pt", "made": "here"})
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", "made": "here"}
    with pytest.raises(FileExistsError, match=r"has model\.safetensors; expected"):
        write_tensors(tmp_path, tensors())
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    with pytest.raises(ValueError, match="no tensors"):
        write_tensors(fresh, {})
    for tensor in (torch.ones(2, device="meta"), torch.eye(2).to_sparse()):
        with pytest.raises(ValueError, match=r"tensor 'x' is .*; expected a dense tensor"):
            write_tensors(fresh, {"x": tensor})
    assert not list(fresh.iterdir())


def test_reading_converts_floating_point_alone_and_leaves_the_file(tmp_path: Path) -> None:
    write_tensors(tmp_path, tensors())
    before = (tmp_path / "model.safetensors").read_bytes()
    found = read_tensors(tmp_path, SPECS, dtype=torch.float64)
    assert [tensor.dtype for tensor in found.values()] == [
        *[torch.float64] * 2,
        torch.int64,
        torch.bool,
    ]
    assert found["b"].equal(tensors()["b"].double())
    for tensor in read_tensors(tmp_path, SPECS).values():
        tensor.fill_(1)  # as training does
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_everything_that_does_not_fit_is_in_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = tensors()
    del values["b"]
    values |= {
        "a": torch.ones(3, 2).int(),
        "ids": torch.ones(4),
        "mask": torch.ones(()).to(torch.uint8),
    }
    values |= {"extra": torch.ones(1), "eights": torch.ones(2).to(torch.float8_e4m3fn)}
    write_tensors(tmp_path, values)

    monkeypatch.setattr("speculators.models.checkpoint_files.safe_open", HeadersOnly)
    message = refuse(tmp_path, str(tmp_path))
    assert message.splitlines()[1:] == [
        "  a: found shape [3, 2]; expected [2, 3]",
        "  a: found type torch.int32; expected float",
        "  b: missing; expected float [4]",
        "  eights: unexpected; found F8_E4M3 [2]",
        "  extra: unexpected; found torch.float32 [1]",
        "  ids: found type torch.float32; expected torch.int64",
        "  mask: found type U8; expected torch.bool",
    ]
    some = refuse(tmp_path, optional={"b", "a"}, ignored={"extra", "never there"})
    assert "b:" not in some
    assert "extra" not in some
    assert "a: found shape" in some  # it may be missing, not wrong


def test_optional_tensors_may_be_missing_and_ignored_ones_there(tmp_path: Path) -> None:
    values = tensors()
    write_tensors(tmp_path, values | {"extra": torch.ones(1)})
    expected = {**SPECS, "more": TensorSpec((1,))}
    same(read_tensors(tmp_path, expected, optional=["more"], ignored=["extra"]), values)
