"""A conversation as token ids, and which of them the assistant said.

The mask comes from the chat template itself, in one of two ways, both in characters of the text
that the template renders; the tokenizer's offsets then say which tokens these are.

1. A template with ``{% generation %}`` says it.
2. Else the template is asked what the server asks it: what it renders BEFORE a message of the
   assistant, generation prompt included, and what it renders up to and WITH the message. Both must
   be prefixes of the whole text; between them lies what the assistant said, with the mark that
   ends its turn.

Some templates (Qwen3) render a message otherwise once others follow: they drop its reasoning. Then
the prefixes do not agree, and no mask is right: the text has what the verifier never says at that
point. That is an error here, never a guess. In the last turn nothing has been dropped yet, so
``last_turn_only`` works with these templates too.

Whitespace that a template puts after the end-of-turn mark is not learned, since the assistant has
stopped there; neither is an end-of-text token that it puts after the last message alone (Phi-3).
No special tokens are added to the rendered text, so there is one begin-of-text token if the
template writes it and none if not, as when serving.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from speculators.data.records import Message

Span = tuple[int, int]
_OTHER_TEMPLATE = (
    "Use a chat template that marks what the assistant says with {% generation %} and "
    "{% endgeneration %}"
)
_LAST_TURN = f"Learn the last turn only (last_turn_only=True). Or: {_OTHER_TEMPLATE}"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers looks for it


class ChatTemplateError(ValueError):
    """The template does not tell what the assistant said; no mask would be right."""


class ConversationRefusedError(ValueError):
    """The template refuses this conversation, such as a role that it does not know."""


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None = None,
    *,
    last_turn_only: bool = False,
    add_generation_prompt: bool = False,
    template_arguments: Mapping[str, Any] | None = None,
) -> tuple[list[int], list[bool]]:
    """Renders a conversation with the tokenizer's chat template.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        messages: with ``role`` and ``content``, and what else the template uses.
        tools: JSON schemas of the tools, if any.
        last_turn_only: learn only what the assistant said after the last message of the user
            (several messages, if it called tools).
        add_generation_prompt: whether to end with what asks the assistant to speak.
        template_arguments: further variables of the template, such as ``enable_thinking``.

    Returns:
        The token ids, and for each whether the assistant said it. A conversation without an
        answer has nothing learnable.

    Raises:
        ChatTemplateError: there is no template, or it does not tell what the assistant said.
        ConversationRefusedError: the template raised an error for this conversation.
        ValueError: the tokenizer is a slow one.
    """
    check_tokenizer(tokenizer)
    rendering = _Rendering(tokenizer, messages, tools, template_arguments or {})
    text, generated = rendering.render(messages, add_generation_prompt)
    first = 0  # the first message that may be learned
    if last_turn_only:
        first = max((n for n, m in enumerate(messages, 1) if m["role"] == "user"), default=0)
    if generated and first > 0:
        start = rendering.end_of_first(first, text)
        generated = [span for span in generated if span[0] >= start]
    spans = generated or [
        rendering.said(number, text)
        for number in range(first, len(messages))
        if messages[number]["role"] == "assistant"
    ]
    return _tokenize(tokenizer, text, spans)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError unless the tokenizer can say which characters a token stands for."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} is a slow tokenizer, which does not tell which characters "
            "a token stands for; expected a fast one, with a tokenizer.json"
        )


class _Rendering:
    """What the template makes of a conversation and of its beginnings."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None,
        arguments: Mapping[str, Any],
    ) -> None:
        self._messages = messages
        self._tools: list[Any] | None = list(tools) if tools else None
        self._eos = str(tokenizer.eos_token or "")
        self._variables = {**tokenizer.special_tokens_map, **arguments}
        try:
            self._source = tokenizer.get_chat_template(tools=self._tools)
        except ValueError as error:
            raise ChatTemplateError(str(error)) from error

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """The text, and the spans of its generation blocks that hold something."""
        try:
            rendered: Any = render_jinja_template(
                [list(messages)],
                tools=self._tools,
                chat_template=self._source,
                return_assistant_tokens_mask=bool(_GENERATION.search(self._source)),
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except ImportError:
            raise
        except Exception as error:  # a template is foreign code and may raise anything
            roles = ", ".join(message["role"] for message in messages) or "no message"
            raise ConversationRefusedError(
                f"refused by the chat template: {error} (rendering {roles})"
            ) from error
        texts, spans = rendered
        return texts[0], [span for span in (spans[0] if spans else []) if span[0] < span[1]]

    def end_of_first(self, count: int, text: str, remedy: str = _OTHER_TEMPLATE) -> int:
        """Where in ``text``, the whole, the first ``count`` messages end."""
        prefix, _ = self.render(self._messages[:count])
        if self._eos and prefix.endswith(self._eos):
            # Does it end the last message, or the conversation? Then it goes when a turn follows.
            continued, _ = self.render(self._messages[:count], add_generation_prompt=True)
            if not continued.startswith(prefix):
                prefix = prefix.removesuffix(self._eos)
        _check_prefix(prefix, text, f"the first {count} messages", remedy)
        return len(prefix)

    def said(self, number: int, text: str) -> Span:
        """The span of ``text`` that the assistant said in message ``number``."""
        earlier = any(message["role"] == "user" for message in self._messages[number + 1 :])
        remedy = _LAST_TURN if earlier else _OTHER_TEMPLATE
        before, _ = self.render(self._messages[:number], add_generation_prompt=True)
        _check_prefix(before, text, f"what precedes message {number}", remedy)
        end = self.end_of_first(number + 1, text, remedy)
        start = len(before)
        message = self._messages[number]
        content = str(message.get("content") or "").strip()
        span = text[start:end]
        leads = message.keys() <= {"role", "content"} and not span.lstrip().startswith(content)
        if leads and before == self.render(self._messages[:number])[0]:
            raise ChatTemplateError(
                f"the chat template has no generation prompt and renders message {number} as "
                f"{span[:40]!r}, so that what the assistant said cannot be told from what leads "
                f"up to it. {_OTHER_TEMPLATE}"
            )
        if not content or not span.rstrip().endswith(content):  # a mark follows the content
            end = start + len(span.rstrip())
        return start, end


def _check_prefix(prefix: str, text: str, what: str, remedy: str) -> None:
    if text.startswith(prefix):
        return
    pairs = zip(prefix, text, strict=False)
    same = next((n for n, (one, other) in enumerate(pairs) if one != other), len(text))
    shown = slice(max(0, same - 20), same + 40)
    raise ChatTemplateError(
        f"the chat template renders {what} otherwise once more follows: {prefix[shown]!r} becomes "
        f"{text[shown]!r}, so that the verifier would not say what stands there (templates that "
        f"drop reasoning from earlier turns do this). {remedy}"
    )


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Span]
) -> tuple[list[int], list[bool]]:
    """The tokens of a text, and for each whether it stands for some character of the spans."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    mask = [False] * len(encoding["input_ids"])
    number = 0
    for token, (start, end) in enumerate(encoding["offset_mapping"]):
        # Tokens of spaces alone may have lost them and stand at their end, with no width.
        first = start if start < end else start - 1
        while number < len(spans) and spans[number][1] <= first:
            number += 1
        mask[token] = number < len(spans) and spans[number][0] < max(end, first + 1)
    return list(encoding["input_ids"]), mask
