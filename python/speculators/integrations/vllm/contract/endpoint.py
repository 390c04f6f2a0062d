"""A vLLM server that runs already, asked over HTTP for texts and for what it accepted.

It must have been started with the draft, and with ``--per-request-spec-decode-metrics detailed``:
then each answer says how many drafted tokens every verification accepted.
"""

import concurrent.futures
import json
import time
import urllib.error
import urllib.request
from typing import Any

from speculators.integrations.vllm.contract import ContractError
from speculators.integrations.vllm.trace_format import CaseResult, TraceRequest, TraceResult
from speculators.version import __version__

FLAG = "--per-request-spec-decode-metrics detailed"


class Endpoint:
    """Answers a request for the traces of one draft, the one that the server was started with.

    Args:
        url: of the server, such as ``http://127.0.0.1:8000``.
        timeout: seconds that an answer may take.
        concurrency: requests in flight.
    """

    def __init__(self, url: str, *, timeout: float = 600.0, concurrency: int = 8) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
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
        begin = time.monotonic()
        model = self._get("/v1/models")["data"][0]["id"]
        with concurrent.futures.ThreadPoolExecutor(self._concurrency) as pool:
            answers = list(
                pool.map(lambda prompt: self._complete(model, prompt, request), request.prompts)
            )
        steps = [self._steps(answer) for answer in answers]
        result = CaseResult(
            name=request.cases[0].name,
            token_ids=[answer["choices"][0]["token_ids"] for answer in answers],
            accepted=[step["per_step_accepted"] for step in steps],
            drafted=[step.get("per_step_drafted", []) for step in steps],
            seconds=round(time.monotonic() - begin, 3),
        )
        version = self._get("/version").get("version", "unknown")
        return TraceResult(vllm_version=version, speculators_version=__version__, cases=[result])

    def _complete(self, model: str, prompt: list[int], request: TraceRequest) -> Any:
        return self._get(
            "/v1/completions",
            {
                "model": model,
                "prompt": prompt,
                "max_tokens": request.max_new_tokens,
                "temperature": 0,
                "ignore_eos": request.ignore_eos,
                "return_token_ids": True,
            },
        )

    def _steps(self, answer: Any) -> Any:
        steps = (answer.get("metrics") or {}).get("speculative_decoding")
        if not steps or "per_step_accepted" not in steps:
            raise ContractError(
                f"{self._url} does not say what it accepted; expected a server with a draft, "
                f"started with {FLAG}"
            )
        return steps

    def _get(self, path: str, body: Any = None) -> Any:
        """The answer to a GET, or to a POST of JSON."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(  # noqa: S310 - the user's own server
            self._url + path, data=data, headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as answer:  # noqa: S310
                return json.load(answer)
        except urllib.error.HTTPError as error:
            detail = error.read().decode(errors="replace")[:500]
            raise ContractError(f"{self._url}{path} answered {error.code}: {detail}") from None
        except (OSError, ValueError) as error:
            raise ContractError(
                f"no answer from {self._url}{path}: {error}; expected a running vLLM server"
            ) from None
