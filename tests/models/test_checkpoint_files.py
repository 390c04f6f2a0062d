"""A checkpoint is a stranger's file: what is damaged, leads astray or runs code is refused."""

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.models.draft_weights import SPECS, refuse, same, tensors
from torch import Tensor

from speculators.models.weights import CheckpointError, read_tensors, tensor_shapes, write_tensors

INDEX = "model.safetensors.index.json"


class RunsCode:
    """What a malicious pickle holds."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def sharded(directory: Path) -> dict[str, Any]:
    """Writes two shards, of three tensors and of one; returns the index."""
    write_tensors(directory, tensors(), max_shard_size=64)
    index: dict[str, Any] = json.loads((directory / INDEX).read_text())
    assert len(set(index["weight_map"].values())) == 2
    return index


def test_an_index_that_does_not_agree_with_its_shards(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    same(read_tensors(tmp_path, SPECS), tensors())
    first, second = sorted(set(index["weight_map"].values()))
    in_first = [name for name, file in index["weight_map"].items() if file == first]
    wrong = {name: file for name, file in index["weight_map"].items() if name != in_first[0]}
    wrong |= {"ghost": second, in_first[1]: second}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": wrong}))
    lines = refuse(tmp_path, "does not agree").splitlines()[1:]
    assert lines == sorted(
        [
            f"  ghost: not in {second}",
            f"  {in_first[0]}: in {first} only",
            f"  {in_first[1]}: in {first} only",
            f"  {in_first[1]}: not in {second}",
        ]
    )


def test_a_shard_that_is_missing(tmp_path: Path) -> None:
    first, second = sorted(set(sharded(tmp_path)["weight_map"].values()))
    (tmp_path / second).unlink()
    assert first not in refuse(tmp_path, f"{second}: missing", INDEX)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "..\\outside.safetensors",
        "folder/../../outside.safetensors",
        "folder/x.safetensors",
        "{absolute}",
        "C:outside.safetensors",
        "..",
        "",
        "x\0.safetensors",
        "pytorch_model.bin",
    ],
)
def test_an_index_cannot_lead_out_of_the_directory(tmp_path: Path, name: str) -> None:
    draft = tmp_path / "draft"
    (draft / "folder").mkdir(parents=True)
    for file in (tmp_path / "outside.safetensors", draft / "folder" / "x.safetensors"):
        save_file(tensors(), file)
    name = name.replace("{absolute}", str(tmp_path / "outside.safetensors"))
    (draft / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(SPECS, name)}))
    refuse(draft, f"{name!r}: expected the plain name of a .safetensors file")


def test_links_are_read_as_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    sharded(blobs)
    for number, file in enumerate(sorted(blobs.iterdir())):
        blob = file.rename(blobs / f"blob{number}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    same(read_tensors(snapshot, SPECS), tensors())


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"weight_map": 1}', '{"weight_map": {"a": 1}}', "[" * 100_000, "\udcff"],
)
def test_an_index_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX).write_bytes(content.encode(errors="surrogateescape"))
    assert re.search("is not JSON|has no weight_map", refuse(tmp_path, INDEX))


def test_a_damaged_file(tmp_path: Path) -> None:
    write_tensors(tmp_path, tensors())
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    huge = (2**60).to_bytes(8, "little") + whole[8:]
    lengths = (0, 7, 8, 50, len(whole) - 1)
    for content in [*(whole[:length] for length in lengths), whole + b"-", pointer, huge]:
        file.write_bytes(content)
        refuse(tmp_path, f"{file} is damaged", "git lfs pull")
        with pytest.raises(CheckpointError, match="is damaged"):
            tensor_shapes(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "draft.pt"])
def test_pickles_are_read_where_there_are_no_safetensors(tmp_path: Path, name: str) -> None:
    values: dict[str, Tensor] = {**tensors(), "a": torch.nn.Parameter(tensors()["a"].T).T}
    torch.save(values, tmp_path / name)
    found = read_tensors(tmp_path, SPECS)
    same(found, tensors())
    assert not any(tensor.requires_grad for tensor in found.values())
    assert tensor_shapes(tmp_path) == {key: spec.shape for key, spec in SPECS.items()}
    (tmp_path / "pytorch_model.bin.index.json").write_text("never read")
    if name.endswith(".bin"):
        read_tensors(tmp_path, SPECS)
    write_tensors(tmp_path, {**tensors(), "b": torch.zeros(4)})
    assert read_tensors(tmp_path, SPECS)["b"].equal(torch.zeros(4))


def test_pickles_in_shards(tmp_path: Path) -> None:
    names = {name: f"pytorch_model-{name}.bin" for name in SPECS}
    for name, file in names.items():
        torch.save({name: tensors()[name]}, tmp_path / file)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    same(read_tensors(tmp_path, SPECS), tensors())
    index.write_text(json.dumps({"weight_map": names | {"a": "x.safetensors"}}))
    refuse(tmp_path, "'x.safetensors': expected the plain name of a .bin file")


def test_a_pickle_that_wants_to_run_code_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "was-run"
    content = {**tensors(), "a": RunsCode(marker)}
    file = tmp_path / "pytorch_model.bin"
    with file.open("wb") as opened:
        pickle.dump(RunsCode(marker), opened, protocol=2)
    refuse(tmp_path, f"{file} cannot be read as tensors alone", "nothing that a checkpoint wants")
    torch.save(content, file)
    message = refuse(tmp_path, f"{file} cannot be read as tensors alone", "GLOBAL", "mkdir")
    assert "weights_only" not in message  # no advice to run it
    assert not marker.exists()
    torch.load(file, weights_only=False)  # it would have run
    assert marker.exists()


def test_a_pickle_of_something_else(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save(tensors(), file)
    whole = file.read_bytes()
    for content in (b"", whole[:100], whole[:-100], b"\x80\x02."):
        file.write_bytes(content)
        refuse(tmp_path, f"{file} cannot be read as tensors alone")
    torch.save([torch.ones(1)], file)
    refuse(tmp_path, "holds a list; expected a dict of tensors")
    torch.save(
        {"a": torch.ones(1), "step": 3, 4: torch.ones(1), "s": torch.eye(2).to_sparse()}, file
    )
    lines = refuse(tmp_path, "does not hold dense tensors alone").splitlines()[1:]
    assert lines == ["  'step': int", "  4: Tensor", "  's': Tensor"]


def test_no_weights_or_no_directory(tmp_path: Path) -> None:
    assert "found nothing" in refuse(tmp_path, "has no weights", "expected model.safetensors")
    (tmp_path / "config.json").touch()
    refuse(tmp_path, "has no weights: found config.json")
    for name in ("one.pt", "two.pt"):
        torch.save(tensors(), tmp_path / name)
    refuse(tmp_path, "has several files of weights", "one.pt, two.pt")
    with pytest.raises(NotADirectoryError, match="expected a draft's directory"):
        read_tensors(tmp_path / "one.pt", SPECS)
