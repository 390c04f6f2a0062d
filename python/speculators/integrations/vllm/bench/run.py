"""One measurement from the prompts to the report: the server without the draft, then those with it.

Servers that are started here run one after the other, since two of them would share the machine's
memory and its cores. vLLM drafts as many tokens as it was started for, so each number of drafted
tokens is a server of its own.
"""

import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Sequence

from transformers import AutoTokenizer

from speculators.data.generate import Progress
from speculators.evaluation.prompts import read_prompts
from speculators.integrations.vllm.bench.measurement import (
    Measured,
    MeasuredDrafter,
    levels,
    measure,
    versions,
)
from speculators.integrations.vllm.bench.report import (
    BenchReport,
    BenchSettings,
    BenchVersions,
    Drafter,
)
from speculators.integrations.vllm.serving.checks import ServedDraft
from speculators.integrations.vllm.serving.client import Client
from speculators.integrations.vllm.serving.command import server_command
from speculators.integrations.vllm.serving.server import running_server

PLAIN, DRAFTER = "plain", "with the draft"


@dataclasses.dataclass(frozen=True)
class BenchPlan:
    """What is to be measured.

    Attributes:
        draft: a draft that fits.
        ks: numbers of drafted tokens, a server for each; empty with ``endpoint``, which decides.
        prompts: a file of prompts.
        limit: so many of them, the first ones.
        max_new_tokens: of each, at least 2.
        concurrencies: requests at a time.
        output: where the report goes, and the logs of servers that fail.
        server_flags: of vLLM, for servers that are started.
        endpoint: a running server with the draft; None to start all servers.
        baseline_endpoint: a running server without it, beside ``endpoint``.
        start_timeout: seconds for a server to start.
    """

    draft: ServedDraft
    ks: Sequence[int]
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
        AnswerError: a server does not answer as it should.
    """
    prompts = _prompts(plan)
    work = _Work(plan, prompts, progress)
    if plan.endpoint is None:
        plain: list[Measured] | None = work.start(PLAIN, None)
        drafters = [
            MeasuredDrafter(work.start(f"{DRAFTER}, K {k}", k, log=f"k{k}"), k) for k in plan.ks
        ]
    else:
        plain = work.measure(PLAIN, plan.baseline_endpoint) if plan.baseline_endpoint else None
        drafters = [_counted(work.measure(DRAFTER, plan.endpoint))]
    assert work.versions is not None  # noqa: S101 - for the type checker
    report = BenchReport(
        command=sys.argv,
        versions=work.versions,
        draft=str(plan.draft.directory),
        verifier=plan.draft.verifier,
        settings=BenchSettings(
            prompts=plan.prompts,
            requests=len(prompts),
            max_new_tokens=plan.max_new_tokens,
            server_flags=list(plan.server_flags),
        ),
        drafters=[Drafter(k=one.k, acceptance=one.acceptance) for one in drafters],
        levels=levels(plan.concurrencies, drafters, plain),
    )
    report.write(plan.output)
    return report


def _counted(measured: list[Measured]) -> MeasuredDrafter:
    """A server that runs already drafts as many tokens as it counts positions."""
    found = MeasuredDrafter(measured, None).acceptance
    count = 0 if found is None else len(found.acceptance_by_position)
    return MeasuredDrafter(measured, count or None)


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

    def start(self, name: str, k: int | None, *, log: str = PLAIN) -> list[Measured]:
        """Measures a server of our own, without the draft or with ``k`` drafted tokens."""
        plan = self._plan
        draft = None if k is None else dataclasses.replace(plan.draft, num_draft_tokens=k)
        command = server_command(plan.draft.verifier, draft, plan.server_flags)
        file = plan.output / f"bench-{log}.log"
        self._progress.message(f"{name}: starting vLLM")
        with running_server(command, file, timeout=plan.start_timeout) as endpoint:
            return self.measure(name, endpoint)

    def measure(self, name: str, endpoint: str) -> list[Measured]:
        """Measures a server that runs."""
        plan = self._plan
        with contextlib.closing(Client(endpoint)) as client:
            self.versions = versions(client)
            return measure(
                client,
                self._prompts,
                plan.max_new_tokens,
                plan.concurrencies,
                progress=self._progress,
                name=name,
            )
