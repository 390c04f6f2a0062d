"""A store gives back what was put in, and says what is wrong with a folder that is none."""

import itertools
import json
import pathlib
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tests.data.store_fixtures import (
    HIDDEN,
    LAYERS,
    KnownSource,
    make_store,
    random_documents,
    states_of,
)

from speculators.configs.errors import ConfigError
from speculators.data.generate import _new_index, generate
from speculators.data.loader import PackedBatches
from speculators.data.store import (
    DTypeName,
    HiddenStateStore,
    StoreIndex,
    StoreWriter,
    bytes_per_token,
    shard_name,
)

FLOAT8 = torch.float8_e4m3fn
LENGTHS = [5, 1, 9, 3, 7, 2, 8]


def index(**changes: Any) -> StoreIndex:
    values: dict[str, Any] = {
        "content_hash": "c",
        "made_from": {},
        "verifier": "v",
        "layer_ids": [0, 3],
        "hidden_size": 2,
        "dtype": "bfloat16",
        "num_documents": 2,
    }
    return StoreIndex(**values | changes)


@pytest.mark.parametrize(
    ("dtype", "torch_dtype"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)]
)
@pytest.mark.parametrize("max_shard_tokens", [1, 12, 10**6])
def test_documents_come_back_by_their_own_numbers(
    tmp_path: pathlib.Path, dtype: str, torch_dtype: torch.dtype, max_shard_tokens: int
) -> None:
    store = make_store(tmp_path, LENGTHS, store_dtype=dtype, max_shard_tokens=max_shard_tokens)
    documents = random_documents(LENGTHS)
    assert len(store) == len(LENGTHS)
    assert (store.layer_ids, store.hidden_size, store.dtype) == (LAYERS, HIDDEN, torch_dtype)
    assert list(store.lengths) == LENGTHS
    assert list(store.learnable) == [int(mask.sum()) for _, mask in documents.rows]
    assert len(store.index.shards) == {1: 7, 12: 4, 10**6: 1}[max_shard_tokens]
    for number, (input_ids, loss_mask) in enumerate(documents.rows):
        document = store[number]
        assert document.input_ids.dtype == torch.int64
        assert torch.equal(document.input_ids, input_ids)
        assert document.loss_mask.dtype == torch.bool
        assert torch.equal(document.loss_mask, loss_mask)
        assert list(document.hidden_states) == list(LAYERS)
        for k, states in states_of(input_ids).items():
            assert torch.equal(document.hidden_states[k], states.to(torch_dtype))


@pytest.mark.parametrize(
    ("dtype", "torch_dtype", "near"), [("int8", torch.int8, 1 / 254), ("fp8", FLOAT8, 1 / 16)]
)
def test_one_byte_an_entry(
    tmp_path: pathlib.Path, dtype: str, torch_dtype: torch.dtype, near: float
) -> None:
    store = make_store(tmp_path, LENGTHS, store_dtype=dtype, max_shard_tokens=12)
    assert store.dtype == torch.bfloat16
    for shard in range(len(store.index.shards)):
        with safe_open(tmp_path / shard_name(shard), framework="pt") as file:
            rows = sum(store.index.shards[shard].lengths)
            codes, scales = file.get_tensor("hidden_states"), file.get_tensor("scales")
            assert (codes.dtype, list(codes.shape)) == (torch_dtype, [rows, len(LAYERS) * HIDDEN])
            assert (scales.dtype, list(scales.shape)) == (torch.float32, [rows, len(LAYERS)])
    some = HiddenStateStore.open(tmp_path, layer_ids=[4, 0])
    for number, (input_ids, _) in enumerate(random_documents(LENGTHS).rows):
        document = store[number]
        for k, exact in states_of(input_ids).items():
            states = document.hidden_states[k]
            assert states.dtype == torch.bfloat16
            largest = exact.abs().amax(1, keepdim=True)
            assert bool(((states.float() - exact).abs() <= (near + 1 / 256) * largest).all())
        for k, states in some.read(number, 2).hidden_states.items():
            assert torch.equal(states, document.hidden_states[k][:2])
        states = document.hidden_states[0]
        states.zero_()  # they are the reader's own, and nobody else's
        assert bool(store[number].hidden_states[0].any())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8", "fp8"])
def test_bytes_of_a_token(tmp_path: pathlib.Path, dtype: DTypeName) -> None:
    store = make_store(tmp_path, LENGTHS, store_dtype=dtype)
    with safe_open(tmp_path / shard_name(0), framework="pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 - no mapping
    of_tokens = [tensor for tensor in tensors if len(tensor) == sum(LENGTHS)]
    found = sum(tensor.numel() * tensor.itemsize for tensor in of_tokens)
    assert found == bytes_per_token(len(LAYERS), HIDDEN, dtype) * sum(store.lengths)


def write_format_1(directory: pathlib.Path, documents: int, of: int) -> None:
    """A store as the first format has it, by hand: so many of its documents, each in a shard."""
    directory.mkdir()
    shards = []
    for number, (input_ids, loss_mask) in enumerate(random_documents([4, 3]).rows[:documents]):
        tensors = {f"hidden_states.{k}": s.bfloat16() for k, s in states_of(input_ids).items()}
        tensors |= {"input_ids": input_ids.int(), "loss_mask": loss_mask}
        tensors |= {"documents": torch.tensor([number]), "offsets": torch.tensor([0, 4])}
        path = directory / shard_name(number)
        save_file(tensors, path)
        shards.append(
            {
                "documents": [number],
                "lengths": [len(input_ids)],
                "learnable": [int(loss_mask.sum())],
                "file_bytes": path.stat().st_size,
            }
        )
    new = _new_index(random_documents([4, 3]), KnownSource(), None, "bfloat16")
    old = {"format_version": 1, "shards": shards, "complete": documents == of}
    (directory / "index.json").write_text(json.dumps(new.model_dump() | old))


def test_a_store_of_the_first_format_is_read(tmp_path: pathlib.Path) -> None:
    write_format_1(tmp_path / "old", 2, 2)
    for layer_ids in (None, [3]):
        store = HiddenStateStore.open(tmp_path / "old", layer_ids=layer_ids)
        for number, (input_ids, loss_mask) in enumerate(random_documents([4, 3]).rows):
            document = store[number]
            assert torch.equal(document.input_ids, input_ids)
            assert torch.equal(document.loss_mask, loss_mask)
            assert list(document.hidden_states) == list(layer_ids or LAYERS)
            for k, states in document.hidden_states.items():
                assert torch.equal(states, states_of(input_ids)[k].bfloat16())
            (batch,) = PackedBatches(
                store, row_tokens=5, rows_per_batch=1, documents=[number]
            ).epoch(0)
            length = len(input_ids)
            assert torch.equal(batch.hidden_states[3][0, :length], document.hidden_states[3])
    assert generate(random_documents([4, 3]), tmp_path / "old", KnownSource()).reused_documents == 2


def test_a_store_of_the_first_format_is_finished_in_it(tmp_path: pathlib.Path) -> None:
    write_format_1(tmp_path / "part", 1, 2)
    report = generate(random_documents([4, 3]), tmp_path / "part", KnownSource())
    assert report.reused_documents == 1
    store = HiddenStateStore.open(tmp_path / "part")
    assert store.index.format_version == 1
    for number, (input_ids, _) in enumerate(random_documents([4, 3]).rows):
        for k, states in store[number].hidden_states.items():
            assert torch.equal(states, states_of(input_ids)[k].bfloat16())


def test_a_document_can_be_read_in_part(tmp_path: pathlib.Path) -> None:
    store = make_store(tmp_path, LENGTHS, store_dtype="float32")
    whole, begin = store[2], store.read(2, max_tokens=4)
    assert torch.equal(begin.input_ids, whole.input_ids[:4])
    assert torch.equal(begin.loss_mask, whole.loss_mask[:4])
    assert torch.equal(begin.hidden_states[3], whole.hidden_states[3][:4])
    assert len(store.read(1, max_tokens=4).input_ids) == 1
    for number in (-1, len(LENGTHS)):
        with pytest.raises(IndexError, match=f"document {number} of 7; expected 0 to 6"):
            store[number]


def test_only_the_wanted_streams_are_read(tmp_path: pathlib.Path) -> None:
    make_store(tmp_path, LENGTHS)
    store = HiddenStateStore.open(tmp_path, layer_ids=[4, 0])
    assert store.layer_ids == (4, 0)
    assert list(store[1].hidden_states) == [4, 0]
    with pytest.raises(ValueError, match=r"streams \[0, 3, 4\]; \[0, 2\] are wanted"):
        HiddenStateStore.open(tmp_path, layer_ids=[0, 2])


def test_what_is_written_into_a_document_does_not_reach_the_file(tmp_path: pathlib.Path) -> None:
    store = make_store(tmp_path, LENGTHS)
    before = (tmp_path / "shard-00000.safetensors").read_bytes()
    store[0].hidden_states[0].zero_()
    assert (tmp_path / "shard-00000.safetensors").read_bytes() == before


def test_shards_say_which_documents_they_hold(tmp_path: pathlib.Path) -> None:
    store = make_store(tmp_path, LENGTHS, max_shard_tokens=12)
    for number, shard in enumerate(store.index.shards):
        path = tmp_path / f"shard-{number:05d}.safetensors"
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"content_hash": store.content_hash}
            documents = file.get_tensor("documents").tolist()
            offsets = file.get_tensor("offsets").tolist()
            shape = [offsets[-1], len(LAYERS) * HIDDEN]
            assert file.get_slice("hidden_states").get_shape() == shape
            assert file.get_slice("input_ids").get_dtype() == "I32"
        assert documents == shard.documents
        assert [b - a for a, b in itertools.pairwise(offsets)] == shard.lengths
        assert shard.lengths == [LENGTHS[document] for document in documents]
        assert sum(shard.lengths) <= 12


def test_more_shards_than_files_are_kept_open(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("speculators.data.store._OPEN_SHARDS", 2)
    store = make_store(tmp_path, LENGTHS, max_shard_tokens=1)
    for number in [0, 1, 2, 3, 0, 5, 0, 6]:
        assert len(store[number].input_ids) == LENGTHS[number]
        assert len(store._files) <= 2
    assert list(store._files) == [store._places[number][0] for number in (0, 6)]


def test_an_unfinished_store_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(RuntimeError, match="the verifier failed"):
        generate(random_documents(LENGTHS), tmp_path, KnownSource(fail_at=4), max_shard_tokens=9)
    with pytest.raises(ValueError, match=r"has 3 of 7 documents: its generation was interrupted"):
        HiddenStateStore.open(tmp_path)


def test_what_is_no_store_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent does not exist; .* index\.json"):
        HiddenStateStore.open(tmp_path / "absent")
    (tmp_path / "other").write_text("text")
    with pytest.raises(FileExistsError, match=r"has no readable index\.json"):
        HiddenStateStore.open(tmp_path)


def test_a_damaged_store_is_refused(tmp_path: pathlib.Path) -> None:
    make_store(tmp_path, LENGTHS, max_shard_tokens=12)
    path, shard = tmp_path / "index.json", tmp_path / "shard-00001.safetensors"
    good = json.loads(path.read_text())

    path.write_text(json.dumps(good | {"format_version": 3}))
    with pytest.raises(ConfigError, match="format_version: found 3; input should be 1 or 2"):
        HiddenStateStore.open(tmp_path)

    path.write_text(json.dumps(good | {"shards": good["shards"][1:]}))
    with pytest.raises(ValueError, match=r"shard-00000\.safetensors has \d+ bytes; .* expects \d+"):
        HiddenStateStore.open(tmp_path)

    path.write_text(json.dumps(good | {"num_documents": 8}))
    with pytest.raises(ValueError, match=r"lists 7 documents \(7 different\) of 8"):
        HiddenStateStore.open(tmp_path)

    path.write_text(json.dumps(good))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"has {len(content) - 1} bytes; .*{len(content)} bytes"):
        HiddenStateStore.open(tmp_path)
    shard.unlink()
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors has no file"):
        HiddenStateStore.open(tmp_path)
    shard.write_bytes(content)
    assert len(HiddenStateStore.open(tmp_path)) == 7


def test_what_a_source_gives_wrong_is_refused(tmp_path: pathlib.Path) -> None:
    writer = StoreWriter(tmp_path, index())
    ids, mask = torch.tensor([1, 2, 3]), torch.tensor([False, True, True])
    good = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"document 1 came with .* \[0\]; expected \[0, 3\]"):
        writer.add(1, ids, mask, {0: good})
    with pytest.raises(ValueError, match=r"residual stream 3 of \[2, 2\]; expected \[3\]"):
        writer.add(1, ids, mask, {0: good, 3: good[:2]})
    with pytest.raises(ValueError, match=r"3 tokens, a loss mask \[2\]"):
        writer.add(1, ids, mask[:2], {0: good, 3: good})
    for dtype in ("bfloat16", "float32", "int8", "fp8"):
        writer = StoreWriter(tmp_path, index(dtype=dtype))
        for wrong in (torch.inf, torch.nan):
            states = torch.ones(3, 2)
            states[1, 1] = wrong
            with pytest.raises(ValueError, match="residual stream 3 of document 1 is not finite"):
                writer.add(1, ids, mask, {0: good, 3: states})


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_streams_of_different_dtypes(tmp_path: pathlib.Path, dtype: str) -> None:
    writer = StoreWriter(tmp_path, index(num_documents=1, dtype=dtype))
    states = {0: torch.tensor([[1.0, -3.0]], dtype=torch.float64), 3: torch.ones(1, 2).half()}
    writer.add(0, torch.tensor([4]), torch.tensor([True]), states)
    writer.write_shard()
    writer.finish()
    found = HiddenStateStore.open(tmp_path)[0].hidden_states
    assert found[3].tolist() == [[1.0, 1.0]]
    assert found[0][0, 1] == -3


def test_leftovers_of_a_killed_writer_are_removed(tmp_path: pathlib.Path) -> None:
    (tmp_path / ".shard-00000.safetensors.abc").write_bytes(b"half")
    (tmp_path / "shard-00000.safetensors").write_bytes(b"not named by an index")
    writer = StoreWriter(tmp_path, index(num_documents=1))
    writer.add(0, torch.tensor([4]), torch.tensor([True]), dict.fromkeys((0, 3), torch.ones(1, 2)))
    writer.write_shard()
    writer.finish()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index.json", "shard-00000.safetensors"]
    assert HiddenStateStore.open(tmp_path)[0].input_ids.tolist() == [4]
