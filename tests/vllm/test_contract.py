"""THE contract: vLLM accepts, step by step, exactly what our own decoder does.

Every option of every type is in one of the cases. A module's fixture trains the drafts and runs
vLLM once for all of them: an engine takes some seconds to start.
"""

import copy
import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import vllm
from safetensors.torch import load_file, save_file
from tests.decoding.chi_square import chi_square
from tests.vllm import trained_drafts
from tests.vllm.trained_drafts import CASES, NEW_TOKENS, PROMPTS, VERIFIERS, K
from vllm import SamplingParams

from speculators.decoding import GenerationOutput, GenerationSettings, generate
from speculators.integrations.vllm.contract.comparison import compare_traces
from speculators.integrations.vllm.contract.engine import running_engine, trace
from speculators.integrations.vllm.contract.trace import main
from speculators.integrations.vllm.contract.trace_format import (
    CaseResult,
    TraceCase,
    TraceRequest,
    TraceResult,
)
from speculators.models import SpeculatorModel
from speculators.models.verifier import Verifier

# Of the first, ..., fifth drafted token, accepted: chance is 1/256 and falls with each.
FLOORS = [0.2, 0.06, 0.03, 0.015, 0.01]
MIN_STEPS = 200
SAMPLES = 3000
TEMPERATURE = 0.2


@dataclasses.dataclass
class World:
    """Everything that is made once."""

    verifiers: dict[str, Verifier]
    drafts: dict[str, SpeculatorModel]
    plain: dict[str, GenerationOutput]
    found: dict[str, CaseResult]
    root: pathlib.Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("contract")
    world = World({}, {}, {}, {}, root)
    for kind in VERIFIERS:
        verifier = trained_drafts.make_verifier(kind, root / kind)
        world.verifiers[kind] = verifier
        world.plain[kind] = trained_drafts.decode(verifier, None)
        prompts = torch.tensor(trained_drafts.make_prompts())
        texts = torch.cat([prompts, torch.tensor(world.plain[kind].sequences)], 1)
        requested = [TraceCase(name=f"plain {kind}")]
        for name, case in CASES.items():
            if case.verifier == kind:
                draft = trained_drafts.train_draft(case, verifier, texts)
                draft.save_pretrained(root / name)
                world.drafts[name] = draft
                requested.append(TraceCase(name=name, draft=str(root / name)))
        requested += _spoiled(root) if kind == "llama" else []
        result = trace(
            TraceRequest(
                verifier=str(root / kind),
                cases=requested,
                prompts=trained_drafts.make_prompts(),
                max_new_tokens=NEW_TOKENS,
            )
        )
        world.found |= {case.name: case for case in result.cases}
    return world


def _spoiled(root: pathlib.Path) -> list[TraceCase]:
    """Drafts with a tensor too many, too few, or of a wrong shape, and one that is not there."""

    def change(name: str, edit: Callable[[dict[str, torch.Tensor]], object]) -> TraceCase:
        shutil.copytree(root / "eagle", root / name)
        tensors = load_file(root / name / "model.safetensors")
        edit(tensors)
        save_file(tensors, root / name / "model.safetensors")
        return TraceCase(name=name, draft=str(root / name))

    width = trained_drafts.SIZES["hidden_size"]
    return [
        TraceCase(name="absent", draft=str(root / "absent")),
        change("bias too many", lambda t: t.update({"fusion_fc.bias": torch.zeros(width)})),
        change("one too few", lambda t: t.pop("transformer.mlp.up_proj.weight")),
        change("too wide", lambda t: t.update({"fusion_fc.weight": torch.zeros(width, width)})),
    ]


@pytest.mark.parametrize("kind", VERIFIERS)
def test_without_a_draft_both_say_the_same(world: World, kind: str) -> None:
    found = world.found[f"plain {kind}"]
    assert found.error is None
    assert found.token_ids == world.plain[kind].sequences
    assert found.accepted == [[]] * PROMPTS


@pytest.mark.parametrize("name", CASES)
def test_vllm_accepts_what_our_decoder_accepts(world: World, name: str) -> None:
    verifier, found = world.verifiers[CASES[name].verifier], world.found[name]
    assert found.error is None
    ours = trained_drafts.decode(verifier, world.drafts[name])
    comparison = compare_traces(verifier, trained_drafts.make_prompts(), ours, found)
    assert comparison.agrees, comparison
    assert comparison.steps >= MIN_STEPS
    rates = ours.acceptance.rates_by_position
    assert all(rate >= floor for rate, floor in zip(rates, FLOORS, strict=True)), rates
    # vLLM's own sums say the same as its lists.
    assert all(drafted == [K] * len(drafted) for drafted in found.drafted)
    assert found.counters["num_drafts"] == sum(map(len, found.accepted))
    assert found.counters["num_accepted_tokens"] == sum(map(sum, found.accepted))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("eagle bias", lambda draft: draft.fusion_fc.bias.data.zero_()),
        ("eagle layernorms", lambda draft: draft.embedding_layernorm.weight.data.fill_(1)),
        (
            "eagle of qwen3, layernorms, bias",
            lambda draft: draft.transformer.self_attn.k_norm.weight.data.fill_(1),
        ),
        ("hass", lambda draft: draft.transformer.self_attn.o_proj.weight.data.mul_(1.1)),
        (
            "eagle3 vocabulary, norm before residual",
            lambda draft: setattr(draft.layers[0], "_norm_before_residual", False),
        ),
        (
            "eagle3 of qwen3, norm output",
            lambda draft: setattr(draft.config, "norm_output", False),
        ),
    ],
)
def test_a_draft_that_is_not_quite_the_same_is_noticed(
    world: World, name: str, change: Callable[[Any], object]
) -> None:
    verifier, found = world.verifiers[CASES[name].verifier], world.found[name]
    draft = copy.deepcopy(world.drafts[name])
    change(draft)
    ours = trained_drafts.decode(verifier, draft)
    assert ours.sequences == world.plain[CASES[name].verifier].sequences
    comparison = compare_traces(verifier, trained_drafts.make_prompts(), ours, found)
    assert not comparison.agrees


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("absent", "there is no"),
        ("bias too many", "fusion_fc.bias: unexpected; found torch.float32 [64]"),
        ("one too few", "transformer.mlp.up_proj.weight: missing; expected float [128, 64]"),
        ("too wide", "fusion_fc.weight: found shape [64, 64]; expected [64, 128]"),
    ],
)
def test_a_draft_that_cannot_be_loaded_is_its_cases_error(
    world: World, name: str, error: str
) -> None:
    found = world.found[name]
    assert found.error is not None
    assert error in found.error
    assert not found.token_ids


def test_sampling_with_a_draft_has_the_verifiers_distribution(world: World) -> None:
    verifier, prompt = world.verifiers["llama"], trained_drafts.make_prompts()[0]
    request = TraceRequest(
        verifier=str(world.root / "llama"),
        cases=[],
        prompts=[prompt] * SAMPLES,
        max_new_tokens=2,
    )
    draft = str(world.root / "eagle layernorms")
    with running_engine(request, TraceCase(name="", draft=draft)) as engine:
        sampling = SamplingParams(
            temperature=TEMPERATURE, max_tokens=2, ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": prompt}] * SAMPLES
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        counters = {metric.name: metric for metric in engine.get_metrics()}
    assert counters["vllm:spec_decode_num_drafts"].value == SAMPLES
    # Some are accepted, and most are not: both ways to a token are taken often.
    accepted = counters["vllm:spec_decode_num_accepted_tokens_per_pos"].values[0]
    assert 0.1 * SAMPLES < accepted < 0.9 * SAMPLES
    pairs = torch.tensor([list(output.outputs[0].token_ids) for output in outputs])
    # The second token is the first that a draft may have a hand in.
    first = verifier.prefill(torch.tensor([prompt])).logits
    every = torch.tensor([[*prompt, token] for token in range(trained_drafts.VOCABULARY)])
    second = verifier.prefill(every).logits
    assert first is not None
    assert second is not None
    of_first = (first[0, -1].double() / TEMPERATURE).softmax(-1)
    p = of_first @ (second[:, -1].double() / TEMPERATURE).softmax(-1)
    assert not chi_square(pairs[:, 1], p).rejected


def test_acceptance_is_as_promised_under_vllms_own_defaults(world: World) -> None:
    """bfloat16, prefix caching, chunked prefill, all requests at once; tau within 5 %.

    In bfloat16 texts soon part, and other texts are accepted otherwise. So what counts is each
    text's beginning that both decoders write.
    """
    verifier = Verifier.from_pretrained(world.root / "llama", dtype=torch.bfloat16)
    draft = copy.deepcopy(world.drafts["eagle layernorms"]).to(torch.bfloat16)
    ours = trained_drafts.decode(verifier, draft)
    request = TraceRequest(
        verifier=str(world.root / "llama"),
        cases=[TraceCase(name="defaults", draft=str(world.root / "eagle layernorms"))],
        prompts=trained_drafts.make_prompts() * 3,  # more tokens than one pass takes
        max_new_tokens=NEW_TOKENS,
        dtype="bfloat16",
        engine_options={"enable_prefix_caching": True, "max_num_batched_tokens": 64},
    )
    [found] = trace(request).cases
    assert found.error is None
    expected, seen = [], []
    for number, tokens in enumerate(found.token_ids):
        same = ours.sequences[number % PROMPTS]
        pairs = zip(same, tokens, strict=True)
        common = next((n for n, (one, two) in enumerate(pairs) if one != two), NEW_TOKENS)
        expected += _within(common, ours.traces[number % PROMPTS])
        seen += _within(common, found.accepted[number])
    assert min(len(expected), len(seen)) >= MIN_STEPS
    assert 1 + sum(seen) / len(seen) == pytest.approx(1 + sum(expected) / len(expected), rel=0.05)


def _within(tokens: int, accepted: list[int]) -> list[int]:
    """The steps of a trace that write nothing behind the first so many tokens."""
    place, steps = 1, []
    for count in accepted:
        place += count + 1
        if place > tokens:
            break
        steps.append(count)
    return steps


def test_the_program_writes_what_was_asked_for(world: World, tmp_path: pathlib.Path) -> None:
    name = "hass"
    request = {
        "verifier": str(world.root / "llama"),
        "cases": [
            {"name": "two at a time", "draft": str(world.root / name), "num_draft_tokens": 2}
        ],
        "prompts": trained_drafts.make_prompts(),
        "max_new_tokens": NEW_TOKENS,
        "engine_options": {"max_num_seqs": 3},
    }
    (tmp_path / "request.json").write_text(json.dumps(request))
    assert main([str(tmp_path / "request.json"), str(tmp_path / "result.json")]) == 0
    result = TraceResult.model_validate_json((tmp_path / "result.json").read_bytes())
    [found] = result.cases
    verifier = world.verifiers["llama"]
    settings = GenerationSettings(max_new_tokens=NEW_TOKENS, eos_token_ids=(), num_draft_tokens=2)
    ours = generate(verifier, world.drafts[name], trained_drafts.make_prompts(), settings)
    assert compare_traces(verifier, trained_drafts.make_prompts(), ours, found).agrees
    assert result.vllm_version == vllm.__version__


@pytest.mark.parametrize("content", ["{}", "no JSON", '{"verifier": "x", "surplus": 1}'])
def test_a_request_that_is_not_valid(content: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "request.json").write_text(content)
    assert main([str(tmp_path / "request.json"), str(tmp_path / "result.json")]) == 2
    assert not (tmp_path / "result.json").exists()
