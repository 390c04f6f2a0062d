"""What a report says of one decoder: typed, so that it is written and read back the same.

Where there is nothing to divide by (no verification, no draft) a figure is None, null in JSON.
"""

import importlib.metadata
import platform

import pydantic
import torch

from speculators.version import __version__


class _Result(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True)


class Spread(_Result):
    """The smallest, the median and the largest of some numbers."""

    min: float
    median: float
    max: float


class AcceptanceResult(_Result):
    """How much of what was drafted the verifier accepted; definitions in ``decoding.acceptance``.

    Attributes:
        k: tokens that were to be drafted before each verification; of a tree its depth, and where
            that is not set, as of matches, the depth of the deepest one drafted.
        tau: emitted tokens per verification, 1 + accepted tokens / verifications, over all prompts
            together; the pass over the prompt is not counted.
        tau_interval: its 95 % interval over prompts.
        tau_of_drafts: 1 + accepted tokens / drafts, as vLLM counts; larger than ``tau`` for a
            drafter that does not always draft.
        tau_of_prompts: the spread of the single prompts' taus.
        mean_accepted: accepted tokens per verification, ``tau`` - 1.
        acceptance_by_position: the share of the drafts whose first, second, ... k-th token was
            accepted, and so all before it; empty if there were no drafts.
        conditional_acceptance_by_position: the same share of those drafts only whose tokens before
            it were all accepted; None where there are none.
        verifications: passes of the verifier after the prompt's, once for each sequence in them.
        drafts: those of them with at least one drafted token.
        drafted_by_position: how many drafts had a first, second, ... token.
        accepted_by_position: in how many it was accepted.
    """

    k: int
    tau: float | None
    tau_interval: tuple[float, float] | None
    tau_of_drafts: float | None
    tau_of_prompts: Spread | None
    mean_accepted: float | None
    acceptance_by_position: list[float]
    conditional_acceptance_by_position: list[float | None]
    verifications: int
    drafts: int
    drafted_by_position: list[int]
    accepted_by_position: list[int]


class SpeedResult(_Result):
    """How fast a decoder was, reading the prompts included, loading the models not.

    Attributes:
        tokens: emitted.
        seconds: of wall clock for all batches, each with the median of its repeats.
        tokens_per_second: their ratio.
    """

    tokens: int
    seconds: float
    tokens_per_second: float


class DivergenceResult(_Result):
    """Where the continuation of one prompt parts from plain decoding's.

    Attributes:
        prompt: its number, from 0.
        line: its line in the file; 0 if it comes from none.
        index: the first new token that differs, from 0.
        expected: plain decoding's token; None if that had ended.
        found: the token instead; None if the text had ended.
        logit_gap: how much larger the verifier's logit of ``expected`` is; about zero is a tie.
            None where one of the two had ended.
    """

    prompt: int
    line: int
    index: int
    expected: int | None = None
    found: int | None = None
    logit_gap: float | None = None


class Comparison(_Result):
    """Whether a decoder gave plain decoding's tokens.

    Attributes:
        identical: whether it did for all prompts.
        different_prompts: for how many it did not.
        divergences: the first difference of the first few of them.
    """

    identical: bool
    different_prompts: int
    divergences: list[DivergenceResult]


class DrafterResult(_Result):
    """One drafter.

    Attributes:
        kind: the algorithm of a model, with `` + suffix`` where matches draft beside it, or the
            drafter's class.
        tree: the shape of its trees, in words; None for chains.
        acceptance: what the verifier accepted; of trees by depth.
        speed: of decoding with it.
        speedup: its tokens per second, divided by plain decoding's.
        draft_time_share: the drafter's share in the time; None where it is not measured, as on
            accelerators, which compute after a call has returned.
        comparison: with plain decoding; None where tokens were sampled, so that they may differ.
    """

    kind: str
    tree: str | None = None
    acceptance: AcceptanceResult
    speed: SpeedResult
    speedup: float
    draft_time_share: float | None = None
    comparison: Comparison | None = None


class TransformersResult(_Result):
    """transformers' own ``generate``, without a drafter.

    Attributes:
        speed: of it.
        comparison: of its tokens with plain decoding's; None where tokens were sampled.
    """

    speed: SpeedResult
    comparison: Comparison | None = None


class EvaluationSettings(_Result):
    """The arguments of ``evaluate`` by these names."""

    k: int | None
    max_new_tokens: int
    batch_size: int
    temperature: float
    seed: int
    warmup: int
    repeats: int


class Versions(_Result):
    """What an evaluation ran on; ``threads`` are torch's on the CPU."""

    speculators: str
    torch: str
    transformers: str
    python: str
    device: str
    threads: int


def current_versions(device: torch.device) -> Versions:
    """Those of this process, which computes on ``device``."""
    name = f"{device.type} ({platform.machine()})"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return Versions(
        speculators=__version__,
        torch=str(torch.__version__),
        transformers=importlib.metadata.version("transformers"),
        python=platform.python_version(),
        device=name,
        threads=torch.get_num_threads(),
    )
