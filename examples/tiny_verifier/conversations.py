"""Conversations made from source files: the two things so small a verifier can be asked to do.

*Continue*: the user gives the beginning of a stretch of code, the assistant goes on. The text is
the file's own, so nothing is invented. *Rename*: the user gives a stretch of code and two names,
the assistant gives it back with one name for the other. An answer that mostly copies its prompt is
what suffix and n-gram drafting exist for, and it cannot loop unless the code itself does.
"""

from __future__ import annotations

import keyword
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

CONTINUE = "Continue this Python code:\n\n"
RENAME = "Rename `{old}` to `{new}`:\n\n"

IDENTIFIER = re.compile(r"\b[A-Za-z_][A-Za-z0-9_]{2,23}\b")


@dataclass(frozen=True)
class Conversation:
    """One question and its answer."""

    user: str
    assistant: str

    @property
    def prompt(self) -> list[dict[str, str]]:
        """The messages up to the answer, as a chat template takes them."""
        return [{"role": "user", "content": self.user}]

    @property
    def messages(self) -> list[dict[str, str]]:
        """The whole conversation, as a chat template takes it."""
        return [*self.prompt, {"role": "assistant", "content": self.assistant}]


def stretches(text: str, rng: random.Random, low: int, high: int) -> Iterator[str]:
    """Cut a text at line ends into stretches of `low` to `high` characters; the rest is dropped.

    A stretch ends before an empty line where one lies in its last third, so that most answers end
    where a statement or a function does. A single line longer than `high` is dropped too.
    """
    lines = text.splitlines(keepends=True)
    start = 0
    while start < len(lines):
        target = rng.randint(low, high)
        size, end, blank = 0, start, None
        while end < len(lines) and size + len(lines[end]) <= target:
            if not lines[end].strip() and size > target * 2 // 3:
                blank = end
            size += len(lines[end])
            end += 1
        end = blank or end
        stretch = "".join(lines[start:end]).strip("\n")
        if len(stretch) >= low * 2 // 3:
            yield stretch
        start = max(end, start + 1)


def continuation(stretch: str, rng: random.Random) -> Conversation | None:
    """Part a stretch at a line end, about a third from its beginning; None where that fails."""
    cut = stretch.find("\n", int(len(stretch) * rng.uniform(0.2, 0.5)))
    first, second = stretch[: cut + 1].rstrip("\n"), stretch[cut + 1 :].strip("\n")
    if cut < 0 or not first or not second.strip():
        return None
    return Conversation(CONTINUE + first, second)


def names_in(text: str) -> Counter[str]:
    """How often each identifier of 3 to 24 characters that is no keyword occurs."""
    return Counter(n for n in IDENTIFIER.findall(text) if not keyword.iskeyword(n))


def renaming(stretch: str, names: Sequence[str], rng: random.Random) -> Conversation | None:
    """Rename an identifier that occurs at least twice to one of `names`; None where none does."""
    counts = names_in(stretch)
    olds = sorted(name for name, count in counts.items() if count >= 2)
    news = [name for name in rng.sample(names, min(8, len(names))) if name not in counts]
    if not olds or not news:
        return None
    old, new = rng.choice(olds), news[0]
    answer = re.sub(rf"\b{re.escape(old)}\b", new, stretch)
    return Conversation(RENAME.format(old=old, new=new) + stretch, answer)
