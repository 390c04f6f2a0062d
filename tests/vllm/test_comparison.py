"""Comparing traces: what parts, where, and by which margin."""

import pytest
import torch
from tests.vllm import trained_drafts
from tests.vllm.trained_drafts import CASES

from speculators.decoding import AcceptanceCounts, GenerationOutput
from speculators.integrations.vllm.contract.comparison import (
    TraceComparison,
    TraceDifference,
    compare_traces,
)
from speculators.integrations.vllm.contract.trace_format import CaseResult
from speculators.integrations.vllm.plugin.strict_weights import StrictWeights, expected_shapes
from speculators.models import find_algorithm
from speculators.models.checkpoint_files import CheckpointError
from speculators.models.verifier import Verifier

PROMPT = [7, 8, 9]
TOKENS = [10, 11, 12, 13, 14, 15, 16]
# 10 | 11 12 13 | 14 | 15 16
ACCEPTED = [2, 0, 1]


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Verifier:
    return trained_drafts.make_verifier("llama", tmp_path_factory.mktemp("verifier"))


def compared(verifier: Verifier, tokens: list[int], accepted: list[int]) -> TraceComparison:
    ours = GenerationOutput([TOKENS], ["length"], [ACCEPTED], AcceptanceCounts())
    theirs = CaseResult(name="x", token_ids=[tokens], accepted=[accepted])
    return compare_traces(verifier, [PROMPT], ours, theirs)


def test_the_same_agrees(verifier: Verifier) -> None:
    comparison = compared(verifier, TOKENS, ACCEPTED)
    assert comparison == TraceComparison(3, [])
    assert comparison.agrees


@pytest.mark.parametrize(
    ("tokens", "accepted", "step", "counts", "place"),
    [
        ([99, *TOKENS[1:]], ACCEPTED, 0, (2, 2), 0),
        (TOKENS, [1, 0, 0, 1], 0, (2, 1), 2),
        (TOKENS, [2, 1, 0], 1, (0, 1), 4),
        ([10, 11, 12, 13, 99, 15, 16], ACCEPTED, 1, (0, 0), 4),
        ([10, 11, 12, 13, 14, 99, 16], [2, 0, 0, 0], 2, (1, 0), 5),
        ([10, 11, 12, 13, 14, 15, 99], ACCEPTED, 2, (1, 1), 6),
        (TOKENS, [2, 0], 2, (1, None), 5),
        (TOKENS, [2, 0, 1, 0], 3, (None, 0), 7),
    ],
)
def test_the_first_difference_is_found(
    verifier: Verifier,
    tokens: list[int],
    accepted: list[int],
    step: int,
    counts: tuple[int | None, int | None],
    place: int,
) -> None:
    comparison = compared(verifier, tokens, accepted)
    [difference] = comparison.differences
    assert (difference.prompt, difference.step) == (0, step)
    assert (difference.expected, difference.found) == counts
    assert comparison.steps == step + 1
    before = torch.tensor([PROMPT + TOKENS[:place]])
    logits = verifier.prefill(before, use_cache=False).logits
    assert logits is not None
    best = logits[0, -1].topk(2).values
    assert difference.margin == pytest.approx(float(best[0] - best[1]))
    assert not comparison.agrees


def test_only_a_tie_is_forgiven_and_only_if_rare() -> None:
    def difference(margin: float) -> TraceDifference:
        return TraceDifference(0, 0, 1, 2, margin)

    assert TraceComparison(100, [difference(9e-5)]).agrees
    assert not TraceComparison(100, [difference(2e-4)]).agrees
    assert not TraceComparison(99, [difference(9e-5)]).agrees
    assert not TraceComparison(300, [difference(9e-5)] * 4).agrees


@pytest.mark.parametrize(
    "found", [CaseResult(name="x", error="no engine"), CaseResult(name="x", token_ids=[[1], [2]])]
)
def test_what_cannot_be_compared(verifier: Verifier, found: CaseResult) -> None:
    ours = GenerationOutput([TOKENS], ["length"], [ACCEPTED], AcceptanceCounts())
    with pytest.raises(ValueError, match="the trace 'x' is of"):
        compare_traces(verifier, [PROMPT], ours, found)


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("eagle3")])
def test_what_a_file_must_have_is_what_the_configuration_says(
    verifier: Verifier, name: str
) -> None:
    case = CASES[name]
    config = find_algorithm(case.algorithm).new_config(verifier.config, **case.options)
    shapes = expected_shapes(config)
    assert ("fusion_fc.bias" in shapes) == config.fusion_bias
    assert ("pre_lm_head_layernorm.weight" in shapes) == config.layernorms
    qwen3 = case.options.get("layer_type") == "qwen3"
    assert ("transformer.self_attn.q_norm.weight" in shapes) == qwen3
    assert not [shape for shape in shapes if shape.startswith(("embed_tokens", "lm_head"))]


def test_all_that_is_wrong_with_a_file_is_in_one_error() -> None:
    strict = StrictWeights({"a": (2,), "b": (2, 2), "c": (1,), "d": (3,)}, "the/draft")
    weights = {"a": torch.zeros(2), "b": torch.zeros(4), "x": torch.zeros(1), "d": torch.zeros(3)}
    assert [name for name, _ in strict.checked(weights.items())] == ["a", "d"]
    with pytest.raises(CheckpointError) as caught:
        strict.finish({"a": "a", "b": "b", "c": "c", "d": "other"}, {"a"})
    message = str(caught.value)
    assert "the weights of the/draft" in message
    assert "b: found shape [4]; expected [2, 2]" in message
    assert "c: missing; expected float [1]" in message
    assert "d: vLLM's layer has no such parameter" in message
    assert "x: unexpected; found torch.float32 [1]" in message
    assert "\n  a:" not in message
