"""Earlier outputs for the suffix drafter, from whatever has them: a store, prepared data, a file.

Of a conversation only what the assistant said counts, turn by turn, as what is to be drafted is an
answer. The rows are read as ``prepare`` reads them.
"""

import pathlib
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from speculators.data import chat
from speculators.data.artifact import Path
from speculators.data.prepare import MalformedDataError
from speculators.data.raw_rows import RowSource
from speculators.data.records import Conversation, MalformedRow, Text, Tokens, parse_row
from speculators.data.store import INDEX, HiddenStateStore
from speculators.decoding.suffix_drafter import suffix_corpus
from speculators.ops.host import SuffixIndex

_Ids = NDArray[np.int64]
_Document = tuple[_Ids, NDArray[np.bool_]]  # token ids, and which of them are output


def read_suffix_corpus(
    path: Path, tokenizer: PreTrainedTokenizerBase, *, capacity: int = 2**20, split: str = "train"
) -> SuffixIndex:
    """Reads earlier outputs into an index.

    Args:
        path: a folder that ``generate`` or ``prepare`` wrote, or rows of conversations, texts or
            token ids as for training (``.jsonl``, ``.json``, ``.parquet``, a dataset). With
            ``loss_mask`` the tokens that it marks, with ``messages`` the assistant's turns count.
        tokenizer: the verifier's.
        capacity: tokens that are kept, the last ones.
        split: the split of a dataset.

    Raises:
        FileNotFoundError: there is no such file.
        MalformedDataError: a row is malformed (the message names file and line), or there is no
            output in any.
        ChatTemplateError: the chat template does not tell what the assistant said.
    """
    documents = (
        _stored(HiddenStateStore.open(path, layer_ids=()))
        if (pathlib.Path(path) / INDEX).is_file()
        else _read(path, tokenizer, split)
    )
    index = suffix_corpus(_turns(documents), capacity)
    if len(index) == 0:
        raise MalformedDataError(
            f"{path} has no output of the assistant; expected answers, texts or token ids"
        )
    return index


def _turns(documents: Iterable[_Document]) -> Iterator[_Ids]:
    """The runs of tokens that are output."""
    for ids, said in documents:
        bounds = np.flatnonzero(np.diff(said, prepend=False, append=False))
        for begin, end in bounds.reshape(-1, 2):
            yield ids[begin:end]


def _stored(store: HiddenStateStore) -> Iterator[_Document]:
    for number in range(len(store)):
        document = store[number]
        yield document.input_ids.numpy(), document.loss_mask.numpy()


def _read(path: Path, tokenizer: PreTrainedTokenizerBase, split: str) -> Iterator[_Document]:
    for row in RowSource(path, split=split):
        record = parse_row(row)
        if isinstance(record, MalformedRow):
            raise MalformedDataError(f"{record.file}, line {record.line}: {record.reason}")
        yield _tokens(record, tokenizer)


def _tokens(record: Conversation | Text | Tokens, tokenizer: PreTrainedTokenizerBase) -> _Document:
    if isinstance(record, Conversation):
        try:
            ids, said = chat.render(tokenizer, record.messages, record.tools)
        except chat.ConversationRefusedError as error:
            raise MalformedDataError(f"{record.file}, line {record.line}: {error}") from error
        except chat.ChatTemplateError as error:
            where = f"{record.file}, line {record.line}"
            raise chat.ChatTemplateError(f"{where}: {error}") from error
    elif isinstance(record, Text):
        ids = list(tokenizer(record.text, add_special_tokens=False, verbose=False)["input_ids"])
        said = [True] * len(ids)
    else:
        ids, said = record.input_ids, record.loss_mask
    return np.array(ids, np.int64), np.array(said, np.bool_)
