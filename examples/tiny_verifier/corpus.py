"""The corpus: the Python standard library's own source, split once and for all by file name.

Every machine that can run this recipe already has the corpus, its licence is clear, and it is text
of the kind that draft models are good at (regular, with names that come back). A file is held out
when a hash of its relative path says so, never by chance or by position in a list: adding, losing
or changing files between CPython releases moves no file from one side to the other. Held-out files
are seen by nothing but evaluation: not by the tokenizer, not by training or its prompts.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_ONE_IN = 20
"""One file in this many is held out."""

EXCLUDED_FOLDERS = frozenset({"site-packages", "encodings", "pydoc_data", "data", "__pycache__"})
"""Third-party code, generated tables, and test data that merely looks like source."""

MINIMUM_CHARACTERS = 400
MINIMUM_DISTINCT_SHARE = 0.7
WINDOW = 256
WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class SourceFile:
    """One file: its path relative to the standard library's folder (POSIX form) and its text."""

    path: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether this file is kept for evaluation."""
        return is_held_out(self.path)


def standard_library() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def stable_hash(*parts: str | int) -> int:
    """A 64-bit integer that depends on nothing but `parts`: no process seed, no platform."""
    digest = hashlib.sha256("\0".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big")


def is_held_out(path: str) -> bool:
    """Whether the file at this relative POSIX path belongs to the evaluation side."""
    return stable_hash("split", path) % HELD_OUT_ONE_IN == 0


def distinct_share(items: Sequence[object], n: int) -> float:
    """Share of distinct n-grams among all n-grams of `items`; 1.0 where there is none."""
    total = len(items) - n + 1
    if total <= 0:
        return 1.0
    return len({tuple(items[i : i + n]) for i in range(total)}) / total


def is_repetitive(text: str) -> bool:
    """Whether a text mostly repeats itself, as tables and long lists of assertions do.

    A small model that learns from such files loops when it decodes greedily. The measure is the
    share of distinct 4-grams of words, averaged over windows of `WINDOW` words.
    """
    words = WORD.findall(text)
    shares = [distinct_share(words[i : i + WINDOW], 4) for i in range(0, len(words), WINDOW)]
    return sum(shares) < MINIMUM_DISTINCT_SHARE * len(shares)


def is_python(text: str) -> bool:
    """Whether the text is today's Python; files written to be rejected by a parser are not."""
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return False
    return True


def read_corpus(root: Path | None = None) -> list[SourceFile]:
    """Read every usable source file below `root`, in the order of their paths.

    Args:
        root: folder to read; the running interpreter's standard library by default.

    Returns:
        Files that are UTF-8, parse, do not repeat themselves, and whose text no earlier file has.

    Raises:
        FileNotFoundError: `root` holds no usable file.
    """
    root = standard_library() if root is None else root
    files: list[SourceFile] = []
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if EXCLUDED_FOLDERS.intersection(relative.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if len(text) < MINIMUM_CHARACTERS or text in seen:
            continue
        if is_repetitive(text) or not is_python(text):
            continue
        seen.add(text)
        files.append(SourceFile(relative.as_posix(), text))
    if not files:
        raise FileNotFoundError(
            f"no Python source file below {root}; expected the standard library's folder. "
            "Distributions that ship a stripped interpreter keep it in a package of its own."
        )
    return files


def split(files: Sequence[SourceFile]) -> tuple[list[SourceFile], list[SourceFile]]:
    """Part the files into (training, held out), keeping their order."""
    return [f for f in files if not f.held_out], [f for f in files if f.held_out]


def content_hash(files: Sequence[SourceFile]) -> str:
    """Hexadecimal SHA-256 over paths and texts: what a trained model was made from."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.path}\0{len(file.text)}\0{file.text}".encode())
    return digest.hexdigest()
