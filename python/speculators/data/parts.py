"""Some rows -> one Arrow file of token ids and loss masks, and the counts of what the rows were.

The counts lie in the metadata of the file's schema, so that a part is there with its counts or not
at all.
"""

import dataclasses
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from speculators.atomic import atomic_file
from speculators.data import chat
from speculators.data.prepared import PrepareCounts
from speculators.data.raw_rows import RawRow
from speculators.data.records import Conversation, MalformedRow, Record, Text, parse_row

_COUNTS = b"speculators.counts"


@dataclasses.dataclass(frozen=True)
class PrepareSettings:
    """All that the result depends on besides the rows and the tokenizer."""

    max_length: int
    last_turn_only: bool
    add_generation_prompt: bool
    min_learnable: int
    num_samples: int | None
    seed: int | None
    template_arguments: dict[str, Any]

    def __post_init__(self) -> None:
        for name, least in (("max_length", 1), ("min_learnable", 0), ("num_samples", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; expected {least} or more")


def counts_of(
    path: pathlib.Path,
    rows: Iterable[RawRow],
    tokenizer: PreTrainedTokenizerBase,
    settings: PrepareSettings,
) -> PrepareCounts:
    """Writes the part of these rows, unless it is there; returns its counts in either case."""
    if path.exists():
        with pa.memory_map(str(path)) as file:
            metadata = pa.ipc.open_stream(file).schema.metadata
        return PrepareCounts.model_validate_json(metadata[_COUNTS])
    counts = PrepareCounts()
    ids_of_rows, masks = [np.zeros(0, np.int32)], [np.zeros(0, bool)]
    for row in rows:
        counts.rows += 1
        tokens = _tokens(parse_row(row), tokenizer, settings)
        if isinstance(tokens, MalformedRow):
            counts.count_malformed(tokens)
            continue
        if _count(counts, *tokens, settings):
            ids_of_rows.append(np.array(tokens[0][: settings.max_length], np.int32))
            masks.append(np.array(tokens[1][: settings.max_length], bool))
    offsets = pa.array(np.cumsum([len(ids) for ids in ids_of_rows]), pa.int32())
    columns = {
        "input_ids": pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(ids_of_rows))),
        "loss_mask": pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(masks))),
    }
    table = pa.table(columns, metadata={_COUNTS: counts.model_dump_json()})
    with atomic_file(path) as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    return counts


def _tokens(
    record: Record, tokenizer: PreTrainedTokenizerBase, settings: PrepareSettings
) -> tuple[list[int], list[bool]] | MalformedRow:
    """All tokens of a record, not yet truncated."""
    if isinstance(record, MalformedRow):
        return record
    if isinstance(record, Text):
        ids = list(tokenizer(record.text, verbose=False)["input_ids"])
        if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
            ids = ids[1:]  # the text had one already
        return ids, [True] * len(ids)
    if isinstance(record, Conversation):
        try:
            return chat.render(
                tokenizer,
                record.messages,
                record.tools,
                last_turn_only=settings.last_turn_only,
                add_generation_prompt=settings.add_generation_prompt
                and record.messages[-1]["role"] != "assistant",
                template_arguments=settings.template_arguments,
            )
        except chat.ConversationRefusedError as error:
            return MalformedRow(record.file, record.line, str(error))
        except chat.ChatTemplateError as error:
            where = f"{record.file}, line {record.line}"
            raise chat.ChatTemplateError(f"{where}: {error}") from error
    outside = next((i for i in record.input_ids if not 0 <= i < len(tokenizer)), None)
    if outside is not None:
        reason = f"token id outside the vocabulary: {outside}, expected 0 to {len(tokenizer) - 1}"
        return MalformedRow(record.file, record.line, reason)
    return record.input_ids, record.loss_mask


def _count(
    counts: PrepareCounts, input_ids: list[int], loss_mask: list[bool], settings: PrepareSettings
) -> bool:
    """Counts a row; says whether it is kept."""
    learnable = sum(loss_mask[: settings.max_length])
    if not input_ids:
        counts.without_tokens += 1
        return False
    if learnable < settings.min_learnable:
        counts.below_min_learnable += 1
        return False
    counts.kept += 1
    counts.truncated += len(input_ids) > settings.max_length
    counts.learnable_rows += learnable > 0
    counts.tokens += min(len(input_ids), settings.max_length)
    counts.learnable_tokens += learnable
    return True
