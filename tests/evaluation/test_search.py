"""Trees side by side with chains in a report, and the search for what is fastest."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from tests.models.verifier_models import LAYERS, make, tokens

from speculators.decoding import (
    DynamicTree,
    GenerationSettings,
    Shaped,
    StaticTree,
    SuffixDrafter,
    generate,
)
from speculators.evaluation import EvaluationReport, Prompt
from speculators.evaluation.evaluate import evaluate
from speculators.evaluation.report import markdown
from speculators.evaluation.search import CHAINS, candidates, search
from speculators.models import SpeculatorModel, find_algorithm
from speculators.models.verifier import UnsupportedVerifierError, Verifier


@pytest.fixture(scope="module")
def verifier() -> Verifier:
    return Verifier(make("llama"))


@pytest.fixture(scope="module")
def draft(verifier: Verifier) -> SpeculatorModel:
    torch.manual_seed(1)
    config = find_algorithm("eagle").new_config(verifier.config, speculative_tokens=3)
    return SpeculatorModel.from_config(config, verifier).eval()


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return [Prompt(tokens(1, 4 + n % 3, seed=n)[0], n + 1, "asked.jsonl") for n in range(8)]


def test_chains_and_trees_side_by_side(
    verifier: Verifier, draft: SpeculatorModel, prompts: list[Prompt]
) -> None:
    report = evaluate(
        verifier,
        {
            "own": draft,
            "two": Shaped(draft, num_draft_tokens=2),
            "wide": Shaped(draft, tree=StaticTree.of_widths((6, 6))),
            "best": Shaped(draft, tree=DynamicTree(12, 4, 6)),
        },
        prompts[:3], max_new_tokens=12, batch_size=3, warmup=0, compare_transformers=False,
    )  # fmt: skip
    results = report.drafters
    assert [result.acceptance.k for result in results.values()] == [3, 2, 2, 4]
    assert [len(result.acceptance.acceptance_by_position) for result in results.values()] == [
        3, 2, 2, 4,
    ]  # fmt: skip
    assert {result.kind for result in results.values()} == {"eagle"}
    for result in results.values():
        assert result.comparison is not None
        assert result.comparison.identical
        assert result.draft_time_share is not None
        assert 0 < result.draft_time_share < 1
    assert results["own"].tree is None
    assert results["wide"].tree == "42 nodes, 2 deep"
    text = markdown(report)
    assert "best drafts trees: best 12 nodes, 4 deep, 6 children." in text
    assert "| wide | 2 deep |" in text
    assert EvaluationReport.model_validate_json(report.model_dump_json()) == report


def test_trees_of_matches_are_reported_as_trees(verifier: Verifier) -> None:
    repeated = [5, 6, 7, 8, 9, 5, 6, 7, 10, 5, 6, 7]
    prompts = [Prompt(torch.tensor(repeated))]
    drafter = SuffixDrafter(tree_nodes=9, doubt=0.0, factor=1.0)
    settings = GenerationSettings(max_new_tokens=12)
    counts = generate(verifier, drafter, [repeated], settings).acceptance
    deepest = len(counts.drafted_by_position)
    report = evaluate(
        verifier, {"matches": drafter}, prompts,
        max_new_tokens=12, warmup=0, compare_transformers=False,
    )  # fmt: skip
    result = report.drafters["matches"]
    assert 0 < deepest < 9
    assert result.acceptance.k == len(result.acceptance.acceptance_by_position) == deepest
    assert result.acceptance.drafted_by_position == counts.drafted_by_position
    assert result.tree == f"up to 9 nodes, up to {drafter.tree_depth} deep"
    text = markdown(report)
    assert "matches drafts trees: up to 9 nodes" in text
    assert f"| matches | {deepest} deep |" in text


def test_the_fastest_is_found_in_rounds(
    verifier: Verifier, draft: SpeculatorModel, prompts: list[Prompt]
) -> None:
    """The speeds are a script; a late candidate that looks slow on few prompts does not win."""
    names = list(candidates(draft, verifier))
    speeds = {name: 100.0 + 7 * n % 50 for n, name in enumerate(names)}
    fastest = max(speeds, key=lambda name: speeds[name])
    asked: list[tuple[int, int]] = []

    def measured(drafts: Mapping[str, Any], some: Sequence[Prompt]) -> EvaluationReport:
        asked.append((len(drafts), len(some)))
        report = evaluate(
            verifier, drafts, some[:1], max_new_tokens=2, warmup=0, compare_transformers=False
        )
        drafters = {
            name: result.model_copy(
                update={
                    "speed": result.speed.model_copy(update={"tokens_per_second": speeds[name]})
                }
            )
            for name, result in report.drafters.items()
        }
        return report.model_copy(update={"drafters": drafters})

    found = search(candidates(draft, verifier), prompts, measured)
    assert found.name == fastest
    assert found.draft == candidates(draft, verifier)[fastest]
    assert asked == [(21, 1), (11, 2), (6, 4), (3, 8)]
    assert [len(report.drafters) for report in found.rounds] == [count for count, _ in asked]


def test_where_no_tree_can_be_read_chains_are_searched(
    draft: SpeculatorModel, prompts: list[Prompt]
) -> None:
    model: Any = make("llama")
    verifier = Verifier(model)
    model.config.layer_types = ["chunked_attention"] * LAYERS
    model.config.attention_chunk_size = 64
    for _ in range(2):  # what was found is remembered
        found = candidates(draft, verifier)
        assert [shape.num_draft_tokens for shape in found.values()] == list(CHAINS)
        assert all(shape.tree is None for shape in found.values())
    with pytest.raises(UnsupportedVerifierError, match="draft chains instead"):
        evaluate(verifier, {"tree": Shaped(draft, tree=DynamicTree())}, prompts, max_new_tokens=4)


def test_a_search_over_nothing(
    verifier: Verifier, draft: SpeculatorModel, prompts: list[Prompt]
) -> None:
    def never(_: Mapping[str, Any], __: Sequence[Prompt]) -> EvaluationReport:
        raise AssertionError("nothing should be measured")

    with pytest.raises(ValueError, match="got 0 candidates and 8 prompts"):
        search({}, prompts, never)
    with pytest.raises(ValueError, match="and 0 prompts"):
        search(candidates(draft, verifier), [], never)
