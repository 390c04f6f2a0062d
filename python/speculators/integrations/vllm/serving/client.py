"""A vLLM server that is asked over HTTP: where it is, the key, the model, streams, what went wrong.

The contract check, ``bench`` and the hidden states ask for different things and wait differently;
that is theirs. What they share is here, so that an address or a key that works for one of them
works for all. vLLM's address may end in ``/v1``, as other clients want it. A key, if the server
wants one, is taken from ``VLLM_API_KEY``, where vLLM itself looks for it.

Other variables of the environment do not count: a proxy between us and a server would be measured
with it, and a server that we have started is on this machine.
"""

import contextlib
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import httpx2

API_KEY = "VLLM_API_KEY"

_CONNECT_SECONDS = 30.0
# vLLM closes what is idle for 5 s, maybe just when we ask again.
_IDLE_SECONDS = 2.0
_LONGEST_REASON = 500
_DATA = "data:"
_PASSING = {408, 425, 429, 500, 502, 503, 504}


class AnswerError(RuntimeError):
    """A server does not answer, refuses, or answers something else than it was asked for.

    Attributes:
        may_pass: whether the same request may be answered later.
    """

    def __init__(self, message: str, *, may_pass: bool = False) -> None:
        super().__init__(message)
        self.may_pass = may_pass


class Client:
    """A running server. Threads may share it.

    Nothing is asked before it is needed.

    Args:
        endpoint: its address, with or without ``/v1`` at the end.
        timeout: seconds without a sign of an answer.

    Raises:
        AnswerError: it is no address.
    """

    def __init__(self, endpoint: str, *, timeout: float = 600.0) -> None:
        self.endpoint = endpoint
        key = os.environ.get(API_KEY)
        try:
            url = httpx2.URL(endpoint.rstrip("/").removesuffix("/v1"))
            if url.scheme not in {"http", "https"} or not url.host:
                raise httpx2.InvalidURL(endpoint)
        except httpx2.InvalidURL:
            raise AnswerError(
                f"{endpoint} is no server's address; expected http://HOST:PORT"
            ) from None
        self._http = httpx2.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(timeout, connect=min(timeout, _CONNECT_SECONDS)),
            limits=httpx2.Limits(keepalive_expiry=_IDLE_SECONDS),  # as many as are asked for
            trust_env=False,
        )
        self._model: str | None = None
        self._model_lock = threading.Lock()

    def close(self) -> None:
        """Closes its connections."""
        self._http.close()

    @property
    def model(self) -> str:
        """The name of the model that it serves.

        Raises:
            AnswerError: it serves none.
        """
        with self._model_lock:
            if self._model is None:
                models = self.get("/v1/models").get("data") or []
                if not models:
                    raise AnswerError(f"{self.endpoint} serves no model; expected a vLLM server")
                self._model = str(models[0]["id"])
            return self._model

    @property
    def version(self) -> str | None:
        """The release of its vLLM; None if it does not say."""
        try:
            return str(self.get("/version")["version"])
        except (AnswerError, KeyError, TypeError):
            return None

    def healthy(self) -> bool:
        """Whether it is there and ready."""
        try:
            self.text("/health")
        except AnswerError:
            return False
        return True

    def text(self, path: str) -> str:
        """The answer to a request without a body.

        Raises:
            AnswerError: there is none.
        """
        with self._answer("GET", path) as answer:
            return answer.read().decode("utf-8", "replace")

    def get(self, path: str) -> Any:
        """The same, from JSON."""
        return self._parsed(self.text(path))

    def complete(self, body: Mapping[str, Any]) -> Any:
        """The answer to a request for a completion; the model's name is added to it.

        Raises:
            AnswerError: there is none.
        """
        with self._answer("POST", "/v1/completions", {"model": self.model, **body}) as answer:
            text = answer.read().decode("utf-8", "replace")
        return self._parsed(text)

    @contextlib.contextmanager
    def stream(self, body: Mapping[str, Any]) -> Iterator[Iterator[Any]]:
        """The same in pieces, as the server has them; a context that is left ends the request.

        Raises:
            AnswerError: there is no answer, or it ends in an error.
        """
        whole = {"model": self.model, "stream": True, **body}
        with self._answer("POST", "/v1/completions", whole) as answer:
            yield self._events(answer)

    def _events(self, answer: httpx2.Response) -> Iterator[Any]:
        for line in answer.iter_lines():
            data = line.removeprefix(_DATA).strip()
            if not line.startswith(_DATA) or data == "[DONE]":
                continue
            event = self._parsed(data)
            if "error" in event:
                raise AnswerError(f"{self.endpoint} failed: {_reason(data)}")
            yield event

    def _parsed(self, text: str) -> Any:
        try:
            found = json.loads(text)
        except ValueError as error:
            raise AnswerError(f"{self.endpoint} answers no JSON ({error})", may_pass=True) from None
        if not isinstance(found, dict):
            raise AnswerError(f"{self.endpoint} answers {text[:80]}; expected an object of JSON")
        return found

    @contextlib.contextmanager
    def _answer(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> Iterator[httpx2.Response]:
        try:
            with self._http.stream(method, path, json=body) as answer:
                if answer.status_code != 200:
                    answer.read()
                    raise self._refusal(path, answer)
                yield answer
        except httpx2.HTTPError as error:
            raise AnswerError(
                f"{self.endpoint} does not answer ({type(error).__name__}: {error})", may_pass=True
            ) from None

    def _refusal(self, path: str, answer: httpx2.Response) -> AnswerError:
        status = answer.status_code
        text = f"{self.endpoint}{path} refuses ({status}): {_reason(answer.text)}"
        if status in {401, 403}:
            text += f"; a key is taken from the environment's {API_KEY}"
        return AnswerError(text, may_pass=status in _PASSING)


def token_ids(answer: Mapping[str, Any]) -> list[int]:
    """The token ids in an answer, or in a piece of it, to a request with ``return_token_ids``."""
    return [
        token for choice in answer.get("choices", ()) for token in choice.get("token_ids") or ()
    ]


def check_token_ids(endpoint: str, ids: Sequence[int]) -> None:
    """Whether an answer had any.

    Raises:
        AnswerError: it had none.
    """
    if not ids:
        raise AnswerError(
            f"{endpoint} gave no token ids; expected a vLLM server that knows return_token_ids, "
            "and prompts that do not end the text"
        )


def _reason(text: str) -> str:
    """What a server says of an error, in one line."""
    try:
        found = json.loads(text)
        message = found["error"]["message"] if "error" in found else found["message"]
    except (ValueError, TypeError, KeyError):
        message = text
    return " ".join(str(message).split())[:_LONGEST_REASON]
