"""What a caller can choose about a generation, and how prompts are laid out and checked."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from speculators.decoding.sampling import GREEDY, Sampling
from speculators.decoding.trees import Tree
from speculators.models.verifier import rows

Prompts = Tensor | Sequence[Sequence[int]]

# How a draft model chooses its tokens when the verifier samples: as that does, or the most likely.
DraftSampling = Literal["sample", "greedy"]


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """How a batch is generated.

    Attributes:
        max_new_tokens: tokens that each sequence may get, at least 1.
        max_length: tokens that a sequence may have in all, its prompt included; None: as many as
            the verifier has positions for, by its configuration's ``max_position_embeddings``. In
            any case no more than ``Verifier.growth_limit``.
        sampling: greedy decoding, or temperature, top-k and top-p.
        num_draft_tokens: tokens drafted before each verification, at least 1; None: what the draft
            model's configuration says, 5 for other drafters.
        tree: the shape of the trees that a draft model drafts; None: chains.
        draft_sampling: how a draft model chooses its tokens when the verifier samples: ``"sample"``
            draws them with the same settings, ``"greedy"`` takes the most likely ones. The output
            has the verifier's distribution either way. Drafters that are given ready-made do as
            they were told when they were made.
        eos_token_ids: tokens that end a sequence; None: the verifier's, ``()``: none.
        stop_strings: strings that end it; see :class:`~speculators.decoding.stopping.Stopping`.

    Raises:
        ValueError: a value is out of its range.
    """

    max_new_tokens: int = 256
    max_length: int | None = None
    sampling: Sampling = GREEDY
    num_draft_tokens: int | None = None
    tree: Tree | None = None
    draft_sampling: DraftSampling = "sample"
    eos_token_ids: tuple[int, ...] | None = None
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Checks the ranges."""
        for name in ("max_new_tokens", "max_length", "num_draft_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        if self.draft_sampling not in {"sample", "greedy"}:
            raise ValueError(
                f"draft_sampling is {self.draft_sampling!r}; expected 'sample' or 'greedy'"
            )
        ids: object = self.eos_token_ids
        if isinstance(ids, int):
            raise ValueError(f"eos_token_ids is {ids}; expected a tuple of token ids: ({ids},)")
        stop_strings: object = self.stop_strings
        if isinstance(stop_strings, str):  # else each of its characters would be one
            raise ValueError(f"stop_strings is {stop_strings!r}; expected a tuple of strings")


def pad_prompts(
    prompts: Prompts, attention_mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Prompts as a batch that is padded on the left.

    Args:
        prompts: token ids, one list for each prompt, or int64 ``[B, T]``.
        attention_mask: for a tensor ``[B, T]``: 0 for padding, which is on the left, 1 for tokens.

    Returns:
        int64 ``[B, T]``, and the mask ``[B, T]``, None where nothing is padded.

    Raises:
        ValueError: there are no prompts, an empty one, or a mask for lists.
    """
    if isinstance(prompts, Tensor):
        return prompts, attention_mask
    lengths = [len(prompt) for prompt in prompts]
    if attention_mask is not None or not lengths or min(lengths) == 0:
        raise ValueError(
            f"got prompts of {lengths} tokens"
            + ("" if attention_mask is None else " with an attention mask")
            + "; expected at least one list of at least one token, and a mask for a tensor only"
        )
    width = max(lengths)
    padded = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    if min(lengths) == width:
        return padded, None
    return padded, torch.arange(width) >= width - torch.tensor(lengths)[:, None]


def check_prompts(input_ids: Tensor, attention_mask: Tensor | None, vocab_size: int) -> list[int]:
    """Looks at prompts before a model reads them.

    Args:
        input_ids: ``[B, T]``.
        attention_mask: ``[B, T]``, as :func:`pad_prompts` gives it.
        vocab_size: V, the ids that the verifier knows.

    Returns:
        How many tokens each prompt has.

    Raises:
        ValueError: these are no token ids, the padding is not on the left, or an id is not of the
            vocabulary.
    """
    rows.check_token_ids(input_ids)
    lengths: list[int] = rows.row_lengths(input_ids, attention_mask).tolist()
    low, high = (int(end) for end in input_ids.aminmax())
    if low < 0 or high >= vocab_size:
        found = low if low < 0 else high
        row = int((input_ids == found).any(1).int().argmax())
        raise ValueError(
            f"prompt {row} has token id {found}; expected 0 to {vocab_size - 1}, the verifier's "
            "vocabulary, also for padding: encode it with the verifier's tokenizer"
        )
    return lengths
