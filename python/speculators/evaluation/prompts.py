"""Prompts to evaluate on: what the verifier is asked, as the server would be asked it.

A conversation is rendered with the generation prompt at its end. The assistant's last turn, if the
file has one, is taken away before anything looks at it: what counts is what the verifier says. The
rows are read as ``prepare`` reads them, so any file that serves for training serves here, too.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from speculators.data import chat
from speculators.data.artifact import Path
from speculators.data.prepare import MalformedDataError
from speculators.data.raw_rows import ROW_KEYS, RawRow, RowSource
from speculators.data.records import ROLES, Conversation, MalformedRow, Text, parse_row

_CONVERSATIONS = ("messages", "conversations", "conversation")
_ASKS = {"user", "tool"}  # after these the assistant speaks


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt.

    Attributes:
        ids: its tokens, int64 ``[L]``, L >= 1, on the CPU.
        line: the line of the file that it comes from, or in Parquet and datasets the row's number,
            from 1; 0 for a prompt that comes from no file.
        file: the file's path.
    """

    ids: Tensor
    line: int = 0
    file: str = ""

    @property
    def place(self) -> str:
        """Where it comes from, for messages."""
        return f"{self.file}, line {self.line}" if self.file else "a prompt"


def read_prompts(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int | None = None,
    max_prompt_tokens: int | None = None,
    template_arguments: Mapping[str, Any] | None = None,
    split: str = "train",
) -> list[Prompt]:
    """Reads prompts from a file.

    A row has one of: ``messages``, ``conversations`` or ``conversation`` (with ``tools`` beside it,
    if any), ``text``, ``input_ids``, or ``prompt``, which is a conversation, a text or token ids.
    Texts get the special tokens that the tokenizer adds by itself, token ids are taken as they are.

    Args:
        path: ``.jsonl``, ``.json`` or ``.parquet``, or what else ``data.records`` reads.
        tokenizer: the verifier's, a fast one; with a chat template if there are conversations.
        limit: reads so many prompts, the first ones.
        max_prompt_tokens: keeps so many tokens of a longer prompt, the last ones; None keeps all.
        template_arguments: further variables of the chat template, such as ``enable_thinking``.
        split: the split of a dataset.

    Raises:
        FileNotFoundError: there is no such file.
        MalformedDataError: a row is malformed, does not end where the assistant is to speak, or
            there is no row at all; the message names file and line.
        ChatTemplateError: there is no chat template, or it cannot be used.
        ValueError: the file is broken beyond some point, or a limit is less than 1.
    """
    for name, value in (("limit", limit), ("max_prompt_tokens", max_prompt_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1, or None")
    prompts = []
    for row in itertools.islice(RowSource(path, split=split), limit):
        ids = _tokens(row, tokenizer, dict(template_arguments or {}))
        ids = ids if max_prompt_tokens is None else ids[-max_prompt_tokens:]
        prompts.append(Prompt(torch.tensor(ids, dtype=torch.int64), row.line, row.file))
    if not prompts:
        raise MalformedDataError(f"{path} has no prompts; expected at least one row")
    return prompts


def _tokens(
    row: RawRow, tokenizer: PreTrainedTokenizerBase, template_arguments: dict[str, Any]
) -> list[int]:
    where = f"{row.file}, line {row.line}"
    record = parse_row(dataclasses.replace(row, value=_question(row.value)))
    if isinstance(record, MalformedRow):
        raise MalformedDataError(f"{where}: {record.reason}")
    if isinstance(record, Conversation):
        role = record.messages[-1]["role"]
        if role not in _ASKS:
            raise MalformedDataError(
                f"{where}: the conversation ends with a message of role {role!r}; expected the "
                "user's, or an answer of the assistant after it"
            )
        try:
            ids, _ = chat.render(
                tokenizer,
                record.messages,
                record.tools,
                last_turn_only=True,  # no mask is wanted, and so none of the earlier turns' either
                add_generation_prompt=True,
                template_arguments=template_arguments,
            )
        except chat.ConversationRefusedError as error:
            raise MalformedDataError(f"{where}: {error}") from error
        except chat.ChatTemplateError as error:
            raise chat.ChatTemplateError(f"{where}: {error}") from error
    elif isinstance(record, Text):
        ids = list(tokenizer(record.text, verbose=False)["input_ids"])
        if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
            ids = ids[1:]  # the text had one already
        if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]  # some tokenizers end every text; a prompt is to be continued
    else:
        ids = record.input_ids
    if not ids:
        raise MalformedDataError(f"{where}: the prompt has no tokens; expected at least one")
    return ids


def _question(row: Any) -> Any:
    """A row without the assistant's last turn, its ``prompt`` under the name of what it is."""
    if not isinstance(row, dict):
        return row
    if "prompt" in row and all(row.get(key) is None for key in ROW_KEYS):
        prompt = row["prompt"]
        key = "text"
        if isinstance(prompt, list):
            key = "messages" if any(isinstance(part, dict) for part in prompt) else "input_ids"
        row = {**row, key: prompt}
    for key in _CONVERSATIONS:
        messages = row.get(key)
        if isinstance(messages, list) and messages:
            end = len(messages)
            while end and _is_answer(messages[end - 1]):
                end -= 1
            row = {**row, key: messages[:end]}
    return row


def _is_answer(message: Any) -> bool:
    role = message.get("role", message.get("from")) if isinstance(message, dict) else None
    return isinstance(role, str) and ROLES.get(role) == "assistant"
