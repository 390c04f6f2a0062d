"""Where the time of a speculative step goes.

The parts of a step are wrapped in clocks for as long as the profile runs; what no clock sees is the
loop's own. On an accelerator each clock waits for the device, which takes away what Python and the
device do at the same time: there the shares are right, the sum is more than a step takes.
"""

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final
from unittest import mock

import torch
from benchmarks.decoding.decoders import Settings

from speculators.decoding.draft_models import Shaped, drafter_for, num_draft_tokens
from speculators.decoding.generation import generate_stream
from speculators.decoding.settings import GenerationSettings
from speculators.decoding.trees import Tree
from speculators.evaluation.prompts import Prompt
from speculators.evaluation.speed import TimedDrafter, timed
from speculators.models.speculator_model import SpeculatorModel
from speculators.models.verifier.verifier import Verifier
from speculators.ops import tree_verification

VERIFIER, DRAFT, DRAFTING = "verifier pass", "draft passes", "rest of drafting"
VERIFICATION, CACHE, LOOP = "verification", "cache", "loop"
PARTS: Final = (VERIFIER, DRAFT, DRAFTING, VERIFICATION, CACHE, LOOP)


@dataclasses.dataclass(frozen=True)
class Profile:
    """The steps of some generations, the passes over prompts left out.

    Attributes:
        steps: how many.
        seconds: of all of them.
        shares: of each of ``PARTS``: the verifier's pass; the draft's passes; what else drafting
            does (choosing tokens, building trees); which tokens are accepted; taking rejected ones
            out of the verifier's cache; and what is left, the loop's own Python.
    """

    steps: int
    seconds: float
    shares: dict[str, float]


def profile(
    verifier: Verifier,
    model: SpeculatorModel | None,
    tree: Tree | None,
    prompts: Sequence[Prompt],
    settings: Settings,
) -> Profile:
    """Decodes every prompt once, with clocks.

    Args:
        verifier: whose text it is.
        model: the draft; None for plain decoding.
        tree: what it drafts; None: chains.
        prompts: what to continue; the first of them once more before, with no clock running.
        settings: of the run.
    """
    draft = None if model is None else Shaped(model, tree=tree)
    chosen = GenerationSettings(max_new_tokens=settings.max_new_tokens, num_draft_tokens=settings.k)
    chosen = dataclasses.replace(chosen, num_draft_tokens=num_draft_tokens(draft, chosen) or None)
    made = drafter_for(draft, verifier, chosen)
    drafter = None if made is None else TimedDrafter(made)
    clock, steps, seconds, drafting = _Clock(verifier.device), 0, 0.0, 0.0
    with clock.running(verifier, model):
        for number, prompt in enumerate([prompts[0], *prompts]):
            stream = generate_stream(verifier, drafter, [prompt.ids.tolist()], chosen)
            next(stream)
            before = 0.0 if drafter is None else drafter.seconds
            clock.counts = number > 0
            found, took = timed(functools.partial(_count, stream), verifier.device)
            if clock.counts:
                steps, seconds = steps + found, seconds + took
                drafting += 0.0 if drafter is None else drafter.seconds - before
            clock.counts = False
    parts = dict(clock.seconds)
    parts[DRAFTING] = drafting - parts.get(DRAFT, 0.0)
    parts[LOOP] = seconds - sum(parts.values())
    shares = {part: parts.get(part, 0.0) / seconds if seconds else 0.0 for part in PARTS}
    return Profile(steps, seconds, shares)


def _count(stream: Iterator[object]) -> int:
    return sum(1 for _ in stream)


class _Clock:
    """The seconds of parts of a step.

    Attributes:
        seconds: by part.
        counts: whether it counts now.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self.counts = False
        self._device = device

    @contextlib.contextmanager
    def running(self, verifier: Verifier, model: SpeculatorModel | None) -> Iterator[None]:
        """In the block calls of the parts are timed; they do not call each other."""
        parts: list[tuple[object, str, str]] = [
            (verifier, "step", VERIFIER),
            (verifier, "crop", CACHE),
            (verifier, "keep_path", CACHE),
            (tree_verification, "verify_greedy", VERIFICATION),
        ]
        if model is not None:
            parts += [(model, "forward", DRAFT), (model, "logits", DRAFT)]
        with contextlib.ExitStack() as stack:
            for owner, name, part in parts:
                function = self._timed(part, getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, function))
            yield

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            run = functools.partial(function, *arguments, **options)
            result, seconds = timed(run, self._device)
            if self.counts:
                self.seconds[part] += seconds
            return result

        return call
