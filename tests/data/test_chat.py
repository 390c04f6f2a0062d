"""Loss masks from chat templates: what is learnable, decoded, is what the assistant said."""

import pathlib
from typing import Any

import pytest
import tests.data.templates as families
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from tokenizers.processors import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from speculators.data.chat import ChatTemplateError, ConversationRefusedError, render

TINY = pathlib.Path("examples/tiny_verifier/model")

SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "Capital of France?"},
    {"role": "assistant", "content": "Paris, café 😀"},
    {"role": "user", "content": "And the river?\n"},
    {"role": "assistant", "content": "The Seine.\n\n    It flows\n"},
]
REASONING = [
    {"role": "user", "content": "One and one?"},
    {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\nTwo."},
    {"role": "user", "content": "And three?"},
    {"role": "assistant", "content": "<think>\nAdd it.\n</think>\n\nFive."},
]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}
TOOL_TURN: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather in Ulm?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "12 degrees"},
    {"role": "assistant", "content": "It is cool."},
]


@pytest.fixture(scope="module")
def loaded() -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(TINY)
    return tokenizer


@pytest.fixture
def tokenizer(loaded: PreTrainedTokenizerBase) -> Any:
    """The tiny verifier's tokenizer; a test may set its template."""
    own = loaded.chat_template
    yield loaded
    loaded.chat_template = own


def said(tokenizer: PreTrainedTokenizerBase, messages: Any, *args: Any, **kwargs: Any) -> list[str]:
    """What is learnable, each stretch of neighbouring tokens decoded."""
    ids, mask = render(tokenizer, messages, *args, **kwargs)
    assert len(ids) == len(mask)
    stretches: list[list[int]] = []
    for number, (token, learnable) in enumerate(zip(ids, mask, strict=True)):
        if learnable:
            if number == 0 or not mask[number - 1]:
                stretches.append([])
            stretches[-1].append(token)
    return [str(tokenizer.decode(stretch)) for stretch in stretches]


FAMILIES = {
    "qwen25": (families.QWEN25, "", "<|im_end|>", True),
    "llama31": (families.LLAMA31, "", "<|eot_id|>", True),
    "mistral": (families.MISTRAL, " ", "<|im_end|>", True),
    "gemma": (families.GEMMA, "", "<end_of_turn>", False),
    "deepseek_r1": (families.DEEPSEEK_R1, "", "<\uff5cend▁of▁sentence\uff5c>", True),
    "phi3": (families.PHI3, "", "<|end|>", True),
    "zephyr": (families.ZEPHYR, "", "<|im_end|>", True),
}
TRIMS = {"llama31", "mistral", "gemma"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("last_turn_only", [False, True])
def test_what_is_learnable_is_what_the_assistant_said(
    tokenizer: PreTrainedTokenizerBase, family: str, last_turn_only: bool
) -> None:
    tokenizer.chat_template, lead, end, has_system = FAMILIES[family]
    messages = [SYSTEM, *TURNS] if has_system else TURNS
    contents = [turn["content"] for turn in TURNS if turn["role"] == "assistant"]
    if family in TRIMS:
        contents = [content.strip() for content in contents]
    expected = [lead + content + end for content in contents]
    if last_turn_only:
        expected = expected[-1:]
    found = said(tokenizer, messages, last_turn_only=last_turn_only)
    # A mark that is no token of this tokenizer shares its last token with what follows.
    assert [text.rstrip() for text in found] == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_the_template_with_one_begin_of_text(
    tokenizer: PreTrainedTokenizerBase, family: str
) -> None:
    tokenizer.chat_template = FAMILIES[family][0]
    ids, _ = render(tokenizer, TURNS)
    assert ids == tokenizer.apply_chat_template(TURNS, return_dict=False)
    has_bos = family in {"llama31", "mistral", "gemma", "deepseek_r1"}
    assert ids.count(tokenizer.bos_token_id) == int(has_bos)


def test_a_tokenizer_that_adds_begin_of_text_adds_no_second_one() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.backend_tokenizer.post_processor = _adds_bos(tokenizer)
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    tokenizer.chat_template = families.LLAMA31
    assert render(tokenizer, TURNS)[0].count(tokenizer.bos_token_id) == 1


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> Any:
    from tokenizers.processors import TemplateProcessing

    bos = str(tokenizer.bos_token)
    return TemplateProcessing(f"{bos} $A", None, [(bos, tokenizer.bos_token_id)])


def test_generation_spans_are_as_transformers_has_them(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [SYSTEM, *TURNS, TURNS[0]]
    ids, mask = render(tokenizer, messages)
    theirs: Any = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    assert ids == theirs["input_ids"]
    assert mask == [bool(learnable) for learnable in theirs["assistant_masks"]]
    assert sum(mask) > 10


def test_prefixes_give_the_mask_of_generation_spans(tokenizer: PreTrainedTokenizerBase) -> None:
    marked = str(tokenizer.chat_template)
    for messages in ([SYSTEM, *TURNS], [*TURNS, TURNS[0]], [TURNS[0], TURNS[1], TURNS[3]]):
        for last_turn_only in (False, True):
            tokenizer.chat_template = marked
            expected = render(tokenizer, messages, last_turn_only=last_turn_only)
            tokenizer.chat_template = marked.replace("{%- generation -%}", "").replace(
                "{%- endgeneration -%}", ""
            )
            assert render(tokenizer, messages, last_turn_only=last_turn_only) == expected


def test_qwen3_keeps_reasoning_in_the_last_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = families.QWEN3
    expected = ["<think>\nAdd it.\n</think>\n\nFive.<|im_end|>"]
    assert said(tokenizer, REASONING[2:]) == expected
    assert said(tokenizer, REASONING, last_turn_only=True) == expected
    apart = {"role": "assistant", "content": "Five.", "reasoning_content": "Add it."}
    assert said(tokenizer, [*REASONING[:3], apart], last_turn_only=True) == expected


@pytest.mark.parametrize("messages", [REASONING, TURNS])
def test_qwen3_in_earlier_turns_is_an_error_that_names_the_remedies(
    tokenizer: PreTrainedTokenizerBase, messages: Any
) -> None:
    # Without reasoning too: the template would write an empty one if the turn were the last.
    tokenizer.chat_template = families.QWEN3
    with pytest.raises(ChatTemplateError, match=r"(?s)think.*last_turn_only=True.*generation"):
        render(tokenizer, messages)


def test_qwen3_with_generation_spans_has_all_turns(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = families.QWEN3_MARKED
    last = "<think>\nAdd it.\n</think>\n\nFive.<|im_end|>"
    assert said(tokenizer, REASONING) == ["Two.<|im_end|>", last]
    assert said(tokenizer, REASONING, last_turn_only=True) == [last]


def test_template_arguments_reach_the_template(tokenizer: PreTrainedTokenizerBase) -> None:
    # Told not to think, the server writes the empty reasoning itself.
    tokenizer.chat_template = families.QWEN3
    messages = [TURNS[0], {"role": "assistant", "content": "Paris."}]
    assert said(tokenizer, messages) == ["<think>\n\n</think>\n\nParis.<|im_end|>"]
    found = said(tokenizer, messages, template_arguments={"enable_thinking": False})
    assert found == ["Paris.<|im_end|>"]


def test_deepseek_drops_reasoning_in_every_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = families.DEEPSEEK_R1
    end = "<\uff5cend▁of▁sentence\uff5c>"
    assert said(tokenizer, REASONING) == [f"\n\nTwo.{end}", f"\n\nFive.{end}"]


@pytest.mark.parametrize("last_turn_only", [False, True])
def test_a_generation_prompt_that_the_template_drops_is_an_error(
    tokenizer: PreTrainedTokenizerBase, last_turn_only: bool
) -> None:
    tokenizer.chat_template = families.DEEPSEEK_R1_OPENED
    with pytest.raises(ChatTemplateError, match="otherwise once more follows") as caught:
        render(tokenizer, REASONING[:2], last_turn_only=last_turn_only)
    assert "last_turn_only" not in str(caught.value), "it would be no remedy"


@pytest.mark.parametrize(
    ("template", "call", "end"),
    [
        (
            families.QWEN25,
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>',
            "<|im_end|>",
        ),
        (
            families.LLAMA31,
            '{"name": "weather", "parameters": {"city": "Ulm"}}',
            "<|eot_id|>",
        ),
    ],
)
def test_tool_calls_are_learned_and_their_answers_are_not(
    tokenizer: PreTrainedTokenizerBase, template: str, call: str, end: str
) -> None:
    tokenizer.chat_template = template
    messages = [*TURNS[:2], *TOOL_TURN]
    expected = [call + end, "It is cool." + end]
    assert said(tokenizer, messages, [TOOL])[1:] == expected
    assert said(tokenizer, messages, [TOOL], last_turn_only=True) == expected
    assert '"weather"' in tokenizer.decode(render(tokenizer, TURNS, [TOOL])[0])


def test_a_conversation_of_prompts_has_nothing_learnable(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    for template in (str(tokenizer.chat_template), families.QWEN3, families.GEMMA):
        tokenizer.chat_template = template
        assert said(tokenizer, TURNS[:1]) == []
        assert said(tokenizer, [*TURNS[2:], TURNS[0]], last_turn_only=True) == []
        ids, mask = render(tokenizer, TURNS[:1], add_generation_prompt=True)
        assert str(tokenizer.decode(ids)).endswith(("assistant\n", "model\n"))
        assert not any(mask)


ENDS_IN_SPACES = (
    "{% for m in messages %}{% if m.role == 'user' %}USER:{{ m.content }}   {% else %}"
    "ASSISTANT:   {{ m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:   {% endif %}"
)


@pytest.mark.parametrize("template", [families.QWEN25, families.PHI3, ENDS_IN_SPACES])
def test_offsets_without_their_spaces_give_the_same_mask(template: str) -> None:
    # Llama-3 and Qwen have tokenizers whose offsets leave out spaces: tokens of spaces alone are
    # at their end, with no width.
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = template
    content = "\n\ttwo    spaces   \n   x   "
    messages = [TURNS[0], {"role": "assistant", "content": content}]
    plain = render(tokenizer, messages)
    assert said(tokenizer, messages)[0].strip().startswith(content.strip())
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    offsets = tokenizer("two    spaces", return_offsets_mapping=True)["offset_mapping"]
    assert any(start == end for start, end in offsets)
    assert render(tokenizer, messages) == plain


def test_sentencepiece_tokenizers_with_spaces_as_part_of_words() -> None:
    backend = Tokenizer(models.BPE(byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False
    )
    texts = [str(turn["content"]) for turn in [*TURNS, *REASONING]]
    backend.train_from_iterator([*texts, "[INST]  [/INST]<|user|>\n<|assistant|>"], trainer)
    backend.decoder = decoders.Replace("▁", " ")
    special: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    for template, lead in ((families.MISTRAL, " "), (families.ZEPHYR, "")):
        tokenizer.chat_template = template
        contents = [str(turn["content"]) for turn in TURNS[1::2]]
        found = said(tokenizer, TURNS)
        expected = [lead + (text.strip() if lead else text) + "</s>" for text in contents]
        assert found == expected


def test_a_template_whose_generation_blocks_are_never_reached(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    block = "{% if marked is defined %}{% generation %}{% endgeneration %}{% endif %}"
    tokenizer.chat_template = families.GEMMA
    expected = render(tokenizer, TURNS)
    tokenizer.chat_template = families.GEMMA + block
    assert render(tokenizer, TURNS) == expected


def test_what_the_template_refuses(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = families.GEMMA
    with pytest.raises(ConversationRefusedError, match="System role not supported"):
        render(tokenizer, [SYSTEM, *TURNS])
    tokenizer.chat_template = families.MISTRAL
    with pytest.raises(ConversationRefusedError, match="must alternate"):
        render(tokenizer, [TURNS[0], TURNS[0]])
    with pytest.raises(ConversationRefusedError, match="refused by the chat template"):
        render(tokenizer, [])


def test_a_template_without_generation_prompt_and_with_headers_is_an_error(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    # Else the header would be learned as if the assistant had said it.
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% endfor %}"
    )
    with pytest.raises(ChatTemplateError, match="no generation prompt"):
        render(tokenizer, TURNS)


def test_no_template_and_no_fast_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = None
    with pytest.raises(ChatTemplateError, match="chat_template is not set"):
        render(tokenizer, TURNS)

    class Slow:
        is_fast = False

    slow: Any = Slow()
    with pytest.raises(ValueError, match="Slow is a slow tokenizer"):
        render(slow, TURNS)
