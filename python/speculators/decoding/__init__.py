"""Decoding: drafting, verification, and the loop that joins them without changing the output.

====================  =============================================================================
``generation``        ``generate``, ``generate_stream``: the lossless loop
``settings``          ``GenerationSettings``: what a caller can choose
``drafters``          ``Drafter``: what drafts; ``NgramDrafter``, which needs no model
``chain``             ``ChainDrafter``: drafts with a model, one token after the other
``trees``             ``DynamicTree``, ``StaticTree``: the shapes of drafted trees
``tree_drafter``      ``TreeDrafter``: drafts several tokens after each, with a model
``suffix_drafter``    ``SuffixDrafter``: drafts what followed the same tokens before, by counts
``combined_drafter``  ``CombinedDrafter``: a model or matches, whichever expects more
``draft_models``      which drafter serves a model
``verification``      which drafted tokens are accepted: greedy, and by sampling
``sampling``          ``Sampling``: temperature, top-k, top-p; draws from random numbers
``stopping``          where a text ends
``acceptance``        ``AcceptanceCounts``: tau, and acceptance by position
``divergence``        where two continuations part, and by how little
====================  =============================================================================

The modules are imported when first named.
"""

from typing import TYPE_CHECKING

from speculators.lazy_facade import lazy_facade

if TYPE_CHECKING:  # for editors and type checkers, which do not run __getattr__
    from speculators.decoding.acceptance import AcceptanceCounts as AcceptanceCounts
    from speculators.decoding.chain import ChainDrafter as ChainDrafter
    from speculators.decoding.combined_drafter import CombinedDrafter as CombinedDrafter
    from speculators.decoding.divergence import Divergence as Divergence
    from speculators.decoding.divergence import first_divergence as first_divergence
    from speculators.decoding.draft_models import Shaped as Shaped
    from speculators.decoding.draft_models import WithSuffix as WithSuffix
    from speculators.decoding.drafters import Drafter as Drafter
    from speculators.decoding.drafters import NgramDrafter as NgramDrafter
    from speculators.decoding.drafters import Proposal as Proposal
    from speculators.decoding.generation import GenerationOutput as GenerationOutput
    from speculators.decoding.generation import generate as generate
    from speculators.decoding.generation import generate_stream as generate_stream
    from speculators.decoding.sampling import Sampling as Sampling
    from speculators.decoding.settings import GenerationSettings as GenerationSettings
    from speculators.decoding.suffix_drafter import SuffixDrafter as SuffixDrafter
    from speculators.decoding.suffix_drafter import suffix_corpus as suffix_corpus
    from speculators.decoding.tree_drafter import TreeDrafter as TreeDrafter
    from speculators.decoding.trees import DynamicTree as DynamicTree
    from speculators.decoding.trees import StaticTree as StaticTree

_DEFINED_IN = {
    "AcceptanceCounts": "speculators.decoding.acceptance",
    "ChainDrafter": "speculators.decoding.chain",
    "CombinedDrafter": "speculators.decoding.combined_drafter",
    "Divergence": "speculators.decoding.divergence",
    "Drafter": "speculators.decoding.drafters",
    "DynamicTree": "speculators.decoding.trees",
    "GenerationOutput": "speculators.decoding.generation",
    "GenerationSettings": "speculators.decoding.settings",
    "NgramDrafter": "speculators.decoding.drafters",
    "Proposal": "speculators.decoding.drafters",
    "Sampling": "speculators.decoding.sampling",
    "Shaped": "speculators.decoding.draft_models",
    "StaticTree": "speculators.decoding.trees",
    "SuffixDrafter": "speculators.decoding.suffix_drafter",
    "TreeDrafter": "speculators.decoding.tree_drafter",
    "WithSuffix": "speculators.decoding.draft_models",
    "first_divergence": "speculators.decoding.divergence",
    "generate": "speculators.decoding.generation",
    "generate_stream": "speculators.decoding.generation",
    "suffix_corpus": "speculators.decoding.suffix_drafter",
}
_MODULES = (
    "acceptance",
    "chain",
    "combined_drafter",
    "divergence",
    "draft_models",
    "drafters",
    "generation",
    "sampling",
    "settings",
    "stopping",
    "suffix_drafter",
    "verification",
)

__all__ = [*_DEFINED_IN]  # noqa: PLE0604 - all of them are strings

__getattr__, __dir__ = lazy_facade(__name__, _DEFINED_IN, _MODULES)
