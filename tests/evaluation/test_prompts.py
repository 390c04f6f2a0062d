"""Prompts from files: rendered as a server renders them, the answers left out."""

import json
import pathlib
from typing import Any

import datasets
import pytest
import tests.data.templates as families
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from speculators.data.chat import ChatTemplateError
from speculators.data.prepare import MalformedDataError
from speculators.evaluation import Prompt, read_prompts

TINY = pathlib.Path(__file__).parents[2] / "examples" / "tiny_verifier"
QUESTION = {"role": "user", "content": "What is a list?"}
ANSWER = {"role": "assistant", "content": "It holds values."}
AGAIN = {"role": "user", "content": "And a tuple?"}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(TINY / "model")
    return loaded


def write(path: pathlib.Path, rows: list[Any]) -> pathlib.Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")
    return path


def asked(tokenizer: PreTrainedTokenizerBase, *messages: Any, **options: Any) -> list[int]:
    """What transformers itself makes of a conversation."""
    encoded: Any = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, **options
    )
    return list(encoded["input_ids"])


def lists(prompts: list[Prompt]) -> list[list[int]]:
    return [prompt.ids.tolist() for prompt in prompts]


def test_rows_of_all_kinds(tokenizer: PreTrainedTokenizerBase, tmp_path: pathlib.Path) -> None:
    broken_answer = {"role": "assistant", "content": [{"type": "image"}]}
    rows: list[Any] = [
        {"messages": [QUESTION]},
        "",
        {"messages": [QUESTION, ANSWER, AGAIN, broken_answer]},
        {"conversations": [{"from": "human", "value": "What is a list?"}, {"from": "gpt"}]},
        {"prompt": [QUESTION, ANSWER, AGAIN]},
        {"prompt": "def f():"},
        {"text": "def f():"},
        {"input_ids": [5, 6, 7]},
        {"prompt": [5, 6, 7]},
    ]
    path = write(tmp_path / "prompts.jsonl", rows)
    prompts = read_prompts(path, tokenizer)
    once, twice = asked(tokenizer, QUESTION), asked(tokenizer, QUESTION, ANSWER, AGAIN)
    text = tokenizer("def f():")["input_ids"]
    assert lists(prompts) == [once, twice, once, twice, text, text, [5, 6, 7], [5, 6, 7]]
    assert [prompt.line for prompt in prompts] == [1, 3, 4, 5, 6, 7, 8, 9]
    assert {prompt.file for prompt in prompts} == {str(path)}
    assert lists(read_prompts(path, tokenizer, limit=2)) == [once, twice]
    cut = read_prompts(path, tokenizer, max_prompt_tokens=4)
    assert lists(cut)[:2] == [once[-4:], twice[-4:]]
    assert lists(cut)[-1] == [5, 6, 7]


def test_json_and_parquet(tokenizer: PreTrainedTokenizerBase, tmp_path: pathlib.Path) -> None:
    rows = [{"messages": [QUESTION]}, {"messages": [QUESTION, ANSWER]}]
    whole = tmp_path / "prompts.json"
    whole.write_text(json.dumps(rows))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "prompts.parquet")
    expected = [asked(tokenizer, QUESTION)] * 2
    assert lists(read_prompts(whole, tokenizer)) == expected
    assert lists(read_prompts(tmp_path / "prompts.parquet", tokenizer)) == expected


def test_shipped_prompts(tokenizer: PreTrainedTokenizerBase) -> None:
    path = TINY / "prompts_eval.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    prompts = read_prompts(path, tokenizer)
    assert lists(prompts) == [asked(tokenizer, *row["messages"]) for row in rows]


def test_tool_answers_are_prompts(
    tokenizer: PreTrainedTokenizerBase, tmp_path: pathlib.Path
) -> None:
    tokenizer.chat_template = families.QWEN25
    call = {"name": "look", "arguments": {"at": "x"}}
    messages = [
        QUESTION,
        {"role": "assistant", "content": "", "tool_calls": [{"function": call}]},
        {"role": "tool", "content": "nothing"},
    ]
    path = write(tmp_path / "tools.jsonl", [{"messages": [*messages, ANSWER]}])
    assert lists(read_prompts(path, tokenizer)) == [asked(tokenizer, *messages)]


def test_template_that_drops_reasoning(
    tokenizer: PreTrainedTokenizerBase, tmp_path: pathlib.Path
) -> None:
    """No mask can be made of such a conversation, but a prompt can."""
    tokenizer.chat_template = families.QWEN3
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIt holds values."}
    path = write(tmp_path / "turns.jsonl", [{"messages": [QUESTION, thought, AGAIN, thought]}])
    expected = asked(tokenizer, QUESTION, thought, AGAIN, enable_thinking=False)
    found = read_prompts(path, tokenizer, template_arguments={"enable_thinking": False})
    assert lists(found) == [expected]
    assert lists(read_prompts(path, tokenizer)) == [asked(tokenizer, QUESTION, thought, AGAIN)]
    assert lists(read_prompts(path, tokenizer)) != [expected]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{broken", "invalid JSON"),
        ({"messages": []}, "empty conversation"),
        ({"messages": [ANSWER]}, "empty conversation"),
        ({"messages": [{"role": "system", "content": "Be brief."}]}, "role 'system'"),
        ({"messages": [QUESTION, {"role": "narrator", "content": "x"}]}, "unknown role"),
        ({"prompt": 5}, "text is no string"),
        ({"prompt": []}, "empty input_ids"),
        ({"question": "?"}, "nothing to read"),
        ([1, 2], "not an object"),
    ],
)
def test_malformed_rows_are_named(
    row: Any, words: str, tokenizer: PreTrainedTokenizerBase, tmp_path: pathlib.Path
) -> None:
    path = write(tmp_path / "prompts.jsonl", [{"messages": [QUESTION]}, row])
    with pytest.raises(MalformedDataError, match=words) as caught:
        read_prompts(path, tokenizer)
    assert f"{path}, line 2" in str(caught.value)
    assert len(read_prompts(path, tokenizer, limit=1)) == 1


def test_other_errors(tokenizer: PreTrainedTokenizerBase, tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl"):
        read_prompts(tmp_path / "absent.jsonl", tokenizer)
    with pytest.raises(MalformedDataError, match="no prompts"):
        read_prompts(write(tmp_path / "empty.jsonl", [""]), tokenizer)
    path = write(tmp_path / "prompts.jsonl", [{"messages": [QUESTION]}])
    with pytest.raises(ValueError, match="limit is 0"):
        read_prompts(path, tokenizer, limit=0)
    with pytest.raises(ValueError, match="max_prompt_tokens is 0"):
        read_prompts(path, tokenizer, max_prompt_tokens=0)
    tokenizer.chat_template = families.GEMMA
    refused = [{"messages": [{"role": "system", "content": "x"}, QUESTION]}]
    with pytest.raises(MalformedDataError, match="line 1: refused by the chat template"):
        read_prompts(write(tmp_path / "system.jsonl", refused), tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ChatTemplateError, match="line 1"):
        read_prompts(path, tokenizer)
