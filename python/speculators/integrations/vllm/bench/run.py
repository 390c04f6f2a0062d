"""One measurement from the beginning to the report: prompts, servers, both of them measured."""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence

from transformers import AutoTokenizer

from speculators.data.generate import Progress
from speculators.evaluation.prompts import read_prompts
from speculators.integrations.vllm.bench import (
    Measured,
    levels,
    measure,
    total_acceptance,
    versions,
)
from speculators.integrations.vllm.bench_client import Server
from speculators.integrations.vllm.bench_report import BenchReport, BenchSettings, BenchVersions
from speculators.integrations.vllm.serve import server_command
from speculators.integrations.vllm.serve_checks import ServedDraft
from speculators.integrations.vllm.server import running_server

PLAIN, DRAFTER = "plain", "with the draft"


@dataclasses.dataclass(frozen=True)
class BenchPlan:
    """What is to be measured.

    Attributes:
        draft: a draft that fits.
        prompts: a file of prompts.
        limit: so many of them, the first ones.
        max_new_tokens: of each, at least 2.
        concurrencies: requests at a time.
        output: where the report goes, and the logs of servers that fail.
        server_flags: of vLLM, for servers that are started.
        endpoint: a running server with the draft; None to start both servers.
        baseline_endpoint: a running server without it, beside ``endpoint``.
        start_timeout: seconds for a server to start.
    """

    draft: ServedDraft
    prompts: str
    limit: int
    max_new_tokens: int
    concurrencies: Sequence[int]
    output: pathlib.Path
    server_flags: Sequence[str] = ()
    endpoint: str | None = None
    baseline_endpoint: str | None = None
    start_timeout: float = 900.0


def run(plan: BenchPlan, progress: Progress) -> BenchReport:
    """Measures, and writes the report.

    Raises:
        ValueError: there are fewer prompts than requests at a time, or a prompt is malformed.
        ServerError: a server did not start; its log stays in the output folder.
        BenchError: a server does not answer as it should.
    """
    prompts = _prompts(plan)
    work = _Work(plan, prompts, progress)
    if plan.endpoint is None:
        plain: list[Measured] | None = work.start(PLAIN, None)
        drafter = work.start(DRAFTER, plan.draft)
    else:
        plain = work.measure(PLAIN, plan.baseline_endpoint) if plan.baseline_endpoint else None
        drafter = work.measure(DRAFTER, plan.endpoint)
    total = total_acceptance(drafter)
    # A server that runs already drafts as many tokens as it counts positions.
    counted = len(total.acceptance_by_position) or None if total is not None else None
    assert work.versions is not None  # noqa: S101 - for the type checker
    report = BenchReport(
        command=sys.argv,
        versions=work.versions,
        draft=str(plan.draft.directory),
        verifier=plan.draft.verifier,
        settings=BenchSettings(
            k=counted if plan.endpoint is not None else plan.draft.num_draft_tokens,
            prompts=plan.prompts,
            requests=len(prompts),
            max_new_tokens=plan.max_new_tokens,
            server_flags=list(plan.server_flags),
        ),
        levels=levels(plan.concurrencies, drafter, plain),
        acceptance=total,
    )
    report.write(plan.output)
    return report


def _prompts(plan: BenchPlan) -> list[list[int]]:
    draft = plan.draft
    tokenizer = AutoTokenizer.from_pretrained(
        draft.verifier, trust_remote_code=draft.trust_remote_code, revision=draft.revision
    )
    found = read_prompts(plan.prompts, tokenizer, limit=plan.limit)
    if len(found) < max(plan.concurrencies):
        raise ValueError(
            f"{plan.prompts} has {len(found)} prompts; expected at least "
            f"{max(plan.concurrencies)} for as many requests at a time"
        )
    return [prompt.ids.tolist() for prompt in found]


class _Work:
    def __init__(
        self, plan: BenchPlan, prompts: Sequence[Sequence[int]], progress: Progress
    ) -> None:
        self._plan, self._prompts, self._progress = plan, prompts, progress
        self.versions: BenchVersions | None = None

    def start(self, name: str, draft: ServedDraft | None) -> list[Measured]:
        """Measures a server of our own."""
        plan = self._plan
        command = server_command(plan.draft.verifier, draft, plan.server_flags)
        log = plan.output / f"bench-{name.replace(' ', '-')}.log"
        self._progress.message(f"{name}: starting vLLM")
        with running_server(command, log, timeout=plan.start_timeout) as endpoint:
            return self.measure(name, endpoint)

    def measure(self, name: str, endpoint: str) -> list[Measured]:
        """Measures a server that runs."""
        plan, server = self._plan, Server(endpoint)
        self.versions = versions(server)
        return measure(
            server,
            self._prompts,
            plan.max_new_tokens,
            plan.concurrencies,
            progress=self._progress,
            name=name,
        )
