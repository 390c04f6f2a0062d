"""The decoders that are compared, and what a reader must know of those that are not ours."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Final

from speculators.decoding.draft_models import Shaped, WithSuffix
from speculators.decoding.drafters import NgramDrafter
from speculators.decoding.suffix_drafter import SuffixDrafter
from speculators.decoding.trees import Tree
from speculators.evaluation.decoders import Batches, Run
from speculators.models.speculator_model import SpeculatorModel
from speculators.models.verifier.verifier import Verifier

LOOKUP_TOKENS: Final = 10
"""What the documentation of transformers' prompt lookup uses."""

NOTES: Final = """\
- Tau is that of our loop; transformers does not count.
- Transformers' assisted generation takes a causal language model as its assistant; our drafts,
  which read the verifier's states, are none.
- Early exit is its assisted generation without a second model: the verifier's own first layers
  draft. Verifiers must be trained for that (LayerSkip), and few are. On another verifier the row
  shows what it costs, not what it can do."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What was asked for.

    Attributes:
        draft: a folder or Hub name.
        prompts: how many.
        max_new_tokens: of each.
        k: tokens of our chains; None: as the draft says.
        repeats: how often each decoder does each prompt.
        warmup: prompts that all decoders do first, with no clock running.
    """

    draft: str
    prompts: int
    max_new_tokens: int
    k: int | None
    repeats: int
    warmup: int


def named_decoders(
    batches: Batches, verifier: Verifier, model: SpeculatorModel, trees: Sequence[Tree]
) -> dict[str, Run]:
    """The decoders by name: transformers' ``generate`` first, which the others are compared with.

    Args:
        batches: the prompts.
        verifier: whose text it is.
        model: the draft.
        trees: shapes of trees that it drafts, beside chains.
    """
    chain = batches.k(model)
    half = verifier.num_layers // 2
    early_exit: dict[str, Any] = {
        "assistant_early_exit": half,
        "num_assistant_tokens": chain,
        "num_assistant_tokens_schedule": "constant",
    }
    return {
        "transformers, generate": batches.transformers(),
        f"transformers, prompt lookup, {LOOKUP_TOKENS} tokens": batches.transformers(
            {"prompt_lookup_num_tokens": LOOKUP_TOKENS}
        ),
        f"transformers, early exit, {half} layers, {chain} tokens": batches.transformers(
            early_exit
        ),
        "plain": batches.plain(),
        f"n-gram, {chain} tokens": batches.speculative(NgramDrafter()),
        f"suffix, {chain} tokens": batches.speculative(SuffixDrafter()),
        f"draft, chain, {chain} tokens": batches.speculative(model),
        **{f"draft, tree, {tree}": batches.speculative(Shaped(model, tree=tree)) for tree in trees},
        f"draft + suffix, {chain} tokens": batches.speculative(WithSuffix(model)),
    }
