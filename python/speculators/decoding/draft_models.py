"""From what a caller gives as a draft to the drafter that the loop runs.

Which drafter serves a model, the record of its algorithm says; how many tokens it drafts, its own
configuration.
"""

import dataclasses

from speculators.decoding.chain import ChainDrafter
from speculators.decoding.combined_drafter import CombinedDrafter
from speculators.decoding.drafters import Drafter
from speculators.decoding.sampling import GREEDY
from speculators.decoding.settings import GenerationSettings
from speculators.decoding.suffix_drafter import SuffixDrafter
from speculators.decoding.tree_drafter import TreeDrafter
from speculators.decoding.trees import Tree
from speculators.models.speculator_model import SpeculatorModel
from speculators.models.verifier.verifier import Verifier

# Of a drafter that does not say how many tokens it shall draft.
DEFAULT_DRAFT_TOKENS = 5


@dataclasses.dataclass(frozen=True)
class WithSuffix:
    """A draft model beside matches; each time the one that expects more tokens accepted drafts.

    Attributes:
        model: the draft.
        suffix: what drafts from matches.
    """

    model: SpeculatorModel
    suffix: SuffixDrafter = dataclasses.field(default_factory=SuffixDrafter)


@dataclasses.dataclass(frozen=True)
class Shaped:
    """A draft model that drafts in a way of its own, whatever the settings say.

    Attributes:
        model: the draft.
        num_draft_tokens: of its chains; None: as the settings or its configuration say.
        tree: the shape of its trees, in place of chains.

    Raises:
        ValueError: there are fewer than 1 tokens.
    """

    model: SpeculatorModel
    num_draft_tokens: int | None = None
    tree: Tree | None = None

    def __post_init__(self) -> None:
        """Checks the number."""
        if self.num_draft_tokens is not None and self.num_draft_tokens < 1:
            raise ValueError(
                f"num_draft_tokens is {self.num_draft_tokens}; expected at least 1, or None"
            )


Draft = Drafter | SpeculatorModel | Shaped | WithSuffix | None


def drafter_for(draft: Draft, verifier: Verifier, settings: GenerationSettings) -> Drafter | None:
    """The drafter of a draft: for a model the one that its algorithm's record names.

    Raises:
        ValueError: this is no draft, or the model does not fit the verifier, lies on another device
            than it, or drafts in a way that is not known.
    """
    if isinstance(draft, WithSuffix):
        model = drafter_for(draft.model, verifier, dataclasses.replace(settings, tree=None))
        assert model is not None  # noqa: S101 - for the type checker
        return CombinedDrafter(model, draft.suffix)
    if isinstance(draft, Shaped):
        settings = dataclasses.replace(settings, tree=draft.tree)
        draft = draft.model
    if not isinstance(draft, SpeculatorModel):
        _check_drafter(draft)
        return draft
    device = next(draft.parameters()).device
    if device != verifier.device:
        raise ValueError(
            f"the draft is on {device} and its verifier on {verifier.device}; expected both on one "
            f"device: draft.to({str(verifier.device)!r})"
        )
    if draft.spec.drafting != "chain":
        raise ValueError(
            f"the algorithm {draft.spec.name!r} drafts by {draft.spec.drafting!r}; expected 'chain'"
        )
    sampling = settings.sampling if settings.draft_sampling == "sample" else GREEDY
    if settings.tree is not None:
        return TreeDrafter(draft, verifier, settings.tree, sampling)
    return ChainDrafter(draft, verifier, sampling)


def _check_drafter(draft: object) -> None:
    if draft is None or (hasattr(draft, "propose") and not isinstance(draft, type)):
        return
    plain = isinstance(draft, str | type)
    found = repr(draft) if plain else f"of type {type(draft).__name__}"
    raise ValueError(
        f"the draft is {found}; expected a draft model (SpeculatorModel.from_pretrained reads "
        "one), Shaped or WithSuffix around one, a drafter such as NgramDrafter() or "
        "SuffixDrafter(), or None"
    )


def num_draft_tokens(draft: Draft, settings: GenerationSettings) -> int:
    """Tokens drafted before each verification: as the settings say, else as the draft does.

    Of a tree those on its longest branch.
    """
    if draft is None:
        return 0
    if isinstance(draft, Shaped):
        if draft.tree is not None:
            return draft.tree.depth
        if draft.num_draft_tokens is not None:
            return draft.num_draft_tokens
        draft = draft.model
    if settings.num_draft_tokens is not None:
        return settings.num_draft_tokens
    if isinstance(draft, WithSuffix):
        return num_draft_tokens(draft.model, settings)
    if isinstance(draft, SpeculatorModel):
        methods = draft.config.speculators_config
        for method in methods.proposal_methods:
            if method.proposal_type == methods.default_proposal_method:
                return int(getattr(method, "speculative_tokens", DEFAULT_DRAFT_TOKENS))
    return DEFAULT_DRAFT_TOKENS
