"""An interrupted store becomes the uninterrupted one; stale stores and full disks are refused."""

import collections
import errno
import itertools
import os
import pathlib
import re
import shutil
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.data.store_fixtures import (
    HIDDEN,
    LAYERS,
    Documents,
    KnownSource,
    random_documents,
    states_of,
)
from tests.models import verifier_models
from tests.models.verifier_models import tokens
from torch import Tensor

from speculators.data import ordering
from speculators.data.artifact import StaleArtifactError
from speculators.data.disk import DiskSpaceError, check_free, full_disk, readable_bytes
from speculators.data.generate import GenerateReport, _new_index, generate
from speculators.data.ordering import derived_seed, length_batches, processing_order
from speculators.data.regenerate import RegenerateSettings, write_responses
from speculators.data.sources import TransformersSource
from speculators.data.store import HiddenStateStore, StoreWriter
from speculators.models.verifier.verifier import Verifier

LENGTHS = [5, 1, 9, 3, 7, 2, 8, 4, 6, 3]
OPTIONS: dict[str, Any] = {"max_shard_tokens": 16, "batch_tokens": 18}


class Recorder:
    """A ``Progress`` that keeps what it is told."""

    def __init__(self) -> None:
        self.total = 0
        self.done = 0
        self.messages: list[str] = []

    def start(self, total: int, description: str) -> None:
        """Keeps how much there is to do."""
        assert description
        self.total = total

    def advance(self, count: int) -> None:
        """Keeps how much is done."""
        self.done += count

    def message(self, text: str) -> None:
        """Keeps the line."""
        self.messages.append(text)


class KnownWriter(KnownSource):
    """Writes responses that follow from prompt and seed, of different lengths."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.calls: list[tuple[int, int]] = []

    def write_responses(
        self, prompts: Sequence[Tensor], settings: RegenerateSettings, seed: int
    ) -> list[Tensor]:
        """From 1 to ``max_new_tokens`` random tokens for each prompt."""
        self.calls.append((len(prompts), seed))
        generator = torch.Generator().manual_seed(seed)
        counts = torch.randint(1, settings.max_new_tokens + 1, (len(prompts),), generator=generator)
        return [torch.randint(0, 50, (int(count),), generator=generator) for count in counts]


def files(directory: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def set_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = collections.namedtuple("usage", "total used free")  # noqa: PYI024 - as shutil's own
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**15, 0, free))


def test_documents_are_sorted_within_windows() -> None:
    lengths = [3, 1, 2, 5, 4, 6, 6]
    assert processing_order(lengths, window=3) == [0, 2, 1, 5, 3, 4, 6]
    assert processing_order(lengths, window=100) == [5, 6, 3, 4, 0, 2, 1]
    assert processing_order([]) == []


def test_batches_hold_no_more_than_they_may() -> None:
    generator = torch.Generator().manual_seed(0)
    for budget in (1, 7, 20, 1000):
        lengths = torch.randint(1, 15, (50,), generator=generator).tolist()
        batches = list(length_batches(lengths, budget))
        assert [place for batch in batches for place in batch] == list(range(50))
        for batch, following in zip(batches, [*batches[1:], range(0)], strict=True):
            cost = max(lengths[place] for place in batch) * len(batch)
            assert cost <= budget or len(batch) == 1
            if following:  # one more would have been too much
                longer = range(batch.start, batch.stop + 1)
                assert max(lengths[place] for place in longer) * len(longer) > budget
    assert list(length_batches([], 5)) == []


def test_seeds_differ_in_every_part() -> None:
    parts: list[tuple[int | str, ...]] = [(0, 1), (1, 0), (0,), (0, 11), (0, 1, 1), ("0", 1)]
    assert len({derived_seed(*part) for part in parts}) == len(parts)
    assert derived_seed(3, 4) == derived_seed(3, 4)
    assert all(0 <= derived_seed(*part) < 2**63 for part in parts)


def test_the_report_counts_what_is_there(tmp_path: pathlib.Path) -> None:
    documents, progress = random_documents(LENGTHS), Recorder()
    report = generate(documents, tmp_path / "s", KnownSource(), progress=progress, **OPTIONS)
    store = HiddenStateStore.open(tmp_path / "s")
    assert report == GenerateReport(
        directory=tmp_path / "s",
        content_hash=store.content_hash,
        documents=len(LENGTHS),
        tokens=sum(LENGTHS),
        learnable=sum(int(mask.sum()) for _, mask in documents.rows),
        file_bytes=sum(len(content) for content in files(tmp_path / "s").values()),
        shards=len(store.index.shards),
        reused_documents=0,
        seconds=report.seconds,
    )
    assert (progress.total, progress.done) == (len(LENGTHS), len(LENGTHS))


@pytest.mark.parametrize("regenerate", [None, RegenerateSettings(temperature=1, max_new_tokens=6)])
@pytest.mark.parametrize("fail_at", range(len(LENGTHS)))
def test_a_run_that_failed_goes_on_where_it_stopped(
    tmp_path: pathlib.Path, fail_at: int, regenerate: RegenerateSettings | None
) -> None:
    dtype = ("bfloat16", "int8", "fp8", "float32")[fail_at % 4]
    options = OPTIONS | {"regenerate": regenerate, "store_dtype": dtype}
    documents = random_documents(LENGTHS)
    generate(documents, tmp_path / "whole", KnownWriter(), **options)
    with pytest.raises(RuntimeError, match="the verifier failed"):
        generate(documents, tmp_path / "part", KnownWriter(fail_at=fail_at), **options)
    whole, part = files(tmp_path / "whole"), files(tmp_path / "part")
    shards = [name for name in part if name.startswith("shard")]
    assert all(part[name] == whole[name] for name in shards)
    times = {name: (tmp_path / "part" / name).stat().st_mtime_ns for name in shards}
    source, progress = KnownWriter(), Recorder()
    report = generate(documents, tmp_path / "part", source, progress=progress, **options)
    assert files(tmp_path / "part") == whole
    for name, time in times.items():
        assert (tmp_path / "part" / name).stat().st_mtime_ns == time
    assert report.reused_documents + len(source.seen) == len(LENGTHS)
    assert report.reused_documents <= fail_at
    assert fail_at < 4 or report.reused_documents > 0  # a shard is at most 16 tokens
    assert (progress.total, progress.done) == (len(LENGTHS), len(LENGTHS))


def test_a_run_that_was_killed_after_its_last_shard_is_complete(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = random_documents(LENGTHS)
    generate(documents, tmp_path / "whole", KnownSource(), **OPTIONS)

    def killed(_: StoreWriter) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            generate(documents, tmp_path / "part", KnownSource(), **OPTIONS)
    source = KnownSource()
    report = generate(documents, tmp_path / "part", source, **OPTIONS)
    assert files(tmp_path / "part") == files(tmp_path / "whole")
    assert source.seen == []
    assert report.reused_documents == len(LENGTHS)


def test_a_run_can_go_on_with_other_batches_and_shards(tmp_path: pathlib.Path) -> None:
    documents = random_documents(LENGTHS)
    with pytest.raises(RuntimeError):
        generate(documents, tmp_path, KnownSource(fail_at=5), **OPTIONS)
    report = generate(
        documents,
        tmp_path,
        KnownSource(),
        batch_tokens=3,
        max_shard_tokens=7,
        store_dtype="bfloat16",
    )
    assert 0 < report.reused_documents < len(LENGTHS)
    store = HiddenStateStore.open(tmp_path)
    for number, (input_ids, _) in enumerate(documents.rows):
        assert torch.equal(store[number].input_ids, input_ids)
        assert torch.equal(store[number].hidden_states[3], states_of(input_ids)[3].bfloat16())


def test_a_complete_store_is_not_made_again(tmp_path: pathlib.Path) -> None:
    documents = random_documents(LENGTHS)
    first = generate(documents, tmp_path, KnownSource(), **OPTIONS)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    for overwrite in (False, True):
        source = KnownSource(fail_at=0)
        again = generate(documents, tmp_path, source, overwrite=overwrite, **OPTIONS)
        assert again.reused_documents == len(LENGTHS)
        assert (again.tokens, again.file_bytes) == (first.tokens, first.file_bytes)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_a_store_of_further_streams_serves(tmp_path: pathlib.Path) -> None:
    documents = random_documents(LENGTHS)
    made = generate(documents, tmp_path, KnownSource(), **OPTIONS)
    before = files(tmp_path)
    for layers in ((3,), (0, 4), ()):
        for overwrite in (False, True):
            source = KnownSource(fail_at=0, layer_ids=layers)
            found = generate(documents, tmp_path, source, overwrite=overwrite, **OPTIONS)
            assert found.content_hash == made.content_hash
            assert found.reused_documents == len(LENGTHS)
    with pytest.raises(StaleArtifactError):
        generate(documents, tmp_path, KnownSource(layer_ids=(1, 3)), **OPTIONS)
    other = KnownSource(layer_ids=(3,), name="other")
    with pytest.raises(StaleArtifactError):
        generate(documents, tmp_path, other, **OPTIONS)
    assert files(tmp_path) == before


def test_a_store_of_further_streams_must_be_complete(tmp_path: pathlib.Path) -> None:
    documents = random_documents(LENGTHS)
    with pytest.raises(RuntimeError, match="the verifier failed"):
        generate(documents, tmp_path, KnownSource(fail_at=8), **OPTIONS)
    with pytest.raises(StaleArtifactError):
        generate(documents, tmp_path, KnownSource(layer_ids=(3,)), **OPTIONS)
    made = KnownSource(layer_ids=(3,))
    generate(documents, tmp_path, made, overwrite=True, **OPTIONS)
    assert len(made.seen) == len(LENGTHS)
    assert HiddenStateStore.open(tmp_path).index.layer_ids == [3]


@pytest.mark.parametrize(
    "changes",
    [
        {"prepared": Documents(random_documents(LENGTHS).rows, "other data")},
        {"source": KnownWriter(name="other verifier")},
        {"store_dtype": "float32"},
        {"store_dtype": "int8"},
        {"store_dtype": "fp8"},
        {"regenerate": RegenerateSettings(max_new_tokens=3)},
    ],
)
def test_a_stale_store_is_an_error_that_names_both_hashes(
    tmp_path: pathlib.Path, changes: dict[str, Any]
) -> None:
    def run(directory: str, **options: Any) -> GenerateReport:
        values: dict[str, Any] = {
            "prepared": random_documents(LENGTHS),
            "source": KnownWriter(),
        } | options
        prepared, source = values.pop("prepared"), values.pop("source")
        return generate(prepared, tmp_path / directory, source, **OPTIONS | values)

    old, new = run("old"), run("new", **changes)
    assert old.content_hash != new.content_hash
    before = files(tmp_path / "old")
    with pytest.raises(StaleArtifactError) as caught:
        run("old", **changes)
    assert old.content_hash in str(caught.value)
    assert new.content_hash in str(caught.value)
    assert files(tmp_path / "old") == before
    report = run("old", overwrite=True, **changes)
    assert report.reused_documents == 0
    assert files(tmp_path / "old") == files(tmp_path / "new")


def test_an_overwritten_store_stays_until_there_is_a_shard_of_the_new_one(
    tmp_path: pathlib.Path,
) -> None:
    store = tmp_path / "store"
    documents, other = random_documents(LENGTHS), Documents(random_documents(LENGTHS).rows, "other")
    generate(documents, store, KnownSource(), **OPTIONS)
    before = files(store)
    lengths = HiddenStateStore.open(store).index.shards[0].lengths
    for fail_at in range(len(lengths)):
        source = KnownSource(fail_at=fail_at)
        with pytest.raises(RuntimeError, match="the verifier failed"):
            generate(other, store, source, overwrite=True, **OPTIONS)
        assert files(store) == before
    source = KnownSource(fail_at=len(lengths))
    with pytest.raises(RuntimeError, match="the verifier failed"):
        generate(other, store, source, overwrite=True, **OPTIONS)
    assert list(files(store)) == ["index.json", "shard-00000.safetensors"]
    # What was begun is gone on with, and the result is that of a run of its own.
    report = generate(other, store, KnownSource(), overwrite=True, **OPTIONS)
    assert report.reused_documents == len(lengths)
    generate(other, tmp_path / "new", KnownSource(), **OPTIONS)
    assert files(store) == files(tmp_path / "new")


def test_a_changed_regeneration_is_another_content() -> None:
    settings = [
        RegenerateSettings(),
        RegenerateSettings(temperature=0.5),
        RegenerateSettings(temperature=0.5, seed=1),
        RegenerateSettings(temperature=0.5, top_p=0.9),
        RegenerateSettings(max_new_tokens=5),
    ]
    hashes = {
        _new_index(random_documents([2]), KnownSource(), value, "bfloat16").content_hash
        for value in settings
    }
    assert len(hashes) == len(settings)


def test_a_folder_of_something_else_is_left_alone(tmp_path: pathlib.Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=r"no readable index\.json"):
            generate(random_documents(LENGTHS), tmp_path, KnownSource(), overwrite=overwrite)
    assert files(tmp_path) == {"thesis.tex": b"years of work"}


def test_responses_replace_the_last_turn(tmp_path: pathlib.Path) -> None:
    rows = [
        (torch.arange(10, 18), torch.tensor([0, 1, 1, 0, 0, 1, 1, 0], dtype=torch.bool)),
        (torch.arange(20, 23), torch.zeros(3, dtype=torch.bool)),
    ]
    settings = RegenerateSettings(max_new_tokens=4, seed=9)
    source = KnownWriter()
    generate(Documents(rows), tmp_path, source, regenerate=settings, batch_tokens=1)
    store = HiddenStateStore.open(tmp_path)
    assert source.calls == [(1, derived_seed(9, 0)), (1, derived_seed(9, 1))]
    for number, prompt in enumerate([torch.arange(10, 15), torch.arange(20, 23)]):
        (response,) = KnownWriter().write_responses([prompt], settings, derived_seed(9, number))
        document = store[number]
        assert torch.equal(document.input_ids, torch.cat([prompt, response]))
        assert document.loss_mask.tolist() == [False] * len(prompt) + [True] * len(response)
        states = states_of(document.input_ids)[4].bfloat16()
        assert torch.equal(document.hidden_states[4], states)


def test_the_verifier_of_transformers_writes_and_reads(tmp_path: pathlib.Path) -> None:
    verifier = Verifier(verifier_models.make("llama"))
    rows = [(tokens(n, seed=n), torch.zeros(n, dtype=torch.bool)) for n in (4, 9, 2, 6)]
    settings = RegenerateSettings(temperature=0.8, top_p=0.9, max_new_tokens=5)
    source = TransformersSource(verifier, [0, 2, 4])
    generate(
        Documents(rows),
        tmp_path,
        source,
        regenerate=settings,
        store_dtype="float32",
        batch_tokens=28,
    )
    store = HiddenStateStore.open(tmp_path)
    for numbers in ([1, 3], [0, 2]):  # sorted, and two prompts of up to 14 tokens in a batch
        prompts = [rows[number][0] for number in numbers]
        expected = write_responses(verifier, prompts, settings, derived_seed(0, numbers[0]))
        for number, prompt, response in zip(numbers, prompts, expected, strict=True):
            document = store[number]
            assert torch.equal(document.input_ids, torch.cat([prompt, response]))
            alone = verifier.prefill(document.input_ids[None], capture=[0, 2, 4], logits="none")
            for k, states in document.hidden_states.items():
                torch.testing.assert_close(states, alone.captured[k][0], rtol=1e-5, atol=2e-5)


def test_what_cannot_be_regenerated_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="KnownSource writes no responses"):
        generate(
            random_documents([3]), tmp_path / "a", KnownSource(), regenerate=RegenerateSettings()
        )
    learnable = Documents([(torch.tensor([1, 2]), torch.tensor([True, True]))])
    with pytest.raises(ValueError, match="document 0 begins with a learnable token"):
        generate(learnable, tmp_path / "a", KnownWriter(), regenerate=RegenerateSettings())
    assert not (tmp_path / "a").exists()


def test_wrong_input_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="has 0 documents"):
        generate(Documents([]), tmp_path, KnownSource())
    with pytest.raises(ValueError, match="3 documents, 1 of them without a token"):
        generate(random_documents([2, 0, 3]), tmp_path, KnownSource())
    with pytest.raises(ValueError, match=r"batch_tokens is 0 .* expected 1 or more"):
        generate(random_documents([2]), tmp_path, KnownSource(), batch_tokens=0)
    with pytest.raises(ValueError, match="max_shard_tokens 0; expected 1 or more"):
        generate(random_documents([2]), tmp_path, KnownSource(), max_shard_tokens=0)


def test_work_that_does_not_fit_is_refused_before_it_begins(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = random_documents([50_000, 50_000])
    needed = 100_000 * (len(LAYERS) * HIDDEN * 2 + 5)
    set_free(monkeypatch, needed + needed // 200)
    source = KnownSource()
    with pytest.raises(DiskSpaceError) as caught:
        generate(documents, tmp_path / "s", source)
    message = str(caught.value)
    assert re.search(r"2 documents \(100000 tokens\) need 4\.1 MB", message)
    assert "4.1 MB free; free some space" in message
    assert "\n" not in message
    assert caught.value.errno == errno.ENOSPC
    assert isinstance(caught.value, OSError)
    assert source.seen == []
    assert not (tmp_path / "s").exists()
    set_free(monkeypatch, needed + needed // 50 + (64 << 20))
    progress = Recorder()
    generate(documents, tmp_path / "s", source, progress=progress)
    assert progress.messages == ["the hidden states of 2 documents take 4.1 MB; 71.3 MB are free"]
    progress = Recorder()
    generate(documents, tmp_path / "int8", source, progress=progress, store_dtype="int8")
    assert progress.messages == ["the hidden states of 2 documents take 3.5 MB; 71.3 MB are free"]


def test_only_what_is_left_must_fit(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = random_documents([1000] * 10)
    with pytest.raises(RuntimeError):
        generate(documents, tmp_path, KnownSource(fail_at=9), max_shard_tokens=1000)
    set_free(monkeypatch, (64 << 20) + 50_000)  # a document takes 41 kB
    assert generate(documents, tmp_path, KnownSource()).reused_documents == 9
    with pytest.raises(DiskSpaceError):  # ten documents, at twice the size
        generate(documents, tmp_path / "new", KnownSource(), store_dtype="float32")
    set_free(monkeypatch, 64 << 20)
    with pytest.raises(DiskSpaceError):  # what the stale store frees is not enough
        generate(documents, tmp_path, KnownSource(), store_dtype="float32", overwrite=True)
    assert len(HiddenStateStore.open(tmp_path)) == 10
    fewer = Documents(documents.rows[:9], "fewer")
    generate(fewer, tmp_path, KnownSource(), overwrite=True)
    assert len(HiddenStateStore.open(tmp_path)) == 9
    assert list(files(tmp_path)) == ["index.json", "shard-00000.safetensors"]


def test_the_time_is_measured_first(tmp_path: pathlib.Path) -> None:
    documents, progress, source = random_documents([4] * 8), Recorder(), KnownWriter()
    settings = RegenerateSettings(max_new_tokens=2)
    generate(documents, tmp_path, source, regenerate=settings, batch_tokens=1, progress=progress)
    assert [message.split()[0] for message in progress.messages] == ["the", "this"]
    assert "take at most" in progress.messages[0]
    assert re.fullmatch(r"this takes about \d+ s", progress.messages[1])
    assert len(source.calls) == 8  # the response that was measured is not written twice
    assert len(source.seen) == 8 + 2


@pytest.mark.parametrize("after", range(17))
def test_a_disk_that_becomes_full_leaves_whole_shards(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    documents = random_documents(LENGTHS)
    generate(documents, tmp_path / "whole", KnownSource(), **OPTIONS)
    with monkeypatch.context() as patch:
        fsync, calls = os.fsync, itertools.count()

        def full(descriptor: int) -> None:
            if next(calls) == after:
                raise OSError(errno.EDQUOT if after % 2 else errno.ENOSPC, "the disk is full")
            fsync(descriptor)

        patch.setattr(os, "fsync", full)
        with pytest.raises(DiskSpaceError, match="keeps its whole shards; free some") as caught:
            generate(documents, tmp_path / "part", KnownSource(), **OPTIONS)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "part") in str(caught.value)
    part, whole = files(tmp_path / "part"), files(tmp_path / "whole")
    assert set(part) <= set(whole)  # nothing half-written under another name
    assert all(part[name] == whole[name] for name in part if name != "index.json")
    report = generate(documents, tmp_path / "part", KnownSource(), **OPTIONS)
    assert report.reused_documents > 0 or after < 8  # to write a file takes two fsyncs
    assert files(tmp_path / "part") == whole


def test_a_source_that_fills_a_disk_and_other_errors(tmp_path: pathlib.Path) -> None:
    source = KnownSource(fail_at=6, error=OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(DiskSpaceError, match=r"No space left on device: .*whole shards"):
        generate(random_documents(LENGTHS), tmp_path / "a", source, **OPTIONS)
    source = KnownSource(fail_at=6, error=PermissionError(errno.EACCES, "not allowed"))
    with pytest.raises(PermissionError, match="not allowed"):
        generate(random_documents(LENGTHS), tmp_path / "b", source, **OPTIONS)
    with pytest.raises(DiskSpaceError, match=r"^the first$"), full_disk("the second"):
        raise DiskSpaceError("the first")


def test_free_space_is_asked_where_the_folder_will_be(tmp_path: pathlib.Path) -> None:
    free = check_free(tmp_path / "not" / "yet", 1, "a byte", "no advice")
    assert abs(free - shutil.disk_usage(tmp_path).free) < 1 << 30


def test_sizes_for_people() -> None:
    sizes = [0, 999, 1500, 123_456, 2_000_000, 5 * 10**9, 7 * 10**12, 10**16]
    assert [readable_bytes(size) for size in sizes] == [
        "0 bytes",
        "999 bytes",
        "1.5 kB",
        "123 kB",
        "2.0 MB",
        "5.0 GB",
        "7.0 TB",
        "10000.0 TB",
    ]


def test_another_order_is_not_continued(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = random_documents(LENGTHS)
    with pytest.raises(RuntimeError):
        generate(documents, tmp_path, KnownSource(fail_at=5), **OPTIONS)
    monkeypatch.setattr(ordering.processing_order, "__defaults__", (2,))
    with pytest.raises(ValueError, match="lists documents in another order"):
        generate(documents, tmp_path, KnownSource(), **OPTIONS)
