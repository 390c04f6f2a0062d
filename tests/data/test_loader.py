"""An epoch has every document once, whole, and apart from those it shares a row with."""

import collections
import pathlib
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from tests.data.store_fixtures import HIDDEN, LAYERS, make_store, states_of

from speculators.data.batch import PackedBatch
from speculators.data.loader import PackedBatches, _ahead, packing, split
from speculators.data.store import HiddenStateStore

LENGTHS = [5, 1, 9, 3, 7, 2, 8, 4, 6, 3, 3, 1, 2, 10, 4]
ROW = 10


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> HiddenStateStore:
    return make_store(tmp_path_factory.mktemp("store"), LENGTHS, max_shard_tokens=20)


def loader(store: HiddenStateStore, **changes: object) -> PackedBatches:
    options: dict[str, object] = {"row_tokens": ROW, "rows_per_batch": 2, "seed": 1} | changes
    return PackedBatches(store, **options)  # type: ignore[arg-type]


def same(a: PackedBatch, b: PackedBatch) -> bool:
    fields = ("input_ids", "loss_mask", "position_ids", "document_ids")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in fields) and all(
        torch.equal(a.hidden_states[k], b.hidden_states[k]) for k in LAYERS
    )


def texts(batches: Iterator[PackedBatch]) -> list[tuple[int, ...]]:
    """The documents in batches, by what the batches say alone; all else is checked on the way."""
    found = []
    for batch in batches:
        assert batch.document_ids.shape == batch.input_ids.shape
        tokens = 0
        for row in range(len(batch.input_ids)):
            numbers = batch.document_ids[row]
            count = int(numbers.max()) + 1
            for document in range(count):
                place = (numbers == document).nonzero().flatten()
                ids = batch.input_ids[row, place]
                assert place.tolist() == list(range(int(place[0]), int(place[0]) + len(place)))
                assert batch.position_ids[row, place].tolist() == list(range(len(place)))
                for k, states in states_of(ids).items():
                    assert torch.equal(batch.hidden_states[k][row, place], states.bfloat16())
                found.append(tuple(ids.tolist()))
                tokens += len(place)
            padding = numbers == -1
            assert not padding[: int((~padding).sum())].any()  # at the end of the row
            assert not batch.loss_mask[row, padding].any()
            assert not batch.input_ids[row, padding].any()
            assert not batch.position_ids[row, padding].any()
            assert not batch.hidden_states[3][row, padding].any()
        assert batch.tokens == tokens
    return found


@pytest.mark.parametrize("rows_per_batch", [1, 2, 100])
@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_every_document_once_in_an_epoch(
    store: HiddenStateStore, rows_per_batch: int, prefetch: int
) -> None:
    batches = loader(store, rows_per_batch=rows_per_batch, prefetch=prefetch)
    expected = sorted(tuple(store[number].input_ids.tolist()) for number in range(len(store)))
    orders = []
    for epoch in range(3):
        found = texts(batches.epoch(epoch))
        assert sorted(found) == expected
        orders.append(found)
        assert batches.num_batches(epoch) == len(list(batches.epoch(epoch)))
    assert orders[0] != orders[1] != orders[2]
    assert batches.truncated_documents == batches.truncated_tokens == 0


def test_shapes_dtypes_and_masks(store: HiddenStateStore) -> None:
    batches = loader(store)
    for rows, batch in zip(_pairs(batches.rows(0)), batches.epoch(0), strict=True):
        shape = (len(rows), ROW)
        assert batch.input_ids.shape == batch.loss_mask.shape == shape
        assert batch.input_ids.dtype == batch.position_ids.dtype == torch.int64
        assert batch.document_ids.dtype == torch.int64
        assert batch.loss_mask.dtype == torch.bool
        assert list(batch.hidden_states) == list(LAYERS)
        for states in batch.hidden_states.values():
            assert (states.shape, states.dtype) == ((*shape, HIDDEN), torch.bfloat16)
        for row, documents in enumerate(rows):
            mask = torch.cat([store[number].loss_mask for number in documents])
            assert torch.equal(batch.loss_mask[row, : len(mask)], mask)
        moved = batch.to("cpu")
        assert same(moved, batch)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8", "fp8"])
@pytest.mark.parametrize("layer_ids", [None, (4, 0), ()])
def test_batches_have_what_the_store_reads(
    tmp_path: pathlib.Path, dtype: str, layer_ids: tuple[int, ...] | None
) -> None:
    """Whatever the states are stored as: they go to their rows as a document alone has them."""
    make_store(tmp_path, LENGTHS, max_shard_tokens=20, store_dtype=dtype)
    store = HiddenStateStore.open(tmp_path, layer_ids=layer_ids)
    batches = loader(store, row_tokens=7)
    for rows, batch in zip(_pairs(batches.rows(0)), batches.epoch(0), strict=True):
        assert list(batch.hidden_states) == list(LAYERS if layer_ids is None else layer_ids)
        for k, states in batch.hidden_states.items():
            expected = torch.zeros_like(states)
            assert states.dtype == (torch.float32 if dtype == "float32" else torch.bfloat16)
            for row, documents in enumerate(rows):
                whole = torch.cat([store.read(n, 7).hidden_states[k] for n in documents])
                expected[row, : len(whole)] = whole
            assert torch.equal(states, expected)
            assert bool(states.any())


def _pairs(rows: list[list[int]]) -> list[list[list[int]]]:
    return [rows[begin : begin + 2] for begin in range(0, len(rows), 2)]


def test_seed_and_epoch_decide_about_the_order(store: HiddenStateStore) -> None:
    rows = loader(store).rows(4)
    assert loader(store).rows(4) == rows
    assert loader(store, seed=2).rows(4) != rows
    assert loader(store).rows(5) != rows
    assert all(map(same, loader(store).epoch(4), loader(store, prefetch=0).epoch(4)))


def test_an_epoch_can_begin_in_the_middle(store: HiddenStateStore) -> None:
    batches = loader(store)
    whole = list(batches.epoch(2))
    for start in range(len(whole) + 1):
        rest = list(batches.epoch(2, start))
        assert len(rest) == len(whole) - start
        assert all(map(same, rest, whole[start:]))


def test_a_subset_of_documents(store: HiddenStateStore) -> None:
    wanted = [2, 3, 11]
    batches = loader(store, documents=wanted)
    expected = sorted(tuple(store[number].input_ids.tolist()) for number in wanted)
    assert sorted(texts(batches.epoch(0))) == expected
    with pytest.raises(IndexError, match="documents 2 to 15 of a store of 15"):
        loader(store, documents=[2, 15])


def test_long_documents_are_truncated_and_counted(store: HiddenStateStore) -> None:
    batches = loader(store, row_tokens=6)
    longer = [length for length in LENGTHS if length > 6]
    assert batches.truncated_documents == len(longer)
    assert batches.truncated_tokens == sum(longer) - 6 * len(longer)
    expected = sorted(tuple(store[n].input_ids[:6].tolist()) for n in range(len(store)))
    assert sorted(texts(batches.epoch(0))) == expected


@pytest.mark.parametrize("world_size", [2, 3, 9])
def test_processes_share_the_rows(store: HiddenStateStore, world_size: int) -> None:
    parts = [
        list(loader(store, rank=rank, world_size=world_size).epoch(0)) for rank in range(world_size)
    ]
    counts = {len(part) for part in parts}
    assert counts == {loader(store, world_size=world_size).num_batches(0)}  # none waits for another
    expected = sorted(tuple(store[number].input_ids.tolist()) for number in range(len(store)))
    assert sorted(texts(batch for part in parts for batch in part)) == expected
    one = loader(store, rows_per_batch=2 * world_size)
    for number, whole in enumerate(one.epoch(0)):  # together they make the batch of one process
        together = [part[number] for part in parts]
        assert sum(batch.tokens for batch in together) == whole.tokens
    assert all(batch.input_ids.shape[1] == ROW for part in parts for batch in part)
    if world_size == 9:
        rest = parts[-1][-1]
        assert rest.tokens == 0
        assert rest.input_ids.shape == (1, ROW)


def test_packing_wastes_little_and_mixes_windows() -> None:
    lengths = torch.randint(1, 100, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = packing(lengths, 256, seed=0, epoch=0, window=500)
    placed = collections.Counter(place for row in rows for place in row)
    assert placed == dict.fromkeys(range(2000), 1)
    tokens = [sum(lengths[place] for place in row) for row in rows]
    assert max(tokens) <= 256
    assert sum(tokens) > 0.97 * 256 * len(rows)
    # Packing puts the longest documents into the first rows; the order of training must not.
    longest = [max(lengths[place] for place in row) for row in rows]
    half = len(rows) // 8  # half a window
    means = [sum(longest[begin : begin + half]) / half for begin in (0, half)]
    assert abs(means[0] - means[1]) < 15


def test_wrong_sizes_are_refused(store: HiddenStateStore) -> None:
    wrong: list[dict[str, object]] = [
        {"row_tokens": 0},
        {"rows_per_batch": 0},
        {"prefetch": -1},
        {"documents": []},
    ]
    for changes in wrong:
        with pytest.raises(ValueError, match="expected at least 1 of each"):
            loader(store, **changes)
    with pytest.raises(ValueError, match="rank is 2 of 2; expected 0 to 1"):
        loader(store, rank=2, world_size=2)


@pytest.mark.parametrize(("validation", "count"), [(0, 0), (4, 4), (0.2, 3), (0.001, 1), (14, 14)])
def test_a_split_divides_the_documents(
    store: HiddenStateStore, validation: float, count: int
) -> None:
    train, held_out = split(store, validation, seed=3)
    assert sorted(train + held_out) == list(range(len(store)))
    assert len(held_out) == count
    assert (train, held_out) == (sorted(train), sorted(held_out))
    assert split(store, validation, seed=3) == (train, held_out)


def test_a_split_follows_from_its_seed(store: HiddenStateStore) -> None:
    assert len({tuple(split(store, 3, seed=seed)[1]) for seed in range(10)}) > 5


@pytest.mark.parametrize("validation", [15, -1, 1.0, 0.0, -0.5, 0.99])
def test_a_split_leaves_something_to_train_on(store: HiddenStateStore, validation: float) -> None:
    with pytest.raises(ValueError, match=f"validation is {validation}, and there are 15"):
        split(store, validation)


def threads() -> int:
    return sum(thread.name == "packed-batches" for thread in threading.enumerate())


def test_a_thread_reads_ahead_and_not_further() -> None:
    read: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            read.append(number)
            yield number

    ahead = _ahead(items(), 2)
    assert read == []  # nothing before it is asked for
    assert next(ahead) == 0
    deadline = time.monotonic() + 10
    while len(read) < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert len(read) == 4  # one consumed, two ready, one waiting for room
    assert [next(ahead) for _ in range(5)] == [1, 2, 3, 4, 5]
    assert threads() == 1
    while len(read) < 9 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)  # the thread waits for room that nobody will make
    ahead.close()  # type: ignore[attr-defined]
    assert threads() == 0
    assert len(read) == 9


def test_all_items_come_in_order_and_the_thread_ends() -> None:
    assert list(_ahead(iter(range(50)), 3)) == list(range(50))
    assert list(_ahead(iter([]), 3)) == []
    assert threads() == 0


def test_an_error_comes_where_its_item_would_have(
    store: HiddenStateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = loader(store, rows_per_batch=1)
    third, read = batches.rows(0)[2][0], store.stored

    def fail(number: int, max_tokens: int | None = None) -> object:
        if number == third:
            raise OSError("the disk is gone")
        return read(number, max_tokens)

    monkeypatch.setattr(store, "stored", fail)
    epoch = batches.epoch(0)
    assert next(epoch).tokens > 0
    assert next(epoch).tokens > 0
    with pytest.raises(OSError, match="the disk is gone"):
        next(epoch)
    assert threads() == 0
