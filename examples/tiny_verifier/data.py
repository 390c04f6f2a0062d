"""From source files to blocks of token ids: one shuffled stream per pass over the corpus.

Every pass cuts the files anew: some stay whole, the others become conversations, so that several
passes over the same 20 MB do not show the same blocks again. All of it is a function of
(seed, pass number); a resumed run rebuilds the pass it stopped in and goes on inside it.

Blocks are cut from one long stream in which END_OF_TEXT ends every document. A block may hold the
end of one document and the beginning of another; for a model of this size a mask between them is
not worth its cost.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from examples.tiny_verifier.conversations import continuation, names_in, renaming, stretches
from examples.tiny_verifier.corpus import SourceFile, stable_hash
from examples.tiny_verifier.tokenizer import END_OF_TEXT
from torch import Tensor
from transformers import PreTrainedTokenizerFast

WHOLE_SHARE = 0.45
"""Share of files that a pass shows as they are."""

RENAME_SHARE = 0.3
"""Share of renamings among the conversations; the others are continuations."""


def name_pool(files: Sequence[SourceFile]) -> list[str]:
    """Identifiers that occur in at least two of the files: the names a renaming can choose from."""
    seen: set[str] = set()
    pool: set[str] = set()
    for file in files:
        names = set(names_in(file.text))
        pool |= names & seen
        seen |= names
    return sorted(pool)


def documents(
    file: SourceFile, names: Sequence[str], tokenizer: PreTrainedTokenizerFast, rng: random.Random
) -> Iterator[str]:
    """The texts that one file contributes to one pass, special tokens included."""
    if rng.random() < WHOLE_SHARE:
        yield file.text + END_OF_TEXT
        return
    for stretch in stretches(file.text, rng, 400, 1600):
        conversation = None
        if len(stretch) <= 900 and rng.random() < 2 * RENAME_SHARE:
            conversation = renaming(stretch, names, rng)
        conversation = conversation or continuation(stretch, rng)
        if conversation is not None:
            rendered = tokenizer.apply_chat_template(conversation.messages, tokenize=False)
            yield str(rendered).rstrip("\n") + END_OF_TEXT


def token_stream(
    files: Sequence[SourceFile],
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    number: int,
) -> Tensor:
    """All tokens of pass `number`, documents in random order.

    Returns:
        Token ids, shape [T], int32.
    """
    texts: list[str] = []
    for file in files:
        rng = random.Random(stable_hash("pass", seed, number, file.path))
        texts.extend(documents(file, names, tokenizer, rng))
    random.Random(stable_hash("order", seed, number)).shuffle(texts)
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return torch.tensor([i for e in encodings for i in e.ids], dtype=torch.int32)


class Batches:
    """Endless batches whose place is two integers, so that a checkpoint can hold it.

    Attributes:
        number: the current pass, from 0.
        used: tokens of that pass already given out.
    """

    def __init__(
        self,
        files: Sequence[SourceFile],
        tokenizer: PreTrainedTokenizerFast,
        seed: int,
        number: int = 0,
        used: int = 0,
    ) -> None:
        self.files = files
        self.names = name_pool(files)
        self.tokenizer = tokenizer
        self.seed = seed
        self.number = number
        self.used = used
        self._stream = self._read()

    def _read(self) -> Tensor:
        return token_stream(self.files, self.names, self.tokenizer, self.seed, self.number)

    def next(self, blocks: int, length: int) -> Tensor:
        """The next `blocks` blocks of `length` + 1 tokens: inputs and, shifted by one, targets.

        Returns:
            Token ids, shape [blocks, length + 1], int64. A pass too short for one batch is an
            error; its remainder, shorter than a batch, is dropped.
        """
        size = blocks * length
        if self._stream.numel() <= size:
            raise ValueError(
                f"a pass over the corpus has {self._stream.numel()} tokens, fewer than one batch "
                f"of {blocks} x {length}; use a smaller batch or more files"
            )
        if self.used + size + 1 > self._stream.numel():
            self.number, self.used = self.number + 1, 0
            self._stream = self._read()
        window = self._stream[self.used : self.used + size + 1].long()
        self.used += size
        return window.unfold(0, length + 1, length)
