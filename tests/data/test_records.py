"""Rows of all the shapes that data sets have, and what is said of those that cannot be used."""

import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from speculators.data.raw_rows import RawRow, RowSource
from speculators.data.records import (
    Conversation,
    MalformedRow,
    Record,
    Text,
    Tokens,
    parse_row,
    read_records,
)

PLAIN = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


def parse(row: Any) -> Record:
    return parse_row(RawRow("data.jsonl", 3, row))


@pytest.mark.parametrize("key", ["messages", "conversations", "conversation"])
def test_role_and_content_or_from_and_value(key: str) -> None:
    shared_gpt = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    for messages in (PLAIN, shared_gpt):
        assert parse({key: messages, "id": 7}) == Conversation("data.jsonl", 3, PLAIN)


def test_roles_take_the_names_of_chat_templates() -> None:
    names = ["system", "human", "gpt", "function", "observation", "tool", "user", "assistant"]
    record = parse({"conversations": [{"from": name, "value": "x"} for name in names]})
    assert isinstance(record, Conversation)
    found = [message["role"] for message in record.messages]
    assert found == ["system", "user", "assistant", "tool", "tool", "tool", "user", "assistant"]


def test_parts_of_text_are_joined_and_other_keys_are_kept() -> None:
    parts = [{"type": "text", "text": "Ho "}, {"type": "text", "text": "ho"}]
    message = {"role": "assistant", "content": parts, "reasoning_content": "Hm", "name": None}
    record = parse({"messages": [message]})
    assert isinstance(record, Conversation)
    assert record.messages == [{"role": "assistant", "content": "Ho ho", "reasoning_content": "Hm"}]


def test_tools_are_a_list_or_its_json_and_arguments_become_objects() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    for tools in ([tool], json.dumps([tool])):
        record = parse({"messages": messages, "tools": tools})
        assert isinstance(record, Conversation)
        assert record.tools == [tool]
        assert record.messages[0]["content"] == ""
        called = record.messages[0]["tool_calls"][0]["function"]
        assert called == {"name": "f", "arguments": {"a": 1}}
    nothings: list[Any] = [None, [], "", "[]"]
    for nothing in nothings:
        assert parse({"messages": PLAIN, "tools": nothing}) == parse({"messages": PLAIN})


def test_tokens_and_text() -> None:
    tokens = parse({"input_ids": [5, 6], "loss_mask": [0, True], "text": "ignored"})
    assert tokens == Tokens("data.jsonl", 3, [5, 6], [False, True])
    assert parse({"input_ids": [5, 6]}) == Tokens("data.jsonl", 3, [5, 6], [True, True])
    assert parse({"text": "Hi", "messages": None}) == Text("data.jsonl", 3, "Hi")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (5, "not an object: the row is a int"),
        ({"id": 1, "prompt": "x"}, "nothing to read: .* found id, prompt"),
        ({"text": 3}, "text is no string"),
        ({"text": ""}, "empty text"),
        ({"text": "\ud83d"}, "invalid Unicode"),
        ({"messages": []}, "empty conversation"),
        ({"messages": "Hi"}, "messages are no list: they are a str"),
        ({"messages": ["Hi"]}, "message is no object: message 0 is a str"),
        ({"messages": [*PLAIN, {"role": "", "content": "x"}]}, "unknown role: '' in message 2"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "unknown role: 'narrator'"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown role"),
        ({"messages": [{"content": "x"}]}, "unknown role: None"),
        ({"messages": [{"role": "user"}]}, "content is no text: that of message 0 is absent"),
        ({"messages": [{"role": "user", "content": 3}]}, "content is no text: .* a int"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
            "content is no text: message 0 has a part of type 'image'",
        ),
        ({"messages": [{"role": "user", "content": "\udc00"}]}, "invalid Unicode"),
        (
            {"messages": [{"role": "gpt", "content": "", "reasoning_content": "\udc00"}]},
            "invalid Unicode",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": "f()"}]},
            "tool_calls are no list of objects",
        ),
        ({"messages": PLAIN, "tools": "{"}, "tools are no valid JSON"),
        ({"messages": PLAIN, "tools": {"name": "f"}}, "tools are no list of objects"),
        ({"input_ids": []}, "empty input_ids"),
        ({"input_ids": [1.0]}, "input_ids are no list of integers"),
        ({"input_ids": [True]}, "input_ids are no list of integers"),
        ({"input_ids": [1, 2], "loss_mask": [1]}, ".* differ in length: 1 for 2 tokens"),
        ({"input_ids": [1], "loss_mask": [2]}, "loss_mask is no list of 0 and 1"),
    ],
)
def test_malformed_rows_say_where_and_why(row: Any, reason: str) -> None:
    record = parse(row)
    assert isinstance(record, MalformedRow)
    assert (record.file, record.line) == ("data.jsonl", 3)
    assert re.match(reason, record.reason)
    assert ":" not in record.kind


def test_json_lines_with_broken_lines(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a\xe2\x80\xa8b"}\r\n\n{"text": \n\xff\n{"text": "c"}')
    rows = list(read_records(path))
    assert rows[0] == Text(str(path), 1, "a\u2028b")
    assert rows[3:] == [Text(str(path), 5, "c")]
    found = [(row.line, row.kind) for row in rows[1:3] if isinstance(row, MalformedRow)]
    assert found == [(3, "invalid JSON"), (4, "invalid UTF-8")]


ROWS = [{"text": "a"}, {"text": 'b"[{'}, {"messages": PLAIN}]


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (json.dumps(ROWS), [1, 1, 1]),
        ("\n[\n" + ",\n\n".join(map(json.dumps, ROWS)) + "\n]\n", [3, 5, 7]),
        (json.dumps({"version": [1], "n": {"data": [0]}, "data": ROWS}), None),
        (json.dumps({"a]": "[{", "n": {"data": [0]}, "data": ROWS}, indent=1), [9, 12, 15]),
        ("\n".join(map(json.dumps, ROWS)), [1, 2, 3]),
    ],
)
def test_json_files(tmp_path: pathlib.Path, content: str, lines: list[int] | None) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content, encoding="utf-8")
    rows = list(RowSource(path))
    if lines is None:  # two lists: not one list of rows
        assert [row.line for row in rows] == [1]
        assert isinstance(parse_row(rows[0]), MalformedRow)
        return
    assert [row.value for row in rows] == ROWS
    assert [row.line for row in rows] == lines


def test_json_file_of_one_row_or_none(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"messages": PLAIN}), encoding="utf-8")
    assert list(read_records(path)) == [Conversation(str(path), 1, PLAIN)]
    path.write_text("[ ]", encoding="utf-8")
    assert list(read_records(path)) == []


@pytest.mark.parametrize("content", ['[{"text": "a"}, {"text": ]', '[{"text": "a"} {}]', "[", ""])
def test_json_file_that_breaks_off_is_an_error(tmp_path: pathlib.Path, content: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows\.json is not valid JSON: .* line 1"):
        list(read_records(path))


def _parquet(path: pathlib.Path, rows: list[dict[str, Any]]) -> pathlib.Path:
    file = path / "rows.parquet"
    pa.parquet.write_table(pa.Table.from_pylist(rows), file, row_group_size=2)
    return file


def _saved(path: pathlib.Path, rows: list[dict[str, Any]]) -> pathlib.Path:
    datasets.Dataset.from_list(rows).save_to_disk(path / "saved")
    return path / "saved"


def _saved_splits(path: pathlib.Path, rows: list[dict[str, Any]]) -> pathlib.Path:
    splits = {"train": datasets.Dataset.from_list(rows)}
    datasets.DatasetDict(splits).save_to_disk(path / "splits")
    return path / "splits"


@pytest.mark.parametrize("write", [_parquet, _saved, _saved_splits])
def test_columnar_rows_lose_the_keys_that_other_rows_have(
    tmp_path: pathlib.Path, write: Callable[[pathlib.Path, list[dict[str, Any]]], pathlib.Path]
) -> None:
    calls = [
        {"function": {"name": "f", "arguments": {"a": 1}}},
        {"function": {"name": "g", "arguments": {"b": 2}}},
    ]
    rows: list[dict[str, Any]] = [
        {"messages": PLAIN, "text": None},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": calls}]},
        {"messages": [{"role": "user", "content": "x", "name": "Ann"}]},
        {"text": "plain"},
        {"messages": []},
    ]
    path = write(tmp_path, rows)
    found = list(read_records(path))
    assert [row.line for row in found] == [1, 2, 3, 4, 5]
    assert found[0] == Conversation(found[0].file, 1, PLAIN)
    assert isinstance(found[1], Conversation)
    assert found[1].messages == [{"role": "assistant", "content": "", "tool_calls": calls}]
    assert found[2] == Conversation(found[0].file, 3, rows[2]["messages"])
    assert found[3] == Text(found[0].file, 4, "plain")
    assert isinstance(found[4], MalformedRow)


def test_a_parquet_row_that_is_no_utf8_is_malformed(tmp_path: pathlib.Path) -> None:
    binary = pa.array([b"good", b"\xff\xfe", b"too"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, binary.buffers())
    file = tmp_path / "rows.parquet"
    pa.parquet.write_table(pa.table({"text": text}), file)
    good, bad, too = read_records(file)
    assert good == Text(str(file), 1, "good")
    assert isinstance(bad, MalformedRow)
    assert (bad.line, bad.kind) == (2, "invalid UTF-8")
    assert too == Text(str(file), 3, "too")


def test_a_split_that_is_not_there(tmp_path: pathlib.Path) -> None:
    path = _saved_splits(tmp_path, [{"text": "a"}])
    with pytest.raises(ValueError, match=r"no split 'test'; it has train"):
        list(read_records(path, split="test"))


def test_an_id_is_loaded_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> datasets.Dataset:
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([{"text": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = list(read_records("somebody/chats:english", split="test"))
    assert rows == [Text("somebody/chats:english", 1, "a")]
    assert asked == [(("somebody/chats", "english"), {"split": "test"})]


def test_several_files_and_a_folder(tmp_path: pathlib.Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n', encoding="utf-8")
    (tmp_path / "a.json").write_text('[{"text": "a"}]', encoding="utf-8")
    (tmp_path / "notes.txt").write_text("not read", encoding="utf-8")
    assert [getattr(row, "text", None) for row in read_records(tmp_path)] == ["a", "b"]
    both = [tmp_path / "b.jsonl", tmp_path / "a.json"]
    assert [getattr(row, "text", None) for row in read_records(both)] == ["b", "a"]


def test_what_cannot_be_found_or_read(tmp_path: pathlib.Path) -> None:
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"holds no file ending in \.json"):
        list(read_records(tmp_path))
    with pytest.raises(ValueError, match="of an unknown kind"):
        list(read_records(tmp_path / "notes.txt"))
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl does not exist"):
        list(read_records(tmp_path / "gone.jsonl"))
    with pytest.raises(FileNotFoundError, match="no id of a dataset"):
        list(read_records(tmp_path / "gone"))


def test_the_content_counts_and_not_the_name(tmp_path: pathlib.Path) -> None:
    one, copy, other = (tmp_path / name for name in ("1.jsonl", "2.jsonl", "3.jsonl"))
    for path, text in ((one, "a"), (copy, "a"), (other, "b")):
        path.write_text(json.dumps({"text": text}), encoding="utf-8")
    hashes = [RowSource(path).content_hash() for path in (one, copy, other)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert RowSource([one, other]).content_hash() != RowSource([other, one]).content_hash()
    saved = [_saved(tmp_path / name, [{"text": name[0]}]) for name in ("a1", "a2", "b1")]
    hashes = [RowSource(path).content_hash() for path in saved]
    assert hashes[0] == hashes[1] != hashes[2]
