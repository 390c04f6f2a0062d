"""The stage `prepare`, from rows in files to the dataset on disk."""

import json
import pathlib
import re
import shutil
from typing import Any

import datasets
import pytest
import tests.data.templates as families
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from speculators.data import parts, records
from speculators.data import prepare as stage
from speculators.data.artifact import StaleArtifactError, hash_tokenizer
from speculators.data.chat import ChatTemplateError, render
from speculators.data.prepare import MalformedDataError, prepare
from speculators.data.prepared import PreparedDataset, token_counts

TINY = pathlib.Path("examples/tiny_verifier/model")
QUESTION = {"role": "user", "content": "What is a list?"}
ANSWER = {"role": "assistant", "content": "A list holds values, in an order that you choose."}
TWO_TURNS = [QUESTION, ANSWER, {"role": "user", "content": "Thanks"}, ANSWER]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(TINY)
    return loaded


def write(path: pathlib.Path, rows: list[Any]) -> pathlib.Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


ROWS: list[Any] = [
    {"messages": [QUESTION, ANSWER]},
    "{broken",
    {"messages": TWO_TURNS},
    {"messages": [{"role": "narrator", "content": "x"}]},
    {"text": "def f():\n    return 1\n"},
    {"input_ids": [7, 8, 9, 10], "loss_mask": [0, 0, 1, 1]},
    {"input_ids": [7, 4096]},
    {"messages": [QUESTION]},
    {"messages": [{"role": "narrator", "content": "y"}]},
]


@pytest.fixture
def data(tmp_path: pathlib.Path) -> pathlib.Path:
    return write(tmp_path / "rows.jsonl", ROWS)


def test_what_is_written_is_what_was_read(
    tokenizer: PreTrainedTokenizerBase, data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    report = prepare(data, tmp_path / "out", tokenizer, max_length=128)
    text = tokenizer(ROWS[4]["text"])["input_ids"]
    expected = [
        render(tokenizer, [QUESTION, ANSWER]),
        render(tokenizer, TWO_TURNS),
        (text, [True] * len(text)),
        ([7, 8, 9, 10], [False, False, True, True]),
        render(tokenizer, [QUESTION]),
    ]
    dataset = PreparedDataset.open(tmp_path / "out")
    assert len(dataset) == 5
    for (input_ids, loss_mask), (ids, mask) in zip(dataset, expected, strict=True):
        assert (input_ids.dtype, loss_mask.dtype) == (torch.int64, torch.bool)
        assert (input_ids.tolist(), loss_mask.tolist()) == (ids, mask)
    assert dataset.lengths.tolist() == [len(ids) for ids, _ in expected]
    assert dataset.learnable.tolist() == [sum(mask) for _, mask in expected]
    assert dataset.report == report
    assert report.tokens == sum(len(ids) for ids, _ in expected)
    assert report.learnable_tokens == sum(sum(mask) for _, mask in expected)
    assert (report.rows, report.kept, report.learnable_rows) == (9, 5, 4)
    assert report.malformed_by_kind == {
        "invalid JSON": 1,
        "unknown role": 2,
        "token id outside the vocabulary": 1,
    }
    assert [row.line for row in report.first_malformed] == [2, 4, 7, 9]
    assert report.malformed == 4
    assert not list(tmp_path.glob(".*")), "parts and temporary folders are gone"
    columns = datasets.load_from_disk(str(tmp_path / "out")).features
    assert columns["input_ids"].feature.dtype == "int32"
    assert columns["loss_mask"].feature.dtype == "bool"


@pytest.mark.parametrize("max_length", [1, 12, 20, 1000])
def test_truncation_keeps_mask_and_ids_together(
    tokenizer: PreTrainedTokenizerBase, tmp_path: pathlib.Path, max_length: int
) -> None:
    data = write(tmp_path / "rows.jsonl", [{"messages": TWO_TURNS}, {"text": "x"}])
    report = prepare(data, tmp_path / "out", tokenizer, max_length=max_length)
    ids, mask = render(tokenizer, TWO_TURNS)
    dataset = PreparedDataset.open(tmp_path / "out")
    assert dataset[0][0].tolist() == ids[:max_length]
    assert dataset[0][1].tolist() == mask[:max_length]
    assert report.truncated == int(len(ids) > max_length)
    assert report.learnable_tokens == sum(mask[:max_length]) + 1
    assert report.tokens == min(len(ids), max_length) + 1


def test_rows_with_too_few_learnable_tokens_after_truncation_are_left_out(
    tokenizer: PreTrainedTokenizerBase, tmp_path: pathlib.Path
) -> None:
    rows = [{"messages": TWO_TURNS}, {"input_ids": [5, 6, 7], "loss_mask": [1, 1, 1]}]
    start = render(tokenizer, TWO_TURNS)[1].index(True)
    data = write(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "out"
    report = prepare(data, out, tokenizer, max_length=start + 2, min_learnable=3)
    assert (report.kept, report.below_min_learnable) == (1, 1)
    assert PreparedDataset.open(out)[0][0].tolist() == [5, 6, 7]


def test_last_turn_only(tokenizer: PreTrainedTokenizerBase, tmp_path: pathlib.Path) -> None:
    data = write(tmp_path / "rows.jsonl", [{"messages": TWO_TURNS}])
    prepare(data, tmp_path / "out", tokenizer, max_length=99, last_turn_only=True)
    _, mask = PreparedDataset.open(tmp_path / "out")[0]
    assert mask.tolist() == render(tokenizer, TWO_TURNS, last_turn_only=True)[1]


def test_token_counts_are_those_of_learnable_tokens(
    tokenizer: PreTrainedTokenizerBase,
    data: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stage, "_ROWS_PER_PART", 2)  # several pieces, one of them empty
    prepare(data, tmp_path / "out", tokenizer, max_length=64)
    dataset = PreparedDataset.open(tmp_path / "out")
    expected = torch.zeros(4096, dtype=torch.int64)
    for input_ids, loss_mask in dataset:
        for token in input_ids[loss_mask].tolist():
            expected[token] += 1
    assert torch.equal(token_counts(dataset, 4096), expected)
    assert dataset.learnable.sum() == expected.sum() == dataset.report.learnable_tokens
    with pytest.raises(ValueError, match="vocabulary's size 9"):
        token_counts(dataset, 9)


def test_the_same_content_is_reused_and_other_content_is_an_error(
    tokenizer: PreTrainedTokenizerBase, data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    out = tmp_path / "out"
    first = prepare(data, out, tokenizer, max_length=64)
    written = (out / "prepare.json").stat().st_mtime_ns
    copy = shutil.copy(data, tmp_path / "copy.jsonl")
    again = prepare(copy, out, tokenizer, max_length=64)
    assert again == first.model_copy(update={"reused": True})
    assert (out / "prepare.json").stat().st_mtime_ns == written

    with pytest.raises(StaleArtifactError) as caught:
        prepare(data, out, tokenizer, max_length=32)
    hashes = re.findall(r"\b[0-9a-f]{64}\b", str(caught.value))
    other = prepare(data, tmp_path / "other", tokenizer, max_length=32)
    assert hashes == [first.content_hash, other.content_hash]
    assert PreparedDataset.open(out).content_hash == first.content_hash

    changed = prepare(data, out, tokenizer, max_length=32, overwrite=True)
    assert changed == other
    assert PreparedDataset.open(out).content_hash == other.content_hash


def test_all_that_the_result_depends_on_is_in_the_hash(
    tokenizer: PreTrainedTokenizerBase, data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    def content(**changes: Any) -> str:
        arguments: dict[str, Any] = {"data": data, "tokenizer": tokenizer, "max_length": 64}
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        return prepare(output_dir=out, **{**arguments, **changes}).content_hash

    retemplated = AutoTokenizer.from_pretrained(TINY, chat_template=families.ZEPHYR)
    grown = AutoTokenizer.from_pretrained(TINY)
    grown.add_tokens(["<new>"])
    with_eos = AutoTokenizer.from_pretrained(TINY)
    with_eos.eos_token = with_eos.pad_token
    changes: list[dict[str, Any]] = [
        {},
        {"data": write(tmp_path / "other.jsonl", ROWS[:3])},
        {"tokenizer": retemplated},
        {"tokenizer": grown},
        {"tokenizer": with_eos},
        {"max_length": 63},
        {"last_turn_only": True},
        {"min_learnable": 1},
        {"num_samples": 3},
        {"num_samples": 3, "seed": 1},
        {"template_arguments": {"enable_thinking": False}},
    ]
    hashes = [content(**change) for change in changes]
    assert len(set(hashes)) == len(changes)
    tokenizer("a b c", truncation=True, max_length=2, padding="max_length")  # leaves its traces
    assert content() == hashes[0]
    assert hash_tokenizer(tokenizer) == hash_tokenizer(retemplated) != hash_tokenizer(grown)


def test_a_run_that_was_interrupted_goes_on(
    tokenizer: PreTrainedTokenizerBase,
    data: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = prepare(data, tmp_path / "whole", tokenizer, max_length=64)
    monkeypatch.setattr(stage, "_ROWS_PER_PART", 2)
    parsed: list[int] = []
    own = records.parse_row

    def parse_row(row: Any) -> Any:
        parsed.append(row.line)
        return own(row)

    def interrupt(done: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(parts, "parse_row", parse_row)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        prepare(data, out, tokenizer, max_length=64, progress=interrupt)
    assert parsed == [1, 2, 3, 4]
    assert not out.exists()

    seen: list[int] = []
    assert prepare(data, out, tokenizer, max_length=64, progress=seen.append) == whole
    assert parsed == [1, 2, 3, 4, 5, 6, 7, 8, 9], "no row is worked off twice"
    assert seen == [2, 4, 6, 8, 9]
    for mine, theirs in zip(
        PreparedDataset.open(out), PreparedDataset.open(tmp_path / "whole"), strict=True
    ):
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[1], theirs[1])


def test_malformed_rows_are_fatal_by_choice(
    tokenizer: PreTrainedTokenizerBase, data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(MalformedDataError, match=r"rows\.jsonl, line 2: invalid JSON: "):
        prepare(data, out, tokenizer, max_length=64, on_malformed="error")
    assert not out.exists()
    prepare(data, out, tokenizer, max_length=64)
    with pytest.raises(MalformedDataError, match="line 2"):  # a folder that is reused, too
        prepare(data, out, tokenizer, max_length=64, on_malformed="error")
    fine = write(tmp_path / "fine.jsonl", ROWS[:1])
    prepare(fine, tmp_path / "fine", tokenizer, max_length=64, on_malformed="error")


def test_what_a_template_refuses_is_malformed_and_a_wrong_mask_is_fatal(
    tokenizer: PreTrainedTokenizerBase, tmp_path: pathlib.Path
) -> None:
    rows: list[Any] = [
        {"messages": [QUESTION, ANSWER]},
        {"messages": [{"role": "system", "content": "s"}, QUESTION, ANSWER]},
        {"messages": TWO_TURNS},
    ]
    data = write(tmp_path / "rows.jsonl", rows)
    tokenizer.chat_template = families.GEMMA
    report = prepare(data, tmp_path / "gemma", tokenizer, max_length=64)
    assert report.malformed_by_kind == {"refused by the chat template": 1}
    assert "System role not supported" in report.first_malformed[0].reason
    tokenizer.chat_template = families.QWEN3
    with pytest.raises(ChatTemplateError, match=r"rows\.jsonl, line 3: .*last_turn_only=True"):
        prepare(data, tmp_path / "qwen", tokenizer, max_length=64)
    report = prepare(data, tmp_path / "qwen", tokenizer, max_length=64, last_turn_only=True)
    assert report.kept == 3


def test_prompts_alone_need_to_be_allowed(
    tokenizer: PreTrainedTokenizerBase, tmp_path: pathlib.Path
) -> None:
    data = write(tmp_path / "rows.jsonl", [{"messages": [QUESTION]}])
    out = tmp_path / "out"
    with pytest.raises(MalformedDataError, match=r"no token of the 1 rows is learnable"):
        prepare(data, out, tokenizer, max_length=64)
    report = prepare(data, out, tokenizer, max_length=64, require_learnable=False)
    assert (report.kept, report.learnable_rows, report.learnable_tokens) == (1, 0, 0)
    with pytest.raises(MalformedDataError):
        prepare(data, out, tokenizer, max_length=64)


@pytest.mark.parametrize("rows", [[], [""], ["{"], [{"input_ids": [1], "loss_mask": [0]}]])
def test_nothing_to_keep_is_an_error(
    tokenizer: PreTrainedTokenizerBase, tmp_path: pathlib.Path, rows: list[Any]
) -> None:
    data = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(MalformedDataError, match="no row can be used"):
        prepare(data, tmp_path / "out", tokenizer, max_length=64, min_learnable=1)
    assert not (tmp_path / "out").exists()


def test_samples_are_the_first_or_drawn_by_seed(
    tokenizer: PreTrainedTokenizerBase, tmp_path: pathlib.Path
) -> None:
    data = write(tmp_path / "rows.jsonl", [{"input_ids": [i]} for i in range(50)])

    def drawn(seed: int | None, count: int = 10) -> list[int]:
        out = tmp_path / f"{seed}-{count}"
        prepare(data, out, tokenizer, max_length=8, num_samples=count, seed=seed)
        return [int(input_ids[0]) for input_ids, _ in PreparedDataset.open(out)]

    assert drawn(None) == list(range(10))
    assert drawn(1) == sorted(set(drawn(1))) != drawn(2)
    assert len(drawn(1)) == len(drawn(2)) == 10
    assert drawn(3, count=99) == list(range(50))


def test_text_that_begins_with_its_own_begin_of_text(
    tokenizer: PreTrainedTokenizerBase, tmp_path: pathlib.Path
) -> None:
    bos, number = str(tokenizer.bos_token), tokenizer.bos_token_id
    backend: Any = tokenizer
    backend.backend_tokenizer.post_processor = TemplateProcessing(
        f"{bos} $A", None, [(bos, number)]
    )
    data = write(tmp_path / "rows.jsonl", [{"text": "list"}, {"text": f"{bos}list"}])
    prepare(data, tmp_path / "out", tokenizer, max_length=8)
    one, other = PreparedDataset.open(tmp_path / "out")
    assert one[0].tolist() == other[0].tolist()
    assert one[0].tolist().count(number) == 1


def test_wrong_arguments_and_folders(
    tokenizer: PreTrainedTokenizerBase, data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    wrong: list[dict[str, Any]] = [
        {"max_length": 0},
        {"max_length": 8, "min_learnable": -1},
        {"max_length": 8, "num_samples": 0},
        {"max_length": 8, "on_malformed": "ignore"},
    ]
    for arguments in wrong:
        with pytest.raises(ValueError, match=r" is .*; expected"):
            prepare(data, tmp_path / "out", tokenizer, **arguments)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x", encoding="utf-8")
    with pytest.raises(FileExistsError, match=r"no readable prepare\.json"):
        prepare(data, tmp_path / "mine", tokenizer, max_length=8)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        PreparedDataset.open(tmp_path / "gone")


def test_prompts_end_where_the_assistant_is_to_speak(
    tokenizer: PreTrainedTokenizerBase, tmp_path: pathlib.Path
) -> None:
    """Conversations that the user ends get the generation prompt, the others stay as they are."""
    ask, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"messages": m}) + "\n" for m in ([ask], [ask, answer])))
    texts = []
    for number, wanted in enumerate((False, True)):
        out = tmp_path / str(number)
        prepare(data, out, tokenizer, max_length=64, add_generation_prompt=wanted)
        texts.append([tokenizer.decode(ids) for ids, _ in PreparedDataset.open(out)])
    asked = tokenizer.apply_chat_template([ask], tokenize=False, add_generation_prompt=True)
    assert texts[1] == [asked, texts[0][1]]
    assert texts[0][0] != asked
