"""Stage ``evaluate``: held-out prompts decoded plainly and with each drafter, and compared.

All decoders get the same prompts in the same batches and take turns. Plain decoding in our engine
is the baseline for tokens and for speed; transformers' ``generate`` is there to show that our
baseline is not a slow one.
"""

import sys
from collections.abc import Mapping, Sequence

from speculators.data.generate import Progress
from speculators.decoding.acceptance import AcceptanceCounts
from speculators.decoding.draft_models import Shaped, WithSuffix
from speculators.decoding.drafters import Drafter, NgramDrafter
from speculators.decoding.suffix_drafter import SuffixDrafter
from speculators.evaluation.acceptance import acceptance_result
from speculators.evaluation.comparison import compare
from speculators.evaluation.decoders import AnyDraft, Batches, Decoded
from speculators.evaluation.prompts import Prompt
from speculators.evaluation.report import EvaluationReport
from speculators.evaluation.results import (
    Comparison,
    DrafterResult,
    EvaluationSettings,
    SpeedResult,
    TransformersResult,
    current_versions,
)
from speculators.evaluation.speed import Timed, take_turns
from speculators.models.speculator_model import SpeculatorModel
from speculators.models.verifier.verifier import Verifier

NGRAM = "ngram"
"""What stands for an n-gram drafter, which needs no model."""

SUFFIX = "suffix"
"""What stands for a suffix drafter, which needs none either."""

AnyDrafter = SpeculatorModel | Shaped | WithSuffix | Drafter | str

_Done = list[Timed[Decoded]]


def evaluate(
    verifier: Verifier,
    drafters: Mapping[str, AnyDrafter],
    prompts: Sequence[Prompt],
    *,
    k: int | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    compare_transformers: bool = True,
    warmup: int = 1,
    repeats: int = 1,
    verifier_name: str | None = None,
    command: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> EvaluationReport:
    """Measures acceptance, speed and equality of one or several drafters.

    Args:
        verifier: the model whose text it is.
        drafters: a name for each, to a draft model, one with matches beside it (``WithSuffix``),
            one with a number of tokens or a tree of its own (``Shaped``), another drafter,
            ``"ngram"`` or ``"suffix"``. The first one is the main one of the report.
        prompts: what to continue.
        k: tokens drafted before each verification; None: as each draft's configuration says.
        max_new_tokens: tokens that each prompt is continued with, unless its text ends before.
        batch_size: prompts decoded at once, in the order given.
        temperature: 0 for greedy decoding. Sampled texts are not compared.
        seed: of the sampling, a sequence's own numbers whatever the batch, and of the intervals.
        compare_transformers: whether transformers' ``generate`` is measured, too.
        warmup: batches that all decoders do before anything is measured.
        repeats: how often each batch is timed; it counts with the median.
        verifier_name: what the report calls the verifier; by default where it was loaded from.
        command: what the report says it was made by; by default this process's command line.
        progress: shows the progress; None for silence.

    Raises:
        ValueError: there are no drafters or no prompts, a prompt has ids that the verifier does not
            know or is too long for it (the message names the lines), a drafter does not fit it, or
            a number is out of its range.
    """
    settings = EvaluationSettings(
        k=k,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        temperature=temperature,
        seed=seed,
        warmup=warmup,
        repeats=repeats,
    )
    _check(verifier, drafters, prompts, settings)
    batches = Batches(verifier, prompts, settings)
    drafts = {name: _draft(name, draft) for name, draft in drafters.items()}
    runs = [batches.plain(), *(batches.speculative(draft) for draft in drafts.values())]
    if compare_transformers:
        runs.append(batches.transformers())
    if progress is not None:
        progress.start(len(prompts), "evaluation")
    done = take_turns(
        runs,
        len(batches),
        repeats=repeats,
        warmup=warmup,
        device=verifier.device,
        after_batch=lambda number: progress.advance(len(batches[number])) if progress else None,
    )
    plain = done[0]
    speed = _speed(plain)

    def compared(found: _Done) -> Comparison | None:
        if temperature > 0:
            return None
        return compare(verifier, prompts, _sequences(plain), _sequences(found))

    results = {
        name: _result(batches, draft, found, speed, compared(found))
        for (name, draft), found in zip(drafts.items(), done[1:], strict=False)
    }
    if progress is not None:
        _say_what_differs(progress, results)
    return EvaluationReport(
        command=list(sys.argv if command is None else command),
        versions=current_versions(verifier.device),
        verifier=verifier_name or verifier.model.name_or_path or type(verifier.model).__name__,
        verifier_dtype=str(verifier.model.dtype).removeprefix("torch."),
        settings=settings,
        prompts=len(prompts),
        prompt_tokens=sum(len(prompt.ids) for prompt in prompts),
        main=next(iter(drafters)),
        drafters=results,
        plain=speed,
        transformers=TransformersResult(speed=_speed(done[-1]), comparison=compared(done[-1]))
        if compare_transformers
        else None,
    )


def _check(
    verifier: Verifier,
    drafters: Mapping[str, AnyDrafter],
    prompts: Sequence[Prompt],
    settings: EvaluationSettings,
) -> None:
    if not drafters or not prompts:
        raise ValueError(
            f"got {len(drafters)} drafters and {len(prompts)} prompts; expected at least one each"
        )
    for name, least in (("batch_size", 1), ("repeats", 1), ("warmup", 0)):
        value = getattr(settings, name)
        if value < least:
            raise ValueError(f"{name} is {value}; expected at least {least}")
    for prompt in prompts:
        if len(prompt.ids) == 0:
            raise ValueError(f"{prompt.place}: has no tokens; expected at least one")
        low, high = int(prompt.ids.min()), int(prompt.ids.max())
        if low < 0 or high >= verifier.vocab_size:
            raise ValueError(
                f"{prompt.place}: has token id {low if low < 0 else high}; expected 0 to "
                f"{verifier.vocab_size - 1}, the verifier's vocabulary"
            )
    context = getattr(verifier.config, "max_position_embeddings", None)
    room = None if context is None else context - settings.max_new_tokens
    long = [prompt for prompt in prompts if room is not None and len(prompt.ids) > room]
    if long:
        places = "; ".join(f"{prompt.place} ({len(prompt.ids)} tokens)" for prompt in long[:10])
        raise ValueError(
            f"{len(long)} prompts are longer than {room} tokens, which is the verifier's context "
            f"of {context} less {settings.max_new_tokens} new tokens: {places}. Shorten them (a "
            "limit max_prompt_tokens keeps their ends), or ask for fewer new tokens"
        )


def _draft(name: str, draft: AnyDrafter) -> AnyDraft:
    if not isinstance(draft, str):
        return draft
    if draft == NGRAM:
        return NgramDrafter()
    if draft == SUFFIX:
        return SuffixDrafter()
    raise ValueError(
        f"the drafter {name!r} is {draft!r}; expected {NGRAM!r}, {SUFFIX!r}, a draft model or a "
        "drafter"
    )


def _kind(draft: AnyDraft) -> str:
    if isinstance(draft, Shaped):
        return _kind(draft.model)
    if isinstance(draft, WithSuffix):
        return f"{_kind(draft.model)} + {SUFFIX}"
    return draft.spec.name if isinstance(draft, SpeculatorModel) else type(draft).__name__


def _tree(draft: AnyDraft) -> str | None:
    """The shape of its trees in words, None for chains."""
    if isinstance(draft, Shaped):
        return None if draft.tree is None else str(draft.tree)
    nodes, depth = getattr(draft, "tree_nodes", 0), getattr(draft, "tree_depth", 0)
    return f"up to {nodes} nodes, up to {depth} deep" if nodes else None


def _result(
    batches: Batches,
    draft: AnyDraft,
    done: _Done,
    plain: SpeedResult,
    comparison: Comparison | None,
) -> DrafterResult:
    counts = AcceptanceCounts()
    for batch in done:
        counts += batch.result.counts
    traces = [trace for batch in done for trace in batch.result.traces]
    speed = _speed(done)
    share = None
    if batches.device.type == "cpu":  # elsewhere a call returns before its work is done
        drafting = sum(batch.result.draft_seconds for batch in done)
        share = drafting / sum(batch.seconds[0] for batch in done)
    tree, k = _tree(draft), batches.k(draft)
    if tree is not None and not isinstance(draft, Shaped):
        k = len(counts.drafted_by_position)  # a limit may be far from what such trees come to
    return DrafterResult(
        kind=_kind(draft),
        tree=tree,
        acceptance=acceptance_result(counts, traces, k, batches.seed),
        speed=speed,
        speedup=speed.tokens_per_second / plain.tokens_per_second,
        draft_time_share=share,
        comparison=comparison,
    )


def _say_what_differs(progress: Progress, results: Mapping[str, DrafterResult]) -> None:
    for name, result in results.items():
        if result.comparison is not None and not result.comparison.identical:
            progress.message(
                f"with {name}, {result.comparison.different_prompts} prompts got other tokens than "
                "plain decoding gives; the report has their logit gaps"
            )


def _speed(done: _Done) -> SpeedResult:
    tokens = sum(len(sequence) for sequence in _sequences(done))
    seconds = sum(batch.median for batch in done)
    return SpeedResult(tokens=tokens, seconds=seconds, tokens_per_second=tokens / seconds)


def _sequences(done: _Done) -> list[list[int]]:
    return [sequence for batch in done for sequence in batch.result.sequences]
