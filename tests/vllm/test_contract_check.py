"""``evaluate --against-vllm``: what it compares, and what it says where there is nothing.

vLLM itself is not needed: what answers here are traces of our own decoder, true or falsified.
"""

import pathlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
from tests.vllm import fake_server, trained_drafts
from tests.vllm.fake_server import Fake
from tests.vllm.trained_drafts import NEW_TOKENS, K

from speculators.decoding import GenerationOutput
from speculators.integrations.vllm.contract.check import (
    ContractError,
    ContractReport,
    check_contract,
    run_engine,
)
from speculators.integrations.vllm.contract.endpoint import Endpoint
from speculators.integrations.vllm.contract.trace_format import (
    CaseResult,
    TraceCase,
    TraceRequest,
    TraceResult,
)
from speculators.models import SpeculatorModel, find_algorithm
from speculators.models.verifier import Verifier

FOLDER = pathlib.Path("drafts/eagle")


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Verifier:
    return trained_drafts.make_verifier("llama", tmp_path_factory.mktemp("verifier"))


@pytest.fixture(scope="module")
def draft(verifier: Verifier) -> SpeculatorModel:
    config = find_algorithm("eagle").new_config(verifier.config, speculative_tokens=K)
    return SpeculatorModel.from_config(config, verifier).eval()


@pytest.fixture(scope="module")
def ours(verifier: Verifier, draft: SpeculatorModel) -> GenerationOutput:
    return trained_drafts.decode(verifier, draft)


def answer(ours: GenerationOutput, **changes: Any) -> Callable[[TraceRequest], TraceResult]:
    """A tracer that answers with our own decoder's traces, but for the changes."""

    def trace(request: TraceRequest) -> TraceResult:
        [case] = request.cases
        assert case.draft == str(FOLDER)
        assert request.prompts == trained_drafts.make_prompts()
        assert request.ignore_eos
        fields = {"name": case.name, "token_ids": ours.sequences, "accepted": ours.traces} | changes
        result = CaseResult(**fields)
        return TraceResult(vllm_version="1.2", speculators_version="0", cases=[result])

    return trace


def check(verifier: Verifier, draft: SpeculatorModel, tracer: Any) -> ContractReport:
    prompts = trained_drafts.make_prompts()
    drafts = {"eagle": (draft, FOLDER)}
    return check_contract(
        verifier, drafts, prompts, tracer, max_new_tokens=NEW_TOKENS, batch_size=5
    )


def test_the_same_traces_agree(
    verifier: Verifier, draft: SpeculatorModel, ours: GenerationOutput, tmp_path: pathlib.Path
) -> None:
    report = check(verifier, draft, answer(ours))
    assert report.agrees
    [case] = report.cases
    steps = [accepted for trace in ours.traces for accepted in trace]
    assert case.steps == case.ours.verifications == case.vllm.verifications == len(steps)
    assert case.ours.tau == pytest.approx(1 + sum(steps) / len(steps))
    assert case.ours.acceptance_by_position == pytest.approx(ours.acceptance.rates_by_position)
    assert case.vllm == case.ours
    assert report.dtype == "float32"
    assert ContractReport.model_validate_json(report.write(tmp_path).read_bytes()) == report


def test_another_acceptance_does_not_agree(
    verifier: Verifier, draft: SpeculatorModel, ours: GenerationOutput
) -> None:
    falsified = [list(trace) for trace in ours.traces]
    falsified[3][2] += 1
    report = check(verifier, draft, answer(ours, accepted=falsified))
    assert not report.agrees
    [difference] = report.cases[0].differences
    assert difference["prompt"] == 3
    assert difference["step"] == 2


def test_a_draft_that_vllm_cannot_run_is_an_error(
    verifier: Verifier, draft: SpeculatorModel, ours: GenerationOutput
) -> None:
    with pytest.raises(ContractError, match=r"vLLM 1\.2 failed with eagle: no such layer"):
        check(verifier, draft, answer(ours, error="no such layer"))


def test_an_environment_without_vllm_is_an_error(
    verifier: Verifier, draft: SpeculatorModel, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(ContractError, match="cannot run /no/such/python"):
        check(verifier, draft, run_engine("/no/such/python"))
    broken = tmp_path / "python"
    broken.write_text(f"#!{sys.executable}\nraise SystemExit('there is no vLLM')\n")
    broken.chmod(0o755)
    with pytest.raises(ContractError, match=r"expected one that has vLLM(.|\n)*there is no"):
        check(verifier, draft, run_engine(broken))


def fake(ours: GenerationOutput, **changes: Any) -> Fake:
    """Answers as vLLM's server does, of our own decoder's traces."""
    prompts = trained_drafts.make_prompts()

    def trace(prompt: list[int]) -> tuple[list[int], list[int]]:
        number = prompts.index(prompt)
        return list(ours.sequences[number]), list(ours.traces[number])

    return Fake(trace=trace, **changes)


def test_a_server_answers_as_an_engine_does(
    verifier: Verifier, draft: SpeculatorModel, ours: GenerationOutput
) -> None:
    running = fake(ours)
    with fake_server.running(running) as url:
        report = check(verifier, draft, Endpoint(url + "/v1/"))
    assert report.agrees
    assert report.vllm_version == "9.9"
    for request in running.requests:
        assert request["temperature"] == 0
        assert request["ignore_eos"] is True
        assert request["max_tokens"] == NEW_TOKENS
    assert report.cases[0].steps == sum(map(len, ours.traces))


def test_a_server_that_says_too_little_is_an_error(ours: GenerationOutput) -> None:
    case = TraceCase(name="eagle", draft=str(FOLDER))
    request = TraceRequest(
        verifier="v", cases=[case], prompts=trained_drafts.make_prompts(), max_new_tokens=NEW_TOKENS
    )
    with fake_server.running(fake(ours, plan={"*": ["no metrics"] * 100})) as url:
        with pytest.raises(ContractError, match="--per-request-spec-decode-metrics detailed"):
            Endpoint(url)(request)
        with pytest.raises(ContractError, match="2 were given; expected one"):
            Endpoint(url)(request.model_copy(update={"cases": [case, case]}))
    with fake_server.running(fake(ours, plan={"*": ["400"] * 100})) as url:
        with pytest.raises(ContractError, match=r"refuses \(400\): not now"):
            Endpoint(url)(request)
    with pytest.raises(ContractError, match=r"127.* does not answer .*expected a running vLLM"):
        Endpoint(url)(request)
