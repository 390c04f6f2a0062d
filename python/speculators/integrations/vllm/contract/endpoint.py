"""A vLLM server that runs already, asked over HTTP for texts and for what it accepted.

It must have been started with the draft, and with ``--per-request-spec-decode-metrics detailed``:
then each answer says how many drafted tokens every verification accepted.
"""

import concurrent.futures
import contextlib
import time
from typing import Any

from speculators.integrations.vllm.contract.check import ContractError
from speculators.integrations.vllm.contract.trace_format import (
    CaseResult,
    TraceRequest,
    TraceResult,
)
from speculators.integrations.vllm.serving.client import (
    AnswerError,
    Client,
    check_token_ids,
    token_ids,
)
from speculators.version import __version__

FLAG = "--per-request-spec-decode-metrics detailed"


class Endpoint:
    """Answers a request for the traces of one draft, the one that the server was started with.

    Args:
        url: of the server, such as ``http://127.0.0.1:8000``; for a key see ``serving.client``.
        timeout: seconds that an answer may take.
        concurrency: requests in flight.
    """

    def __init__(self, url: str, *, timeout: float = 600.0, concurrency: int = 8) -> None:
        self._url = url
        self._timeout = timeout
        self._concurrency = concurrency

    def __call__(self, request: TraceRequest) -> TraceResult:
        """Asks for all prompts.

        Raises:
            ContractError: there is no such server, or it does not say what it accepted.
        """
        if len(request.cases) != 1:
            raise ContractError(
                f"{self._url} serves one draft, and {len(request.cases)} were given; expected one"
            )
        try:
            with contextlib.closing(Client(self._url, timeout=self._timeout)) as client:
                return self._trace(client, request)
        except AnswerError as error:
            raise ContractError(f"{error}; expected a running vLLM server") from None

    def _trace(self, client: Client, request: TraceRequest) -> TraceResult:
        begin = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(self._concurrency) as pool:
            results = list(
                pool.map(lambda prompt: self._complete(client, prompt, request), request.prompts)
            )
        result = CaseResult(
            name=request.cases[0].name,
            token_ids=[ids for ids, _ in results],
            accepted=[step["per_step_accepted"] for _, step in results],
            drafted=[step.get("per_step_drafted", []) for _, step in results],
            seconds=round(time.monotonic() - begin, 3),
        )
        return TraceResult(
            vllm_version=client.version or "unknown",
            speculators_version=__version__,
            cases=[result],
        )

    def _complete(
        self, client: Client, prompt: list[int], request: TraceRequest
    ) -> tuple[list[int], dict[str, Any]]:
        """The new tokens, and what each verification accepted."""
        answer = client.complete(
            {
                "prompt": prompt,
                "max_tokens": request.max_new_tokens,
                "temperature": 0,
                "ignore_eos": request.ignore_eos,
                "return_token_ids": True,
            }
        )
        ids = token_ids(answer)
        check_token_ids(self._url, ids)
        steps = (answer.get("metrics") or {}).get("speculative_decoding")
        if not steps or "per_step_accepted" not in steps:
            raise ContractError(
                f"{self._url} does not say what it accepted; expected a server with a draft, "
                f"started with {FLAG}"
            )
        return ids, steps
