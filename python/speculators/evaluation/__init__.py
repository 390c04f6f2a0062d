"""Evaluation: how many tokens a draft saves, how fast that is, and whether the text stays the same.

=========================  =======================================================================
``evaluate``               the stage: held-out prompts, several drafters side by side, one report
``prompts``                conversations, texts or token ids from files -> prompts
``search``                 which number of tokens, or which tree, is fastest
``suffix_corpus``          earlier outputs for the suffix drafter, from files
``acceptance``             tau with its interval, acceptance by position, from what the loop counted
``decoders``               what is compared: plain decoding, with each drafter, transformers' own
``transformers_generate``  the baseline
``comparison``             whether two decodings gave the same tokens; if not, by how little
``speed``                  clocks, and decoders that take turns
``results``                what a report says of one decoder, typed
``report``                 ``EvaluationReport``: report.json, report.md, the plot, and a table
``plot``                   acceptance by position as a picture
=========================  =======================================================================

The modules are imported when first named.
"""

from typing import TYPE_CHECKING

from speculators.lazy_facade import lazy_facade

if TYPE_CHECKING:  # for editors and type checkers, which do not run __getattr__
    from speculators.evaluation.prompts import Prompt as Prompt
    from speculators.evaluation.prompts import read_prompts as read_prompts
    from speculators.evaluation.report import EvaluationReport as EvaluationReport
    from speculators.evaluation.report import table as table
    from speculators.evaluation.results import DrafterResult as DrafterResult
    from speculators.evaluation.suffix_corpus import read_suffix_corpus as read_suffix_corpus

_DEFINED_IN = {
    "DrafterResult": "speculators.evaluation.results",
    "EvaluationReport": "speculators.evaluation.report",
    "Prompt": "speculators.evaluation.prompts",
    "read_prompts": "speculators.evaluation.prompts",
    "read_suffix_corpus": "speculators.evaluation.suffix_corpus",
    "table": "speculators.evaluation.report",
}
# The stage is speculators.evaluation.evaluate.evaluate: a module and a function cannot both be
# named evaluate here, as for the stages of speculators.data.
_MODULES = (
    "acceptance",
    "comparison",
    "decoders",
    "evaluate",
    "plot",
    "prompts",
    "report",
    "results",
    "search",
    "speed",
    "suffix_corpus",
    "transformers_generate",
)

__all__ = [*_DEFINED_IN]  # noqa: PLE0604 - all of them are strings

__getattr__, __dir__ = lazy_facade(__name__, _DEFINED_IN, _MODULES)
