"""``evaluate --against-vllm``: what it compares, and what it says where there is nothing.

vLLM itself is not needed: what answers here are traces of our own decoder, true or falsified.
"""

import contextlib
import http.server
import json
import pathlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.vllm import trained_drafts
from tests.vllm.trained_drafts import NEW_TOKENS, K

from speculators.decoding import GenerationOutput
from speculators.integrations.vllm.contract import (
    ContractError,
    ContractReport,
    check_contract,
    run_engine,
)
from speculators.integrations.vllm.endpoint import Endpoint
from speculators.integrations.vllm.trace_format import (
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


@contextlib.contextmanager
def server(answers: Callable[[str, Any], tuple[int, Any]]) -> Iterator[str]:
    """A server on 127.0.0.1 that answers paths and bodies with a status and JSON."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, body: Any) -> None:
            status, content = answers(self.path, body)
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: object) -> None:
            del arguments

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_port}"
    finally:
        running.shutdown()
        thread.join()
        running.server_close()


def served(ours: GenerationOutput, detailed: bool) -> Callable[[str, Any], tuple[int, Any]]:
    """Answers as vLLM's server does, of our own decoder's traces."""
    prompts = trained_drafts.make_prompts()

    def answers(path: str, body: Any) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"data": [{"id": "the model"}]}
        if path == "/version":
            return 200, {"version": "1.2"}
        assert path == "/v1/completions"
        assert body["temperature"] == 0
        assert body["ignore_eos"] is True
        if body["model"] != "the model" or body["max_tokens"] != NEW_TOKENS:
            return 400, {"error": "not as asked"}
        number = prompts.index(body["prompt"])
        metrics = {"speculative_decoding": {"per_step_accepted": ours.traces[number]}}
        choice = {"token_ids": ours.sequences[number]}
        return 200, {"choices": [choice], "metrics": metrics if detailed else None}

    return answers


def test_a_server_answers_as_an_engine_does(
    verifier: Verifier, draft: SpeculatorModel, ours: GenerationOutput
) -> None:
    with server(served(ours, detailed=True)) as url:
        report = check(verifier, draft, Endpoint(url + "/v1/"))
    assert report.agrees
    assert report.vllm_version == "1.2"
    assert report.cases[0].steps == sum(map(len, ours.traces))


def test_a_server_that_says_too_little_is_an_error(ours: GenerationOutput) -> None:
    case = TraceCase(name="eagle", draft=str(FOLDER))
    request = TraceRequest(
        verifier="v", cases=[case], prompts=trained_drafts.make_prompts(), max_new_tokens=NEW_TOKENS
    )
    with server(served(ours, detailed=False)) as url:
        with pytest.raises(ContractError, match="--per-request-spec-decode-metrics detailed"):
            Endpoint(url)(request)
        with pytest.raises(ContractError, match=r"answered 400: .*not as asked"):
            Endpoint(url)(request.model_copy(update={"max_new_tokens": 1}))
        with pytest.raises(ContractError, match="2 were given; expected one"):
            Endpoint(url)(request.model_copy(update={"cases": [case, case]}))
    with pytest.raises(ContractError, match="no answer from http://127"):
        Endpoint(url)(request)
