"""The number of drafted tokens, or the tree, that is fastest for a draft, a verifier and a machine.

More drafted tokens are accepted with more nodes, but each costs time, in the draft and in the
verifier; where the best place is depends on both models and on the machine. So candidates are not
modelled but timed: all of them on a few prompts, the better ones on more, until few are left.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from speculators.decoding.draft_models import Shaped
from speculators.decoding.trees import DynamicTree, StaticTree
from speculators.evaluation.evaluate import AnyDrafter
from speculators.evaluation.prompts import Prompt
from speculators.evaluation.report import EvaluationReport
from speculators.models.speculator_model import SpeculatorModel
from speculators.models.verifier import UnsupportedVerifierError, Verifier

CHAINS = (1, 2, 3, 4, 5, 6, 8)
STATIC = ((2, 1, 1), (2, 2, 1), (3, 1, 1, 1), (4, 2, 1, 1), (2, 2, 1, 1, 1), (2, 2, 2, 1, 1))
DYNAMIC = (
    DynamicTree(6, 3, 3),
    DynamicTree(10, 4, 3),
    DynamicTree(16, 4, 4),
    DynamicTree(16, 6, 4),
    DynamicTree(24, 5, 6),
    DynamicTree(32, 6, 8),
    DynamicTree(48, 6, 10),
    DynamicTree(60, 6, 10),
)
KEPT = 3
"""Candidates in the last round, or all if there are fewer."""

Evaluate = Callable[[Mapping[str, AnyDrafter], Sequence[Prompt]], EvaluationReport]


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        name: of the fastest.
        draft: the draft, drafting so.
        rounds: the reports, the first with all candidates.
    """

    name: str
    draft: Shaped
    rounds: list[EvaluationReport]


def candidates(model: SpeculatorModel, verifier: Verifier) -> dict[str, Shaped]:
    """Chains, and trees if the verifier can read them, that are worth a try, by name."""
    found = {f"chain, k={k}": Shaped(model, num_draft_tokens=k) for k in CHAINS}
    try:
        verifier.check_trees()
    except UnsupportedVerifierError:
        return found
    for widths in STATIC:
        name = ",".join(map(str, widths))
        found[f"tree={name}"] = Shaped(model, tree=StaticTree.of_widths(widths))
    for tree in DYNAMIC:
        name = f"tree=dynamic, nodes={tree.nodes}, depth={tree.depth}, children={tree.children}"
        found[name] = Shaped(model, tree=tree)
    return found


def search(drafts: Mapping[str, Shaped], prompts: Sequence[Prompt], evaluate: Evaluate) -> Found:
    """Times candidates in rounds; half of them go on to each next one, on twice the prompts.

    Args:
        drafts: the candidates, see :func:`candidates`.
        prompts: to time them on; best not those that the winner is reported on.
        evaluate: measures drafters on prompts.

    Raises:
        ValueError: there are no candidates or no prompts.
    """
    if not drafts or not prompts:
        raise ValueError(
            f"got {len(drafts)} candidates and {len(prompts)} prompts; expected at least one each"
        )
    rounds = []
    left = dict(drafts)
    halvings = max(0, math.ceil(math.log2(len(left) / KEPT)))
    while True:
        part = prompts[: max(1, len(prompts) >> halvings)]
        rounds.append(evaluate(left, part))
        speed = {name: r.speed.tokens_per_second for name, r in rounds[-1].drafters.items()}
        best = sorted(left, key=lambda name: -speed[name])
        if halvings == 0:
            return Found(best[0], left[best[0]], rounds)
        halvings -= 1
        left = {name: left[name] for name in best[: max(KEPT, math.ceil(len(best) / 2))]}
