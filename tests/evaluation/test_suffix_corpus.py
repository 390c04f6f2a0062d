"""A corpus of earlier outputs: answers alone, from all that can hold them."""

import json
import pathlib
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from speculators.data.generate import generate
from speculators.data.prepare import MalformedDataError, PreparedDataset, prepare
from speculators.data.sources import TransformersSource
from speculators.evaluation.suffix_corpus import read_suffix_corpus
from speculators.models.verifier import Verifier

TINY = pathlib.Path("examples/tiny_verifier/model")
ANSWERS = ["def left(self):\n    return 1", "import os\nimport sys"]
MESSAGES = [
    {"role": "user", "content": "class Question:"},
    {"role": "assistant", "content": ANSWERS[0]},
    {"role": "user", "content": "while Question:"},
    {"role": "assistant", "content": ANSWERS[1]},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(TINY)
    return tokenizer


def ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def write(path: pathlib.Path, *rows: dict[str, Any]) -> pathlib.Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_of_a_conversation_each_answer_counts_by_itself(
    tokenizer: PreTrainedTokenizerBase, tmp_path: pathlib.Path
) -> None:
    file = write(tmp_path / "said.jsonl", {"messages": MESSAGES})
    folder = tmp_path / "prepared"
    store = tmp_path / "store"
    prepare(file, folder, tokenizer, max_length=512)
    source = TransformersSource(Verifier.from_pretrained(TINY), (2,))
    generate(PreparedDataset.open(folder), store, source)
    first, second = (ids(tokenizer, answer) for answer in ANSWERS)
    for path in (file, folder, store):
        index = read_suffix_corpus(path, tokenizer)
        # What follows the first token of an answer is that answer, to its end and no further.
        for answer, other in ((first, second), (second, first)):
            draft = index.propose(60, context=answer[:2], factor=99.0).tokens.tolist()
            assert draft[: len(answer) - 2] == answer[2:]
            assert len(draft) < len(answer) + 2
            assert other[0] not in draft[len(answer) - 2 :]
        assert index.longest_match(ids(tokenizer, "class Question")) == (0, 0)


def test_texts_and_token_ids_are_outputs_as_a_whole(
    tokenizer: PreTrainedTokenizerBase, tmp_path: pathlib.Path
) -> None:
    rows: list[dict[str, Any]] = [
        {"text": ANSWERS[0]},
        {"input_ids": [5, 6, 7, 8]},
        {"input_ids": [9, 10, 11, 12], "loss_mask": [0, 1, 1, 0]},
    ]
    index = read_suffix_corpus(write(tmp_path / "said.jsonl", *rows), tokenizer)
    text = ids(tokenizer, ANSWERS[0])
    assert len(index) == len(text) + 4 + 2
    assert index.propose(60, context=text[:1], factor=99.0).tokens.tolist() == text[1:]
    assert index.propose(9, context=[5, 6], factor=99.0).tokens.tolist() == [7, 8]
    assert index.propose(9, context=[10], factor=99.0).tokens.tolist() == [11]
    assert index.longest_match([9]) == (0, 0)
    few = read_suffix_corpus(tmp_path / "said.jsonl", tokenizer, capacity=4)
    assert len(few) == 2  # an end of a sequence takes the place of a token
    assert few.longest_match([5]) == (0, 0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": MESSAGES[:1]}, "no output of the assistant"),
        ({"words": 3}, "line 1: nothing to read"),
    ],
)
def test_what_is_no_output_is_named(
    row: dict[str, Any],
    message: str,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: pathlib.Path,
) -> None:
    with pytest.raises(MalformedDataError, match=message):
        read_suffix_corpus(write(tmp_path / "said.jsonl", row), tokenizer)
