"""One row of input as a conversation, a text or token ids; or why it is none of these.

Data sets name the same things differently: role and content, or from and value; ``human`` for the
user, ``gpt`` for the assistant. Here they take the names of transformers' chat templates. What a
template may use besides (tool calls, reasoning, names) is handed through as it is. Nothing is
guessed: a role that is not known, or a content that is no text, makes the row malformed.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from typing import Any

from speculators.data.artifact import Path
from speculators.data.raw_rows import RawRow, RowSource

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
"""The roles that are understood, and what each is called from here on."""

Message = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Row:
    file: str
    line: int


@dataclasses.dataclass(frozen=True)
class Conversation(_Row):
    """Messages with ``role`` and ``content``, and the JSON schemas of the tools, if any."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


@dataclasses.dataclass(frozen=True)
class Text(_Row):
    """Plain text, all of it to be learned."""

    text: str


@dataclasses.dataclass(frozen=True)
class Tokens(_Row):
    """Token ids, and for each whether it is to be learned."""

    input_ids: list[int]
    loss_mask: list[bool]


@dataclasses.dataclass(frozen=True)
class MalformedRow(_Row):
    """A row that cannot be used.

    Attributes:
        file: the file's path, or the dataset's id.
        line: its line, or in Parquet and datasets its number, from 1.
        reason: ``kind: details``, or the kind alone; rows are counted by kind.
    """

    reason: str

    @property
    def kind(self) -> str:
        """The reason without what differs from row to row."""
        return self.reason.partition(":")[0]


Record = Conversation | Text | Tokens | MalformedRow


class _RowError(ValueError):
    """Why a row is malformed."""


def read_records(data: Path | Iterable[Path], split: str = "train") -> Iterator[Record]:
    """Reads rows from files or a dataset.

    A row has one of: ``messages``, ``conversations`` or ``conversation`` (with ``tools`` beside
    it, if any), ``text``, or ``input_ids`` with or without ``loss_mask``. Where it has several,
    ``input_ids`` count before messages, and messages before ``text``.

    Args:
        data: files (``.json``, ``.jsonl``, ``.parquet``), a folder of such, a folder that
            ``datasets`` saved, an id on the Hub as ``owner/name`` or ``owner/name:config``, or
            several of these. No code of a dataset is ever run.
        split: the split of a dataset.

    Yields:
        A record for each row, in the order of the input; malformed rows as ``MalformedRow``.

    Raises:
        FileNotFoundError: there is no such file or dataset.
        ValueError: a file is of another kind, or broken beyond some point.
    """
    for row in RowSource(data, split=split):
        yield parse_row(row)


def parse_row(row: RawRow) -> Record:
    """Turns a row as it was read into a record."""
    try:
        if row.problem is not None:
            raise _RowError(row.problem)
        if not isinstance(row.value, dict):
            raise _RowError(f"not an object: the row is a {type(row.value).__name__}")
        return _parse(row.file, row.line, row.value)
    except _RowError as error:
        return MalformedRow(row.file, row.line, str(error))


def _parse(file: str, line: int, row: dict[str, Any]) -> Record:
    if row.get("input_ids") is not None:
        return Tokens(file, line, *_tokens(row["input_ids"], row.get("loss_mask")))
    for key in ("messages", "conversations", "conversation"):
        if row.get(key) is not None:
            messages, tools = _messages(row[key]), _tools(row.get("tools"))
            _check_unicode([messages, tools])
            return Conversation(file, line, messages, tools)
    if row.get("text") is None:
        raise _RowError(
            "nothing to read: expected messages, conversations, conversation, text or input_ids; "
            f"found {', '.join(map(str, row)) or 'no key'}"
        )
    if not isinstance(row["text"], str):
        raise _RowError(f"text is no string: it is a {type(row['text']).__name__}")
    _check_unicode(row["text"])
    if not row["text"]:
        raise _RowError("empty text")
    return Text(file, line, row["text"])


def _tokens(ids: Any, mask: Any) -> tuple[list[int], list[bool]]:
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise _RowError("input_ids are no list of integers")
    if not ids:
        raise _RowError("empty input_ids")
    if mask is None:
        return ids, [True] * len(ids)
    if not isinstance(mask, list) or not all(type(m) in {int, bool} and m in {0, 1} for m in mask):
        raise _RowError("loss_mask is no list of 0 and 1 or of booleans")
    if len(mask) != len(ids):
        raise _RowError(
            f"loss_mask and input_ids differ in length: {len(mask)} for {len(ids)} tokens"
        )
    return ids, [bool(m) for m in mask]


def _messages(messages: Any) -> list[Message]:
    if not isinstance(messages, list):
        raise _RowError(f"messages are no list: they are a {type(messages).__name__}")
    if not messages:
        raise _RowError("empty conversation")
    return [_message(number, message) for number, message in enumerate(messages)]


def _message(number: int, message: Any) -> Message:
    if not isinstance(message, dict):
        raise _RowError(f"message is no object: message {number} is a {type(message).__name__}")
    role = message.get("role", message.get("from"))
    if not isinstance(role, str) or role not in ROLES:
        raise _RowError(
            f"unknown role: {role!r} in message {number}; expected one of {', '.join(ROLES)}"
        )
    rest = {
        key: value
        for key, value in message.items()
        if key not in {"role", "from", "content", "value"} and value is not None
    }
    content = _content(number, message.get("content", message.get("value")), rest)
    if "tool_calls" in rest:
        rest["tool_calls"] = _tool_calls(number, rest["tool_calls"])
    return {"role": ROLES[role], "content": content, **rest}


def _content(number: int, content: Any, rest: Message) -> str:
    if content is None and ("tool_calls" in rest or "reasoning_content" in rest):
        return ""
    if isinstance(content, list):
        content = "".join(_part(number, part) for part in content)
    if not isinstance(content, str):
        found = "absent" if content is None else f"a {type(content).__name__}"
        raise _RowError(f"content is no text: that of message {number} is {found}")
    return content


def _part(number: int, part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text" or not isinstance(part.get("text"), str):
        raise _RowError(f"content is no text: message {number} has a part of type {kind!r}")
    text: str = part["text"]
    return text


def _check_unicode(value: Any) -> None:
    """JSON can escape half of a character, which has no UTF-8 and which no tokenizer takes."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise _RowError(f"invalid Unicode: half a character (a lone surrogate), {error}") from error


def _tool_calls(number: int, calls: Any) -> list[dict[str, Any]]:
    """Tool calls whose arguments are objects, as templates and servers expect them."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise _RowError(f"tool_calls are no list of objects: in message {number}")
    return [_with_arguments(call) for call in calls]


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_arguments(call["function"])}
    if isinstance(call.get("arguments"), str):
        try:
            arguments = json.loads(call["arguments"])
        except ValueError:
            return call
        return {**call, "arguments": arguments} if isinstance(arguments, dict) else call
    return call


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise _RowError(f"tools are no valid JSON: {error}") from error
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise _RowError("tools are no list of objects")
    return tools
