"""``--generate.source=vllm`` without vLLM: order, failures that pass, failures that do not."""

import contextlib
import json
import os
import pathlib
import stat
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.vllm import fake_server as fake
from torch import Tensor

from speculators.cli.job import vllm_options
from speculators.cli.recipe import parse_flags, read_recipe
from speculators.data.generate import generate
from speculators.data.records import Tokens, read_records
from speculators.data.regenerate import RegenerateSettings
from speculators.data.sources import make_source
from speculators.data.store import HiddenStateStore
from speculators.integrations.vllm.hidden_states import source as source_module
from speculators.integrations.vllm.hidden_states.client import (
    HiddenStatesError,
    HiddenStatesServer,
    Patience,
)
from speculators.integrations.vllm.hidden_states.comparison import (
    DifferentStatesError,
    Tolerance,
    check_states,
    compare_states,
)
from speculators.integrations.vllm.hidden_states.files import (
    FilesSource,
    write_rows,
)
from speculators.integrations.vllm.hidden_states.source import (
    VllmOptions,
    VllmSource,
    make_vllm_source,
    server_command,
)
from speculators.integrations.vllm.serving import server
from speculators.integrations.vllm.serving.client import AnswerError
from speculators.integrations.vllm.serving.server import ServerError, running_server

LAYERS = (0, 2, 5)
FAKE = pathlib.Path(fake.__file__)
DOCUMENTS = [torch.arange(1, n + 1) for n in (9, 8, 8, 7, 6, 5, 3, 2, 1)]
QUICK = Patience(attempts=4, first_pause=0.02, answer_seconds=10, file_seconds=0.2)


def total(document: Tensor) -> str:
    return str(int(document.sum()))


class Reference:
    """The verifier whose states the fake server gives."""

    layer_ids: tuple[int, ...] = LAYERS
    hidden_size = fake.HIDDEN
    verifier = "small"
    identity: Mapping[str, Any] = {"weights": "abc"}

    def __init__(self) -> None:
        self.asked = 0

    def hidden_states(  # noqa: D102 - the protocol's
        self, documents: Sequence[Tensor], batch_tokens: int
    ) -> Iterator[dict[int, Tensor]]:
        del batch_tokens
        for document in documents:
            self.asked += 1
            yield expected(document)


def expected(document: Tensor) -> dict[int, Tensor]:
    return {k: torch.from_numpy(fake.states(document.tolist(), k)) for k in LAYERS}


class Prepared:
    """Documents as ``prepare`` leaves them."""

    content_hash = "prepared"

    @property
    def lengths(self) -> Tensor:  # noqa: D102 - the protocol's
        return torch.tensor([len(document) for document in DOCUMENTS])

    def __len__(self) -> int:
        return len(DOCUMENTS)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        document = DOCUMENTS[number]
        return document, torch.arange(len(document)) > 0


@pytest.fixture
def python(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A "Python with vLLM" that runs the fake server, whatever it is told to run."""
    script = tmp_path / "python"
    # The real one is not asked to serve: -P -m MODULE serve VERIFIER are dropped.
    path = os.pathsep.join(filter(None, sys.path))
    script.write_text(
        f'#!/bin/sh\nshift 5\nPYTHONPATH="{path}" exec "{sys.executable}" "{FAKE}" "$@"\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "asked"))
    monkeypatch.setattr(server, "_POLL_SECONDS", 0.02)
    return script


@pytest.fixture
def source(
    python: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., VllmSource]]:
    """Makes sources with servers that fail by a plan."""
    with contextlib.ExitStack() as stack:

        def make(plan: Mapping[str, list[str]] | None = None, **changes: Any) -> VllmSource:
            monkeypatch.setenv("FAKE_PLAN", json.dumps(plan or {}))
            report = changes.pop("report", None)
            options = VllmOptions(
                python=python, storage=tmp_path / "storage", patience=QUICK, **changes
            )
            return stack.enter_context(
                VllmSource("small", Reference(), dtype="float32", options=options, report=report)
            )

        yield make


def asked(tmp_path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "asked").read_text().splitlines()]


def check(found: Sequence[Mapping[int, Tensor]], documents: Sequence[Tensor]) -> None:
    assert len(found) == len(documents)
    for states, document in zip(found, documents, strict=True):
        assert list(states) == list(LAYERS)
        for k, wanted in expected(document).items():
            assert torch.equal(states[k], wanted)


def test_states_come_in_order_from_few_requests_at_a_time(
    source: Callable[..., VllmSource], tmp_path: pathlib.Path
) -> None:
    made = source(max_requests=3)
    check(list(made.hidden_states(DOCUMENTS, 10)), DOCUMENTS)
    check(list(made.hidden_states(DOCUMENTS[::-1], 10)), DOCUMENTS[::-1])
    requests = asked(tmp_path)
    assert max(request["running"] for request in requests) == 3
    assert all(request["max_tokens"] == 1 for request in requests)
    # Nothing kept of one document is used for another, nor for itself.
    assert len({request["cache_salt"] for request in requests}) == len(requests)
    # Files are gone once they are read.
    assert list((tmp_path / "storage").glob("*/states/*")) == []
    made.close()
    assert list((tmp_path / "storage").iterdir()) == []


def test_nothing_starts_before_it_is_asked_for(
    source: Callable[..., VllmSource], tmp_path: pathlib.Path
) -> None:
    made = source()
    assert made.layer_ids == LAYERS
    assert made.hidden_size == fake.HIDDEN
    assert made.identity == {"weights": "abc", "computed_by": "vllm"}
    made.close()
    assert not (tmp_path / "storage").exists()


def test_few_documents_are_worked_on_ahead_of_the_consumer(
    source: Callable[..., VllmSource], tmp_path: pathlib.Path
) -> None:
    made = source(max_requests=2)
    list(made.hidden_states(DOCUMENTS[:1], 10))  # compared
    states = made.hidden_states(DOCUMENTS, 10)
    next(states)
    states.close()  # type: ignore[attr-defined]
    assert len(asked(tmp_path)) <= 1 + 1 + 2


@pytest.mark.parametrize(
    "fault",
    ["503", "429", "hang up", "corrupt", "no file", "no write", "other tokens", "short"],
)
def test_what_may_pass_is_tried_again(fault: str, source: Callable[..., VllmSource]) -> None:
    plan = {total(DOCUMENTS[1]): [fault], total(DOCUMENTS[4]): [fault, fault, fault]}
    check(list(source(plan).hidden_states(DOCUMENTS, 10)), DOCUMENTS)


def test_what_does_not_pass_ends_the_run_with_its_reason(
    source: Callable[..., VllmSource],
) -> None:
    for fault, message in (
        ("503", r"refuses \(503\): .*not now.*tried 4 times"),
        ("corrupt", "safetensors cannot be read: .*tried 4 times"),
        ("no file", "is not there; a server on another machine"),
        ("no write", "could not write .*OSError: the disk is full"),
        ("other tokens", "states of other tokens"),
        ("short", r"has .*'hidden_states': \[5, 3, 8\].*; expected hidden_states \[6, 3, 8\]"),
    ):
        made = source({total(DOCUMENTS[4]): [fault] * 4})
        with pytest.raises(HiddenStatesError, match=message) as raised:
            list(made.hidden_states(DOCUMENTS, 10))
        assert "the same command goes on from there" in str(raised.value)
        made.close()


def test_a_refusal_is_not_asked_again(
    source: Callable[..., VllmSource], tmp_path: pathlib.Path
) -> None:
    made = source({total(DOCUMENTS[0]): ["400"]}, max_requests=1)
    with pytest.raises(HiddenStatesError, match=r"refuses \(400\): .*not now"):
        list(made.hidden_states(DOCUMENTS, 10))
    assert len(asked(tmp_path)) == 1


@pytest.mark.parametrize("fault", ["stock connector", "other layers"])
def test_a_server_started_in_another_way_is_told_how(
    fault: str, source: Callable[..., VllmSource]
) -> None:
    with pytest.raises(HiddenStatesError) as raised:
        list(source({"*": [fault] * 40}).hidden_states(DOCUMENTS, 10))
    text = str(raised.value)
    found = "gives no hidden states" if fault == "stock connector" else "'layer_ids': [1]"
    assert found in text
    assert '"eagle_aux_hidden_state_layer_ids": [0, 2, 5]' in text
    assert (
        '"kv_connector_module_path": "speculators.integrations.vllm.hidden_states.connector"'
        in text
    )
    assert "tried" not in text


def test_a_server_that_dies_leaves_whole_shards_and_its_last_words(
    source: Callable[..., VllmSource], tmp_path: pathlib.Path
) -> None:
    store = tmp_path / "store"
    made = source({total(DOCUMENTS[6]): ["die"]}, max_requests=2)
    with pytest.raises(
        HiddenStatesError,
        match=r"(?s)was the worker hit an exception. RuntimeError: out of memory; .*is dead",
    ):
        generate(Prepared(), store, made, max_shard_tokens=10, store_dtype="float32")
    made.__exit__(None, None, None)
    done = json.loads((store / "index.json").read_text())
    assert not done["complete"]
    assert 0 < len(done["shards"]) < 7
    # Another server goes on, and the store is that of a run that was not stopped.
    report = generate(Prepared(), store, source(), max_shard_tokens=10, store_dtype="float32")
    assert report.reused_documents == sum(len(shard["documents"]) for shard in done["shards"])
    whole = tmp_path / "whole"
    generate(Prepared(), whole, source(), max_shard_tokens=10, store_dtype="float32")
    files = sorted(path.name for path in whole.iterdir())
    assert files == sorted(path.name for path in store.iterdir())
    for name in files:
        assert (whole / name).read_bytes() == (store / name).read_bytes()
    opened = HiddenStateStore.open(store)
    check([opened[number].hidden_states for number in range(len(DOCUMENTS))], DOCUMENTS)


def test_the_log_of_a_server_that_failed_stays(
    source: Callable[..., VllmSource], tmp_path: pathlib.Path
) -> None:
    made = source({"*": ["die"]})
    with pytest.raises(HiddenStatesError) as raised, made:
        list(made.hidden_states(DOCUMENTS, 10))
    (log,) = (tmp_path / "storage").glob("*/server.log")
    assert str(log) in str(raised.value)
    assert "the engine is dead" in log.read_text()
    assert not (log.parent / "states").exists()


def test_a_server_that_does_not_start_says_why(
    source: Callable[..., VllmSource], python: pathlib.Path
) -> None:
    python.write_text("#!/bin/sh\necho no module named vllm\nexit 1\n")
    with pytest.raises(ServerError, match=r"(?s)with status 1.*no module named vllm.*must have"):
        list(source().hidden_states(DOCUMENTS, 10))
    python.unlink()
    with pytest.raises(ServerError, match=r"(?s)No such file.*choose another one with generate"):
        list(source().hidden_states(DOCUMENTS, 10))


def test_a_server_that_does_not_start_leaves_the_old_store(
    source: Callable[..., VllmSource], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    old = generate(Prepared(), store, source(), store_dtype="bfloat16")
    before = {path.name: path.read_bytes() for path in store.iterdir()}
    other = Prepared()
    other.content_hash = "prepared otherwise"
    monkeypatch.setenv("FAKE_START", "fails")
    with pytest.raises(ServerError, match="no memory left"):
        generate(other, store, source(), store_dtype="bfloat16", overwrite=True)
    monkeypatch.delenv("FAKE_START")
    wrong = source({"*": ["off by one"] * 40})
    with pytest.raises(DifferentStatesError):  # nor does one with another verifier
        generate(other, store, wrong, store_dtype="bfloat16", overwrite=True)
    assert {path.name: path.read_bytes() for path in store.iterdir()} == before
    new = generate(other, store, source(), store_dtype="bfloat16", overwrite=True)
    assert HiddenStateStore.open(store).content_hash == new.content_hash != old.content_hash


def test_a_complete_store_needs_no_server(
    source: Callable[..., VllmSource], python: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    generate(Prepared(), tmp_path / "store", source())
    python.write_text("#!/bin/sh\nexit 1\n")
    assert generate(Prepared(), tmp_path / "store", source()).reused_documents == len(DOCUMENTS)


def test_a_running_server_is_asked_and_left_alone(
    python: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    options = VllmOptions(python=python)
    command = server_command("small", LAYERS, "float32", str(tmp_path), options)
    with running_server(command, tmp_path / "log", timeout=30) as endpoint:
        for address in (endpoint, f"{endpoint}/v1"):
            used = VllmOptions(endpoint=address, patience=QUICK)
            with VllmSource("small", Reference(), dtype="float32", options=used) as made:
                check(list(made.hidden_states(DOCUMENTS, 10)), DOCUMENTS)
        # It computes in another dtype than the verifier that it is compared with.
        with (
            VllmSource("small", Reference(), dtype="bfloat16", options=used) as other,
            pytest.raises(HiddenStatesError, match=r"'dtype': 'float32'.*expected .*'bfloat16'"),
        ):
            list(other.hidden_states(DOCUMENTS, 10))
    with (
        VllmSource("small", Reference(), dtype="float32", options=used) as gone,
        pytest.raises(HiddenStatesError, match=r"does not answer .*tried 4 times"),
    ):
        list(gone.hidden_states(DOCUMENTS, 10))


def test_the_first_documents_of_a_run_are_compared_once(
    source: Callable[..., VllmSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "_COMPARED_TOKENS", 20)
    lines: list[str] = []
    made = source(report=lines.append)
    list(made.hidden_states(DOCUMENTS, 10))
    assert lines[0] == "vLLM beside transformers, 2 documents, 17 tokens:"
    assert lines[1].startswith("  stream 0: cosine 1.000000 (95 % of the tokens at least 1.000000")
    assert len(lines) == 1 + len(LAYERS)
    list(made.hidden_states(DOCUMENTS, 10))
    assert len(lines) == 1 + len(LAYERS)


def test_states_of_the_wrong_layer_end_the_run_before_a_shard(
    source: Callable[..., VllmSource], tmp_path: pathlib.Path
) -> None:
    made = source({"*": ["off by one"] * 40})
    with pytest.raises(DifferentStatesError, match=r"not those of transformers(.|\n)*stream 2"):
        generate(Prepared(), tmp_path / "store", made)
    assert list((tmp_path / "store").glob("shard-*")) == []


def test_the_tolerance_tells_rounding_from_mistakes() -> None:
    generator = torch.Generator().manual_seed(0)
    stream = torch.randn(200, 64, generator=generator, dtype=torch.float64)
    stream[:, 3] *= 30  # as in real models, one channel is far larger

    def within(found: Tensor) -> bool:
        (difference,) = compare_states([{1: found}], [{1: stream}])
        return difference.within(Tolerance())

    assert within(stream.bfloat16())
    noise = torch.randn(stream.shape, generator=generator, dtype=torch.float64)
    assert within(stream * (1 + 0.01 * noise))
    few = stream.clone()
    few[:9] = few[:9].bfloat16() * 1.04 + 0.5 * noise[:9]  # a router chose otherwise
    assert within(few)
    assert not within(stream + 0.3 * noise)
    assert not within(stream.roll(1, 0))
    shifted = stream.clone()
    shifted[:20] = noise[:20]  # the tokens of a prefix
    assert not within(shifted)
    assert not within(stream * 1.1)  # a norm, or a scale
    assert not within(torch.full_like(stream, torch.nan))


def test_tolerances_are_settings(source: Callable[..., VllmSource]) -> None:
    wide = Tolerance(cosine=-1.0, max_difference=2.0)
    made = source({"*": ["off by one"] * 40}, tolerance=wide)
    assert len(list(made.hidden_states(DOCUMENTS, 10))) == len(DOCUMENTS)
    difference = compare_states([{0: torch.ones(3, 2)}], [{0: -torch.ones(3, 2)}])
    with pytest.raises(DifferentStatesError, match=r"stream 0: cosine -1\.0"):
        check_states(difference, Tolerance(), "a server")


def test_responses_come_in_order_with_seeds_of_their_own(
    source: Callable[..., VllmSource], tmp_path: pathlib.Path
) -> None:
    settings = RegenerateSettings(temperature=0.5, top_p=0.9, max_new_tokens=4)
    made = source({total(DOCUMENTS[2]): ["503"]})
    found = made.write_responses(DOCUMENTS, settings, 1)
    assert [response.tolist() for response in found] == [
        fake.tokens(document.tolist(), 4) for document in DOCUMENTS
    ]
    requests = asked(tmp_path)
    assert all(request["temperature"] == 0.5 and request["top_p"] == 0.9 for request in requests)
    assert not any("kv_transfer_params" in request for request in requests)
    assert len({request["seed"] for request in requests}) == len(DOCUMENTS)
    assert len(requests) == len(DOCUMENTS) + 1  # the one that was busy has the same seed again
    made.write_responses(DOCUMENTS, settings, 1)
    assert {request["seed"] for request in asked(tmp_path)} == {r["seed"] for r in requests}
    made.write_responses(DOCUMENTS[:1], RegenerateSettings(max_new_tokens=4), 1)
    assert "seed" not in asked(tmp_path)[-1]


def test_wrong_options_are_refused() -> None:
    for flags, message in (
        (["--port=1"], "--port=1: the servers listen"),
        (["--kv-transfer-config={}"], "generate sets it itself"),
        (["--speculative_config.method=x"], "generate sets it itself"),
    ):
        with pytest.raises(ValueError, match=message):
            VllmOptions(flags=flags)
    with pytest.raises(ValueError, match="max_requests is 0"):
        VllmOptions(max_requests=0)
    with pytest.raises(AnswerError, match="no server's address"):
        HiddenStatesServer("localhost:8000", LAYERS, 8, "float32", command="")


def test_the_source_is_found_by_its_name() -> None:
    assert make_vllm_source is source_module.make_vllm_source
    with pytest.raises(TypeError, match="no_such_option"):
        make_source("vllm", "model", LAYERS, reference=None, no_such_option=1)


# ---- files of other programs


def write_files(folder: pathlib.Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """As vLLM's stock connector does; the documents in another order, one more among them."""
    folder.mkdir()
    for number, document in enumerate([torch.tensor([50, 51]), *DOCUMENTS[::-1]]):
        states = torch.stack(list(expected(document).values()), dim=1)
        tensors = {"hidden_states": states.to(dtype), "token_ids": document}
        save_file(tensors, folder / f"hs_{number}.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float32])
def test_files_are_found_by_their_tokens(dtype: torch.dtype, tmp_path: pathlib.Path) -> None:
    write_files(tmp_path / "files", dtype)
    lines: list[str] = []
    made = FilesSource(tmp_path / "files", Reference(), report=lines.append)
    found = list(made.hidden_states(DOCUMENTS, 10)) + list(made.hidden_states(DOCUMENTS, 10))
    for states, document in zip(found, DOCUMENTS * 2, strict=True):
        for k, wanted in expected(document).items():
            assert torch.equal(states[k].float(), wanted.to(dtype).float())
    assert len(lines) == len(LAYERS)
    assert made.identity["weights"] == "abc"
    assert made.identity["computed_by"] == "files"


def test_files_of_other_streams_or_rows_are_refused(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "files"
    with pytest.raises(ValueError, match=r"has no hs_\*\.safetensors"):
        FilesSource(folder, Reference())
    write_files(folder)
    made = FilesSource(folder, Reference())
    with pytest.raises(ValueError, match="no file for a document of 2 tokens that begins with"):
        list(made.hidden_states([torch.tensor([50, 52])], 10))
    other = Reference()
    other.layer_ids = (0, 2)
    with pytest.raises(ValueError, match=r"hidden states \[9, 3, 8\]; expected \[9, 2, 8\], the"):
        list(FilesSource(folder, other).hidden_states(DOCUMENTS, 10))
    last = folder / f"hs_{len(DOCUMENTS)}.safetensors"
    content = load_file(last)
    save_file(content | {"hidden_states": content["hidden_states"].flip(1)}, last)
    with pytest.raises(DifferentStatesError, match=r"(?s)files gives hidden states.*stream 0"):
        list(FilesSource(folder, Reference()).hidden_states(DOCUMENTS, 10))
    save_file(content | {"scale": torch.ones(1)}, last)
    with pytest.raises(ValueError, match=r"holds \['hidden_states', 'scale', 'token_ids'\]"):
        FilesSource(folder, Reference())
    last.write_bytes(b"cut")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        FilesSource(folder, Reference())


def test_rows_of_files_are_those_that_prepare_reads(tmp_path: pathlib.Path) -> None:
    write_files(tmp_path / "files")
    first = tmp_path / "files" / "hs_0.safetensors"
    save_file(load_file(first) | {"loss_mask": torch.tensor([0, 1])}, first)
    assert write_rows(tmp_path / "files", tmp_path / "rows.jsonl") == len(DOCUMENTS) + 1
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert rows[0] == {"input_ids": [50, 51], "loss_mask": [0, 1]}
    assert rows[1:] == [{"input_ids": document.tolist()} for document in DOCUMENTS[::-1]]
    records = list(read_records(tmp_path / "rows.jsonl"))
    found = [
        (record.input_ids, record.loss_mask) for record in records if isinstance(record, Tokens)
    ]
    assert found[0] == ([50, 51], [False, True])
    assert found[1:] == [(ids.tolist(), [True] * len(ids)) for ids in DOCUMENTS[::-1]]


# ---- the main job


def test_the_recipe_says_how_vllm_is_used() -> None:
    flags = parse_flags(
        [
            "--generate.source=vllm",
            "--generate.vllm.endpoint=http://host:1",
            "--generate.vllm.max-requests=3",
            "--generate.vllm.flags=[--tensor-parallel-size=2]",
            "--generate.vllm.cosine=0.9",
            "--verifier.revision=v2",
            "--generate.regenerate=true",
            "--generate.max-new-tokens=7",
        ]
    )
    made = vllm_options(read_recipe(None, flags), 100)
    assert made.endpoint == "http://host:1"
    assert (made.max_requests, made.max_model_len, made.eager) == (3, 108, False)
    assert list(made.flags) == ["--revision=v2", "--tensor-parallel-size=2"]
    assert made.tolerance == Tolerance(cosine=0.9)
    made = vllm_options(read_recipe(None, {}), 100)
    assert (made.max_model_len, made.eager) == (101, True)
    command = server_command("m", LAYERS, "bfloat16", "/s", made)
    assert command.changes == {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}
    assert "--enforce-eager" in command.words
    assert "--no-enable-prefix-caching" in command.words
