"""A client that asks a vLLM server for continuations and takes the time of every token.

vLLM's own ``vllm bench serve`` takes texts, which a server splits into tokens anew, and says no
token ids. Here prompts are the tokens that the draft was measured with in our own decoder, and the
answers are compared token for token, so the library needs a client of its own. It is small: threads
and the standard library, which are fast enough for the few streams of such a measurement.
"""

import contextlib
import dataclasses
import http.client
import json
import os
import queue
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

_SECONDS_WITHOUT_AN_ANSWER = 600.0
_DATA = b"data: "
_COUNTERS = "vllm:spec_decode_num_"
_SAMPLE = re.compile(
    rf"^{_COUNTERS}(?P<name>drafts|draft_tokens|accepted_tokens(?:_per_pos)?)_total"
    r"(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)"
)
_POSITION = re.compile(r'(?:^|,)position="(\d+)"')


class BenchError(RuntimeError):
    """A server did not answer as it should."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """One continuation.

    Attributes:
        token_ids: the new tokens.
        first_seconds: from asking to the first of them.
        decode_seconds: from the first to the last.
        first_tokens: how many came with the first.
    """

    token_ids: list[int]
    first_seconds: float
    decode_seconds: float
    first_tokens: int

    @property
    def seconds_per_token(self) -> float | None:
        """Between a token and the next; None where there is no next."""
        further = len(self.token_ids) - self.first_tokens
        return self.decode_seconds / further if further > 0 else None


@dataclasses.dataclass(frozen=True)
class DraftCounters:
    """What a server has counted of its drafts since it started.

    Attributes:
        drafts: verifications with a draft.
        draft_tokens: drafted tokens.
        accepted_tokens: those that the verifier accepted.
        accepted_by_position: drafts whose first, second, ... token was accepted.
    """

    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_by_position: tuple[int, ...] = ()

    def since(self, before: "DraftCounters") -> "DraftCounters":
        """What was counted after ``before``."""
        length = max(len(self.accepted_by_position), len(before.accepted_by_position))
        now, then = (_padded(c.accepted_by_position, length) for c in (self, before))
        return DraftCounters(
            self.drafts - before.drafts,
            self.draft_tokens - before.draft_tokens,
            self.accepted_tokens - before.accepted_tokens,
            tuple(one - other for one, other in zip(now, then, strict=True)),
        )

    def plus(self, other: "DraftCounters") -> "DraftCounters":
        """Both together."""
        nothing = DraftCounters()
        return self.since(nothing.since(other))


def _padded(counts: Sequence[int], length: int) -> list[int]:
    return [*counts, *[0] * (length - len(counts))]


def parse_counters(text: str) -> DraftCounters | None:
    """Reads a server's ``/metrics``.

    Args:
        text: in Prometheus' format; of several engines the sum is taken.

    Returns:
        None if the server does not draft.
    """
    sums: dict[str, int] = {}
    positions: dict[int, int] = {}
    for match in filter(None, map(_SAMPLE.match, text.splitlines())):
        name, value = match["name"], int(float(match["value"]))
        if name == "accepted_tokens_per_pos":
            position = _POSITION.search(match["labels"] or "")
            if position is not None:
                positions[int(position[1])] = positions.get(int(position[1]), 0) + value
        else:
            sums[name] = sums.get(name, 0) + value
    if not sums:
        return None
    return DraftCounters(
        sums.get("drafts", 0),
        sums.get("draft_tokens", 0),
        sums.get("accepted_tokens", 0),
        tuple(positions.get(place, 0) for place in range(max(positions, default=-1) + 1)),
    )


class Server:
    """A running server.

    Args:
        endpoint: its address, with or without ``/v1`` at the end. A key, if it wants one, is taken
            from the environment's ``VLLM_API_KEY``, where vLLM itself looks for it.

    Raises:
        BenchError: it is no address, nobody answers there, or no model is served.
    """

    def __init__(self, endpoint: str) -> None:
        url = urllib.parse.urlsplit(endpoint.rstrip("/").removesuffix("/v1"))
        if url.scheme not in {"http", "https"} or not url.hostname:
            raise BenchError(f"{endpoint} is no server's address; expected http://HOST:PORT")
        self.endpoint, self._url = endpoint, url
        models = json.loads(self.get("/v1/models")).get("data") or []
        if not models:
            raise BenchError(f"{endpoint} serves no model; expected a vLLM server")
        self.model = str(models[0]["id"])

    @property
    def version(self) -> str | None:
        """The release of its vLLM; None if it does not say."""
        try:
            return str(json.loads(self.get("/version"))["version"])
        except (BenchError, ValueError, KeyError):
            return None

    def counters(self) -> DraftCounters | None:
        """What it has counted up to now; None if it does not draft."""
        return parse_counters(self.get("/metrics"))

    def get(self, path: str) -> str:
        """The answer to a request without a body."""
        with self._answer("GET", path) as answer:
            text: str = answer.read().decode("utf-8", "replace")
            return text

    def complete(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        *,
        salt: str,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Completion:
        """Continues a prompt greedily.

        Args:
            prompt: its tokens.
            max_new_tokens: the continuation's.
            salt: what of a prompt is kept is used again with the same salt only.
            stopped: asked between tokens; True ends the continuation where it is.

        Raises:
            BenchError: the server refuses, or its answer has no token ids.
        """
        body = {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": max_new_tokens,
            "temperature": 0,
            "stream": True,
            "return_token_ids": True,
            "cache_salt": salt,
        }
        tokens: list[int] = []
        first_tokens, first = 0, 0.0
        begin = last = time.perf_counter()
        with self._answer("POST", "/v1/completions", body) as answer:
            while (line := answer.readline()) and not stopped():
                found = _tokens_of(line)
                if not found:
                    continue
                last = time.perf_counter()
                if not tokens:
                    first, first_tokens = last, len(found)
                tokens += found
        if not tokens:
            raise BenchError(
                f"{self.endpoint} gave no token ids; expected a vLLM server that knows "
                "return_token_ids, and prompts that do not end the text"
            )
        return Completion(tokens, first - begin, last - first, first_tokens)

    @contextlib.contextmanager
    def _answer(self, method: str, path: str, body: Any = None) -> Iterator[Any]:
        kind = http.client.HTTPSConnection
        if self._url.scheme == "http":
            kind = http.client.HTTPConnection  # type: ignore[assignment]
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        host = self._url.hostname
        connection = kind(str(host), self._url.port, timeout=_SECONDS_WITHOUT_AN_ANSWER)
        try:
            connection.request(
                method, self._url.path + path, None if body is None else json.dumps(body), headers
            )
            answer = connection.getresponse()
            if answer.status != 200:
                said = answer.read().decode("utf-8", "replace")
                raise BenchError(
                    f"{self.endpoint}{path} refuses ({answer.status}): {_reason(said)}"
                )
            yield answer
        except (OSError, http.client.HTTPException) as error:
            raise BenchError(
                f"{self.endpoint} does not answer ({type(error).__name__}: {error})"
            ) from None
        finally:
            connection.close()


def _tokens_of(line: bytes) -> list[int]:
    """The token ids in a line of a stream of events."""
    data = line.strip().removeprefix(_DATA.strip()).strip()
    if not data or data == b"[DONE]" or not line.startswith(_DATA.strip()):
        return []
    event = json.loads(data)
    if "error" in event:
        raise BenchError(f"the server failed: {_reason(json.dumps(event))}")
    return [token for choice in event.get("choices", ()) for token in choice.get("token_ids") or ()]


def _reason(text: str) -> str:
    try:
        found = json.loads(text)
        message = found["error"]["message"] if "error" in found else found["message"]
    except (ValueError, TypeError, KeyError):
        message = text
    return " ".join(str(message).split())[:500]


class Load:
    """Prompts that are worked off so many at a time.

    Args:
        server: who continues them.
        prompts: token ids.
        max_new_tokens: of each.
        concurrency: requests at a time.
        salt: see :meth:`Server.complete`.
        done: called after each prompt.
    """

    def __init__(
        self,
        server: Server,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        concurrency: int,
        salt: str,
        done: Callable[[], None] = lambda: None,
    ) -> None:
        self._server, self._max_new_tokens = server, max_new_tokens
        self._salt, self._done, self._concurrency = salt, done, concurrency
        self._prompts = prompts
        self._stop = threading.Event()
        self._open: queue.SimpleQueue[tuple[int, Sequence[int]]] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[int, Completion | Exception]] = queue.SimpleQueue()

    def run(self) -> tuple[list[Completion], float]:
        """Works all of them off.

        Returns:
            The continuations in the order of the prompts, and the seconds that all of it took.

        Raises:
            BenchError: one of them failed; the others are given up.
        """
        for item in enumerate(self._prompts):
            self._open.put(item)
        workers = [
            threading.Thread(target=self._work, daemon=True) for _ in range(self._concurrency)
        ]
        completions: dict[int, Completion] = {}
        begin = time.perf_counter()
        with self._stopping():
            for worker in workers:
                worker.start()
            while len(completions) < len(self._prompts):
                number, answer = self._answers.get()
                if isinstance(answer, Exception):
                    raise answer
                completions[number] = answer
                self._done()
        seconds = time.perf_counter() - begin
        return [completions[number] for number in range(len(self._prompts))], seconds

    @contextlib.contextmanager
    def _stopping(self) -> Iterator[Self]:
        try:
            yield self
        finally:  # Ctrl-C comes here; the threads end by themselves, or with the process
            self._stop.set()

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                number, prompt = self._open.get_nowait()
            except queue.Empty:
                return
            answer: Completion | Exception
            try:
                answer = self._server.complete(
                    prompt, self._max_new_tokens, salt=self._salt, stopped=self._stop.is_set
                )
            except Exception as error:
                answer = error
            self._answers.put((number, answer))
