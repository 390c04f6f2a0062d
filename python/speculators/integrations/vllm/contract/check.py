"""The contract check: vLLM accepts of a draft exactly what our own decoder accepts of it.

The same prompts go through both, greedily; then tokens and accepted counts are compared step by
step. vLLM runs in a process of an environment of its own, or is a server that runs already.
"""

import os
import pathlib
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence

import pydantic
from rich.table import Table

from speculators.atomic import atomic_file
from speculators.decoding.draft_models import num_draft_tokens
from speculators.decoding.generation import GenerationOutput, generate
from speculators.decoding.settings import GenerationSettings
from speculators.integrations.vllm.contract.comparison import TraceComparison, compare_traces
from speculators.integrations.vllm.contract.trace_format import (
    CaseResult,
    TraceCase,
    TraceRequest,
    TraceResult,
)
from speculators.models.speculator_model import SpeculatorModel
from speculators.models.verifier.verifier import Verifier

REPORT = "contract.json"

# Whatever answers a request for traces.
Tracer = Callable[[TraceRequest], TraceResult]


class ContractError(RuntimeError):
    """There is nothing to compare with: vLLM did not run, or did not say what it accepted."""


class DecoderFigures(pydantic.BaseModel):
    """What one of the two decoders did with a draft.

    Attributes:
        verifications: passes of the verifier after the prompts'.
        tau: tokens emitted in each of them.
        acceptance_by_position: the share of the drafts whose first, second, ... token was accepted.
    """

    verifications: int
    tau: float
    acceptance_by_position: list[float]

    @classmethod
    def of(cls, traces: Sequence[Sequence[int]], k: int) -> "DecoderFigures":
        """From the accepted tokens of each verification of each prompt."""
        accepted = [count for trace in traces for count in trace]
        total = max(1, len(accepted))
        return cls(
            verifications=len(accepted),
            tau=1 + sum(accepted) / total,
            acceptance_by_position=[sum(n > j for n in accepted) / total for j in range(k)],
        )


class ContractCase(pydantic.BaseModel):
    """One draft.

    Attributes:
        draft: its name.
        k: tokens drafted before each verification.
        ours: our decoder's figures.
        vllm: vLLM's.
        steps: verifications that were compared.
        differences: where the two part, at most once for each prompt.
        agrees: whether there is no difference that could not be rounding.
    """

    draft: str
    k: int
    ours: DecoderFigures
    vllm: DecoderFigures
    steps: int
    differences: list[dict[str, int | float | None]]
    agrees: bool


class ContractReport(pydantic.BaseModel):
    """All drafts.

    Attributes:
        verifier: where it comes from.
        dtype: of the verifier and the drafts, on both sides.
        vllm_version: of the vLLM that ran.
        prompts: how many.
        max_new_tokens: of each; texts go on behind an end-of-text token.
        cases: one for each draft.
    """

    verifier: str
    dtype: str
    vllm_version: str
    prompts: int
    max_new_tokens: int
    cases: list[ContractCase]

    @property
    def agrees(self) -> bool:
        """Whether the contract holds for every draft."""
        return all(case.agrees for case in self.cases)

    def write(self, folder: pathlib.Path) -> pathlib.Path:
        """Writes ``contract.json``."""
        with atomic_file(folder / REPORT, "w") as file:
            file.write(self.model_dump_json(indent=2) + "\n")
        return folder / REPORT


def check_contract(
    verifier: Verifier,
    drafts: Mapping[str, tuple[SpeculatorModel, pathlib.Path]],
    prompts: Sequence[Sequence[int]],
    tracer: Tracer,
    *,
    k: int | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 8,
) -> ContractReport:
    """Decodes the prompts here and in vLLM, and compares.

    Args:
        verifier: the model; its dtype is the one that vLLM is asked for.
        drafts: by name, each with the folder that it was read from.
        prompts: token ids.
        tracer: runs vLLM: :func:`run_engine` or a :class:`.endpoint.Endpoint`.
        k: tokens drafted before each verification; None: as each draft's configuration says.
        max_new_tokens: of each prompt.
        batch_size: prompts decoded here at once.

    Raises:
        ContractError: vLLM did not run, or could not run a draft.
    """
    request = TraceRequest(
        verifier=str(verifier.model.name_or_path),
        cases=[
            TraceCase(name=name, draft=str(folder), num_draft_tokens=k)
            for name, (_, folder) in drafts.items()
        ],
        prompts=[list(prompt) for prompt in prompts],
        max_new_tokens=max_new_tokens,
        dtype=str(verifier.model.dtype).removeprefix("torch."),
    )
    found = tracer(request)
    cases = []
    for result in found.cases:
        if result.error is not None:
            raise ContractError(
                f"vLLM {found.vllm_version} failed with {result.name}: {result.error}"
            )
        draft, _ = drafts[result.name]
        settings = GenerationSettings(max_new_tokens, num_draft_tokens=k, eos_token_ids=())
        outputs = [
            generate(verifier, draft, request.prompts[begin : begin + batch_size], settings)
            for begin in range(0, len(prompts), batch_size)
        ]
        count = num_draft_tokens(draft, settings)
        cases.append(_case(verifier, request, outputs, result, count))
    return ContractReport(
        verifier=request.verifier,
        dtype=request.dtype,
        vllm_version=found.vllm_version,
        prompts=len(prompts),
        max_new_tokens=max_new_tokens,
        cases=cases,
    )


def run_engine(python: str | os.PathLike[str]) -> Tracer:
    """A tracer that starts an engine in a process.

    Args:
        python: of an environment that has vLLM and this library.

    Raises:
        ContractError: (the tracer) the process failed; its last words are in the message.
    """

    def trace(request: TraceRequest) -> TraceResult:
        with tempfile.TemporaryDirectory(prefix="speculators-trace-") as name:
            source, target = pathlib.Path(name) / "request.json", pathlib.Path(name) / "result.json"
            source.write_text(request.model_dump_json(), encoding="utf-8")
            program = "speculators.integrations.vllm.contract.trace"
            command = [str(python), "-m", program, str(source), str(target)]
            try:
                process = subprocess.run(command, check=False, capture_output=True, text=True)
            except OSError as error:
                raise ContractError(f"cannot run {python}: {error}") from None
            if process.returncode != 0 or not target.exists():
                words = (process.stderr or process.stdout).strip().splitlines()[-5:]
                raise ContractError(
                    f"vLLM did not run in the environment of {python} (exit status "
                    f"{process.returncode}); expected one that has vLLM and this library:\n"
                    + "\n".join(words)
                )
            return TraceResult.model_validate_json(target.read_bytes())

    return trace


def table(report: ContractReport) -> Table:
    """The report for a terminal."""
    result = Table(
        title=f"our decoder and vLLM {report.vllm_version}: {report.prompts} prompts, "
        f"{report.dtype}, greedy"
    )
    heads = ("draft", "K", "tau here", "tau in vLLM", "steps compared", "differences", "agrees")
    for head in heads:
        result.add_column(head)
    for case in report.cases:
        result.add_row(
            case.draft,
            str(case.k),
            f"{case.ours.tau:.3f}",
            f"{case.vllm.tau:.3f}",
            str(case.steps),
            str(len(case.differences)),
            "yes" if case.agrees else "NO",
        )
    return result


def _case(
    verifier: Verifier,
    request: TraceRequest,
    outputs: Sequence[GenerationOutput],
    found: CaseResult,
    k: int,
) -> ContractCase:
    merged = GenerationOutput(
        [sequence for output in outputs for sequence in output.sequences],
        [reason for output in outputs for reason in output.finish_reasons],
        [trace for output in outputs for trace in output.traces],
        outputs[0].acceptance,  # not looked at
    )
    compared: TraceComparison = compare_traces(verifier, request.prompts, merged, found)
    return ContractCase(
        draft=found.name,
        k=k,
        ours=DecoderFigures.of(merged.traces, k),
        vllm=DecoderFigures.of(found.accepted, k),
        steps=compared.steps,
        differences=[vars(difference) for difference in compared.differences],
        agrees=compared.agrees,
    )
