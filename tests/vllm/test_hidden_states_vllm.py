"""Hidden states from real vLLM servers: those of transformers, whole, and the same when resumed."""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.vllm.trained_drafts import SIZES, VOCABULARY, make_verifier
from torch import Tensor

from speculators.data.generate import generate
from speculators.data.regenerate import RegenerateSettings, write_responses
from speculators.data.sources import TransformersSource
from speculators.data.store import HiddenStateStore
from speculators.integrations.vllm.hidden_states.comparison import (
    DifferentStatesError,
    Tolerance,
    compare_states,
)
from speculators.integrations.vllm.hidden_states.source import (
    VllmOptions,
    VllmSource,
    make_vllm_source,
    server_command,
)
from speculators.integrations.vllm.serving.server import running_server
from speculators.models.verifier import Verifier

TINY = pathlib.Path("examples/tiny_verifier/model").absolute()
# Shorter than most documents: vLLM reads them in chunks.
CHUNK = 64
LONGEST = 300


def documents(vocabulary: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = (LONGEST, 200, 130, CHUNK + 1, CHUNK, 33, 17, 16, 15, 2, 1)
    found = [torch.randint(3, vocabulary, (n,), generator=generator) for n in lengths]
    found[2][:100] = found[1][:100]  # a prefix that could be kept
    return found


def options(*flags: str, **changes: Any) -> VllmOptions:
    limit = f"--max-num-batched-tokens={CHUNK}"
    values: dict[str, Any] = {"max_requests": 4, "max_model_len": LONGEST + 1}
    return VllmOptions(flags=[limit, *flags], start_timeout=240, **(values | changes))


class Prepared:
    """Documents as ``prepare`` leaves them."""

    def __init__(self, rows: list[Tensor]) -> None:
        self.content_hash, self._rows = "prepared", rows

    @property
    def lengths(self) -> Tensor:
        """Tokens of each."""
        return torch.tensor([len(row) for row in self._rows])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        return self._rows[number], torch.ones(len(self._rows[number]), dtype=torch.bool)


class StoppedError(RuntimeError):
    """In the place of a user's Ctrl-C."""


def stopped_after(source: VllmSource, count: int) -> VllmSource:
    """The source, which fails when it has given the states of so many documents."""
    given, original = 0, source.hidden_states

    def hidden_states(rows: Any, batch_tokens: int) -> Iterator[dict[int, Tensor]]:
        nonlocal given
        for states in original(rows, batch_tokens):
            given += 1
            if given > count:
                raise StoppedError
            yield states

    source.hidden_states = hidden_states  # type: ignore[assignment,method-assign]
    return source


def test_the_tiny_verifier(tmp_path: pathlib.Path) -> None:
    """In bfloat16: streams 0 to n, documents of many lengths, a run that was stopped."""
    verifier = Verifier.from_pretrained(TINY, dtype=torch.bfloat16)
    n = verifier.num_layers
    reference = TransformersSource(verifier, (0, 1, n // 2, n - 1, n))
    rows = documents(verifier.vocab_size)
    lines: list[str] = []
    storage = tmp_path / "storage"
    made = make_vllm_source(
        TINY,
        reference.layer_ids,
        reference=reference,
        options=options(storage=storage),
        report=lines.append,
    )
    with made as source:
        found = list(source.hidden_states(rows, 1000))
        expected = list(reference.hidden_states(rows, 1000))
        for one, other, row in zip(found, expected, rows, strict=True):
            for difference in compare_states([one], [other]):
                assert one[difference.layer_id].shape == (len(row), source.hidden_size)
                assert one[difference.layer_id].dtype == torch.bfloat16
                assert difference.within(Tolerance()), str(difference)
                # The embedding is looked up, not computed.
                assert difference.layer_id or difference.max_difference == 0
        assert len(lines) == 1 + len(reference.layer_ids)

        whole, parts = tmp_path / "whole", tmp_path / "parts"
        generate(Prepared(rows), whole, source, max_shard_tokens=150)
        assert not list(storage.glob("*/states/*"))
        with pytest.raises(StoppedError):
            generate(Prepared(rows), parts, stopped_after(source, 4), max_shard_tokens=150)
    with make_vllm_source(
        TINY, reference.layer_ids, reference=reference, options=options(storage=storage)
    ) as second:
        report = generate(Prepared(rows), parts, second, max_shard_tokens=150)
    assert 0 < report.reused_documents < len(rows)
    stores = HiddenStateStore.open(whole), HiddenStateStore.open(parts)
    assert stores[0].content_hash == stores[1].content_hash
    assert stores[0].index.stored == stores[1].index.stored
    for number in range(len(rows)):
        one, other = (store[number].hidden_states for store in stores)
        for difference in compare_states([one], [other]):
            # How requests are batched may change the last bit.
            assert difference.within(Tolerance(0.9999, 0.02)), str(difference)


@dataclasses.dataclass(frozen=True)
class Served:
    """A verifier in transformers, and in a server that runs by itself; all streams of both."""

    directory: pathlib.Path
    reference: TransformersSource
    options: VllmOptions


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A random verifier in float32, of another family, without a tokenizer.

    Kept prefixes would be used, were it not for the salts. Documents may fill all its positions.
    """
    directory = tmp_path_factory.mktemp("small")
    made = make_verifier("qwen3", directory / "verifier")
    loaded = Verifier.from_pretrained(directory / "verifier", dtype=torch.float32)
    reference = TransformersSource(loaded, range(made.num_layers + 1))
    (directory / "states").mkdir()
    started = options(
        "--enable-prefix-caching",
        "--skip-tokenizer-init",
        max_model_len=SIZES["max_position_embeddings"] + 1,
    )
    command = server_command(
        str(directory / "verifier"),
        reference.layer_ids,
        "float32",
        str(directory / "states"),
        started,
    )
    with running_server(command, directory / "log", timeout=240) as endpoint:
        asked = dataclasses.replace(
            started, endpoint=endpoint, storage=directory / "states", flags=()
        )
        yield Served(directory / "verifier", reference, asked)


def test_float32_and_responses(served: Served) -> None:
    """All streams of another family to seven digits, and its greedy responses token for token."""
    rows, reference = documents(VOCABULARY), served.reference
    full = torch.arange(SIZES["max_position_embeddings"]) % VOCABULARY
    with make_vllm_source(
        served.directory, reference.layer_ids, reference=reference, options=served.options
    ) as source:
        for _ in range(2):  # the second time everything could come from the cache
            found = list(source.hidden_states([full, *rows], 1000))
            expected = list(reference.hidden_states([full, *rows], 1000))
            for difference in compare_states(found, expected):
                assert difference.cosine > 1 - 1e-6, str(difference)
                assert difference.max_difference < 1e-4 * difference.largest, str(difference)
        settings = RegenerateSettings(max_new_tokens=24)
        greedy = source.write_responses(rows, settings, 0)
        wanted = write_responses(reference.model, rows, settings, 0)
        assert [response.tolist() for response in greedy] == [r.tolist() for r in wanted]
        assert list(source.hidden_states(rows[:1], 1000))  # and states again


def test_another_model_is_found_out(served: Served) -> None:
    loaded = Verifier.from_pretrained(served.directory, dtype=torch.float32)
    with torch.no_grad():
        for parameter in loaded.model.model.layers[1].mlp.parameters():
            parameter.mul_(1.5)
    reference = TransformersSource(loaded, served.reference.layer_ids)
    with (
        make_vllm_source(
            served.directory, reference.layer_ids, reference=reference, options=served.options
        ) as source,
        pytest.raises(DifferentStatesError) as raised,
    ):
        list(source.hidden_states(documents(VOCABULARY), 1000))
    assert "stream 1:" not in str(raised.value)
    assert "stream 2:" in str(raised.value)
    assert "stream 4:" in str(raised.value)
