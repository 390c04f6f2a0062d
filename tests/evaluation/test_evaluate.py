"""The stage ``evaluate``: its figures recomputed from the single steps of the decoding loop."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.models.verifier_models import VOCABULARY, make, tokens

from speculators.decoding import GenerationOutput, GenerationSettings, NgramDrafter, generate
from speculators.decoding.draft_models import WithSuffix
from speculators.decoding.drafters import Proposal
from speculators.decoding.sampling import GREEDY, Sampling
from speculators.evaluation import DrafterResult, EvaluationReport, Prompt, decoders
from speculators.evaluation.evaluate import evaluate
from speculators.evaluation.transformers_generate import transformers_generate
from speculators.models import SpeculatorModel, VocabularyMapping, find_algorithm
from speculators.models.verifier import Verifier

NEW = 20


@pytest.fixture(scope="module")
def verifier() -> Verifier:
    return Verifier(make("llama"))


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    rows = [tokens(1, 4 + n % 3, seed=n)[0] for n in range(7)]
    return [Prompt(row, line, "asked.jsonl") for line, row in enumerate(rows, 1)]


def draft(verifier: Verifier, algorithm: str = "eagle", **options: Any) -> SpeculatorModel:
    torch.manual_seed(1)
    config = find_algorithm(algorithm).new_config(verifier.config, **options)
    mapping = None
    if "draft_vocab_size" in options:
        mapping = VocabularyMapping.from_counts(tokens(VOCABULARY), options["draft_vocab_size"])
    return SpeculatorModel.from_config(config, verifier, vocabulary=mapping).eval()


class Oracle:
    """Knows plain decoding's tokens; of each draft it spoils the token at a place of a cycle."""

    capture: tuple[int, ...] = ()

    def __init__(self, answers: dict[tuple[int, ...], list[int]], spoiled: Sequence[int]) -> None:
        self._answers = answers
        self._spoiled = spoiled
        self._rows: list[tuple[list[int], list[int]]] = []  # what comes, and what has come
        self._drafts = 0

    def prefill(self, input_ids: Any, lengths: Any, next_tokens: Any, streams: Any) -> None:
        """See ``Drafter``."""
        del streams
        self._rows = []
        for row, length, token in zip(input_ids.tolist(), lengths, next_tokens, strict=True):
            self._rows.append((self._answers[tuple(row[len(row) - length :])], [int(token)]))

    def propose(self, count: int, uniforms: Any) -> Proposal:
        """See ``Drafter``."""
        del uniforms
        drafted = []
        for answer, known in self._rows:
            row = (answer[len(known) :] + [0] * count)[:count]
            spoiled = self._spoiled[self._drafts % len(self._spoiled)]
            self._drafts += 1
            if spoiled < count:
                row[spoiled] = (row[spoiled] + 1) % VOCABULARY
            drafted.append(row)
        return Proposal(torch.tensor(drafted))

    def update(self, tokens: Any, counts: Any, streams: Any) -> None:
        """See ``Drafter``."""
        del streams
        for (_, known), row, count in zip(self._rows, tokens.tolist(), counts, strict=True):
            known.extend(row[:count])

    def select(self, rows: Any) -> None:
        """See ``Drafter``."""
        self._rows = [self._rows[row] for row in rows]


@pytest.fixture(scope="module")
def answers(verifier: Verifier, prompts: list[Prompt]) -> dict[tuple[int, ...], list[int]]:
    settings = GenerationSettings(max_new_tokens=NEW + 10, eos_token_ids=())
    return {
        tuple(p.ids.tolist()): generate(verifier, None, [p.ids.tolist()], settings).sequences[0]
        for p in prompts
    }


def run(verifier: Verifier, drafters: Any, prompts: Any, **options: Any) -> EvaluationReport:
    defaults: dict[str, Any] = {"max_new_tokens": NEW, "warmup": 0, "compare_transformers": False}
    return evaluate(verifier, drafters, prompts, **defaults | options)


def traces(verifier: Verifier, drafter: Any, prompts: list[Prompt], k: int) -> list[list[int]]:
    """Accepted tokens of each verification of each prompt, decoded one by one."""
    settings = GenerationSettings(max_new_tokens=NEW, num_draft_tokens=k)
    return [generate(verifier, drafter, [p.ids.tolist()], settings).traces[0] for p in prompts]


def check_figures(result: DrafterResult, steps: list[list[int]], drafted: int) -> None:
    """Compares a model's figures, which drafts in every step, with those of the single steps."""
    every = [accepted for trace in steps for accepted in trace]
    figures = result.acceptance
    assert figures.verifications == figures.drafts == len(every)
    assert figures.k == drafted
    assert figures.tau == pytest.approx(1 + sum(every) / len(every))
    assert figures.mean_accepted == pytest.approx(sum(every) / len(every))
    reached = [sum(accepted > place for accepted in every) for place in range(drafted)]
    assert figures.accepted_by_position == reached
    assert figures.acceptance_by_position == [n / len(every) for n in reached]
    for place, found in enumerate(figures.conditional_acceptance_by_position):
        came = [accepted for accepted in every if accepted >= place]
        share = sum(accepted > place for accepted in came) / len(came) if came else None
        assert found == (None if share is None else pytest.approx(share))
    taus = sorted(1 + sum(trace) / len(trace) for trace in steps)
    assert figures.tau_of_prompts is not None
    assert figures.tau_of_prompts.min == pytest.approx(taus[0])
    assert figures.tau_of_prompts.median == pytest.approx(taus[len(taus) // 2])
    assert figures.tau_of_prompts.max == pytest.approx(taus[-1])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_figures_are_those_of_the_single_verifications(
    batch_size: int, verifier: Verifier, prompts: list[Prompt], answers: Any
) -> None:
    # The places of the spoiled tokens are counted over all drafts: only alone are they the same.
    spoiled = [0, 3, 1, 9, 2] if batch_size == 1 else [2]
    expected = traces(verifier, Oracle(answers, spoiled), prompts, 4)
    report = run(
        verifier, {"oracle": Oracle(answers, spoiled)}, prompts, k=4, batch_size=batch_size
    )
    result = report.drafters["oracle"]
    check_figures(result, expected, 4)
    assert len({accepted for trace in expected for accepted in trace}) == len(set(spoiled))
    assert result.kind == "Oracle"
    assert report.tau == result.acceptance.tau
    assert report.acceptance_by_position == result.acceptance.acceptance_by_position
    assert report.identical is True
    plain = [answers[tuple(p.ids.tolist())][:NEW] for p in prompts]
    ends = [row.index(2) + 1 if 2 in row else NEW for row in plain]
    assert report.plain.tokens == result.speed.tokens == sum(ends)


def test_several_drafters_side_by_side(verifier: Verifier, prompts: list[Prompt]) -> None:
    drafters = {
        "small": draft(verifier, "eagle3", draft_vocab_size=9, speculative_tokens=3),
        "ngram": "ngram",
        "eagle": draft(verifier, speculative_tokens=2),
        "suffix": "suffix",
        "both": WithSuffix(draft(verifier, speculative_tokens=4)),
    }
    prompts = prompts[:3]
    report = run(verifier, drafters, prompts, compare_transformers=True, repeats=2, warmup=1)
    assert list(report.drafters) == list(drafters)
    assert report.main == "small"
    assert [result.acceptance.k for result in report.drafters.values()] == [3, 5, 2, 5, 4]
    assert [result.kind for result in report.drafters.values()] == [
        "eagle3",
        "NgramDrafter",
        "eagle",
        "SuffixDrafter",
        "eagle + suffix",
    ]
    for name, drafter in drafters.items():
        result = report.drafters[name]
        assert result.comparison is not None
        assert result.comparison.identical
        assert result.speed.tokens == report.plain.tokens
        assert result.speedup == pytest.approx(
            result.speed.tokens_per_second / report.plain.tokens_per_second
        )
        assert result.draft_time_share is not None
        assert 0 < result.draft_time_share < 1
        if name in {"small", "eagle"}:
            k = result.acceptance.k
            check_figures(result, traces(verifier, drafter, prompts, k), k)
    assert report.transformers is not None
    assert report.transformers.comparison is not None
    assert report.transformers.comparison.identical
    assert report.transformers.speed.tokens == report.plain.tokens
    assert report.transformers_tokens_per_second == report.transformers.speed.tokens_per_second
    assert (report.prompts, report.prompt_tokens) == (3, sum(len(p.ids) for p in prompts))


def test_tokens_outside_of_the_draft_vocabulary_are_rejections(
    verifier: Verifier, prompts: list[Prompt], answers: Any
) -> None:
    model = draft(verifier, "eagle3", draft_vocab_size=9)
    assert model.vocabulary is not None
    known = model.vocabulary.t2d.nonzero().flatten().tolist()
    report = run(verifier, {"small": model}, prompts, k=2)
    steps = traces(verifier, model, prompts, 2)
    hopeless = []  # verifications whose first token the draft could not have met
    for prompt, trace in zip(prompts, steps, strict=True):
        place = 1
        for accepted in trace:
            if answers[tuple(prompt.ids.tolist())][place] not in known:
                hopeless.append(accepted)
            place += accepted + 1
    assert len(hopeless) > 20
    assert set(hopeless) == {0}
    check_figures(report.drafters["small"], steps, 2)  # which counts them all


def test_ngram_counts_verifications_without_a_draft(
    verifier: Verifier, prompts: list[Prompt]
) -> None:
    report = run(verifier, {"free": "ngram"}, prompts, k=3)
    figures = report.drafters["free"].acceptance
    steps = traces(verifier, NgramDrafter(), prompts, 3)
    every = [accepted for trace in steps for accepted in trace]
    assert 0 < figures.drafts < figures.verifications == len(every)
    assert sum(every) > 0
    assert figures.tau == pytest.approx(1 + sum(every) / len(every))
    assert figures.tau_of_drafts == pytest.approx(1 + sum(every) / figures.drafts)
    shares = figures.acceptance_by_position
    assert shares == [sum(n > place for n in every) / figures.drafts for place in range(3)]
    given = figures.conditional_acceptance_by_position
    assert given[0] == shares[0] > 0
    assert given[1] == pytest.approx(shares[1] / shares[0])


def test_k_overrides_the_configuration(verifier: Verifier, prompts: list[Prompt]) -> None:
    model = draft(verifier, speculative_tokens=2)
    by_config = run(verifier, {"eagle": model}, prompts[:2]).drafters["eagle"].acceptance
    by_hand = run(verifier, {"eagle": model}, prompts[:2], k=6).drafters["eagle"].acceptance
    assert (by_config.k, len(by_config.acceptance_by_position)) == (2, 2)
    assert (by_hand.k, len(by_hand.acceptance_by_position)) == (6, 6)


def test_nothing_to_verify(verifier: Verifier, prompts: list[Prompt]) -> None:
    report = run(verifier, {"free": "ngram"}, prompts, max_new_tokens=1)
    figures = report.drafters["free"].acceptance
    assert report.tau is None
    assert figures.tau_interval is None
    assert figures.tau_of_prompts is None
    assert figures.acceptance_by_position == []
    assert report.identical is True
    assert report.plain.tokens == len(prompts)


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that with a drafter gives a wrong fourth token and leaves out the end."""

    def planted(verifier: Any, drafter: Any, *args: Any, **kwargs: Any) -> GenerationOutput:
        output = generate(verifier, drafter, *args, **kwargs)
        if drafter is None:
            return output
        sequences = [list(sequence) for sequence in output.sequences]
        for sequence in sequences:
            if sequence[3] % 2:
                sequence[3] = 0
            else:
                del sequence[-1]
        return dataclasses.replace(output, sequences=sequences)

    monkeypatch.setattr(decoders, "generate", planted)


@pytest.mark.usefixtures("wrong")
def test_wrong_tokens_are_found(verifier: Verifier, prompts: list[Prompt], answers: Any) -> None:
    said: list[str] = []

    class Progress:
        def start(self, total: int, description: str) -> None:
            said.append(f"{description} {total}")

        def advance(self, count: int) -> None:
            said.append(str(count))

        def message(self, text: str) -> None:
            said.append(text)

    report = run(verifier, {"free": "ngram"}, prompts, progress=Progress(), batch_size=3)
    assert report.identical is False
    comparison = report.drafters["free"].comparison
    assert comparison is not None
    assert comparison.different_prompts == len(prompts)
    assert len(comparison.divergences) == 5
    kinds = set()
    for found, prompt in zip(comparison.divergences, prompts, strict=False):
        answer = answers[tuple(prompt.ids.tolist())][:NEW]
        assert found.line == prompt.line == found.prompt + 1
        if answer[3] % 2:
            assert (found.index, found.expected, found.found) == (3, answer[3], 0)
            before = torch.tensor([[*prompt.ids.tolist(), *answer[:3]]])
            logits = verifier.model(before).logits[0, -1]
            assert logits[answer[3]] > logits[0] + 1e-3
            assert found.logit_gap == pytest.approx(float(logits[answer[3]] - logits[0]), abs=1e-4)
            kinds.add("other token")
        else:
            assert found.found is None
            assert found.logit_gap is None
            assert found.expected == answer[found.index]
            kinds.add("ended")
    assert kinds == {"other token", "ended"}
    assert said[:4] == ["evaluation 7", "3", "3", "1"]
    assert "7 prompts" in said[4]


def test_sampling_depends_on_the_seed_alone(verifier: Verifier, prompts: list[Prompt]) -> None:
    def sampled(**options: Any) -> Any:
        model = draft(verifier, speculative_tokens=2)
        report = run(verifier, {"eagle": model}, prompts, temperature=1.0, **options)
        assert report.identical is None
        figures = report.drafters["eagle"].acceptance
        return report.plain.tokens, figures.verifications, figures.accepted_by_position

    once = sampled(seed=3)
    assert sampled(seed=3, batch_size=4, repeats=2, warmup=1, compare_transformers=True) == once
    assert sampled(seed=4) != once


def test_wrong_arguments(verifier: Verifier, prompts: list[Prompt]) -> None:
    good = {"free": "ngram"}
    for drafters, asked, options, words in (
        ({}, prompts, {}, ["0 drafters"]),
        (good, [], {}, ["0 prompts"]),
        ({"x": "bigram"}, prompts, {}, ["'x'", "bigram", "ngram", "suffix"]),
        (good, prompts, {"batch_size": 0}, ["batch_size is 0"]),
        (good, prompts, {"repeats": 0}, ["repeats is 0"]),
        (good, prompts, {"warmup": -1}, ["warmup is -1"]),
        (good, prompts, {"k": 0}, ["num_draft_tokens is 0"]),
        (good, prompts, {"max_new_tokens": 0}, ["max_new_tokens is 0"]),
        (good, prompts, {"max_new_tokens": 123}, ["asked.jsonl, line 3 (6 tokens)", "of 128 less"]),
        (good, [Prompt(torch.tensor([3, 61]), 9, "f")], {}, ["f, line 9", "61", "0 to 60"]),
        (good, [Prompt(torch.tensor([-1]))], {}, ["-1"]),
        (good, [Prompt(torch.tensor([], dtype=torch.int64))], {}, ["no tokens"]),
    ):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words follow
            run(verifier, drafters, asked, **options)
        for word in words:
            assert word in str(caught.value)
    # As long as the context allows is not too long.
    assert run(verifier, good, prompts[2:3], max_new_tokens=122).prompts == 1


def test_transformers_own_generate_runs_without_the_checkpoints_settings(
    verifier: Verifier, prompts: list[Prompt]
) -> None:
    ids = [prompt.ids.tolist() for prompt in prompts]
    own: Any = verifier.model.generation_config
    before = own.to_dict()
    expected = transformers_generate(verifier, ids, GREEDY, NEW, seed=0)
    assert expected == generate(verifier, None, ids, GenerationSettings(NEW)).sequences
    own.repetition_penalty, own.suppress_tokens = 9.0, [expected[0][0]]
    try:
        found = transformers_generate(verifier, ids, GREEDY, NEW, seed=0)
        assert verifier.model.generation_config is own
        assert own.repetition_penalty == 9.0
    finally:
        own.repetition_penalty = before["repetition_penalty"]
        own.suppress_tokens = before["suppress_tokens"]
    assert found == expected


def test_transformers_own_generate_takes_further_settings(
    verifier: Verifier, prompts: list[Prompt]
) -> None:
    ids = [prompts[0].ids.tolist()]
    ((first, *_),) = expected = transformers_generate(verifier, ids, GREEDY, NEW, seed=0)
    suppressed = {"suppress_tokens": [first]}
    ((*found,),) = transformers_generate(verifier, ids, GREEDY, NEW, seed=0, options=suppressed)
    assert first not in found
    lookup = {"prompt_lookup_num_tokens": 3}
    assert transformers_generate(verifier, ids, GREEDY, NEW, 0, lookup) == expected


def test_transformers_own_generate_samples_from_all_tokens(verifier: Verifier) -> None:
    # By itself it would keep the 50 likeliest of 61.
    written = transformers_generate(verifier, [[5, 6, 7]] * 3000, Sampling(20.0), 1, seed=0)
    assert {sequence[0] for sequence in written} == set(range(VOCABULARY))
