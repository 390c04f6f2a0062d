"""Prompts that a server continues so many at a time, and the time of every token.

vLLM's own ``vllm bench serve`` takes texts, which a server splits into tokens anew, and says no
token ids. Here prompts are the tokens that the draft was measured with in our own decoder, and the
answers are compared token for token, so the library asks by itself. Threads are fast enough for the
few streams of such a measurement.
"""

import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Self

from speculators.integrations.vllm.serving.client import Client, check_token_ids, token_ids


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


def complete(
    client: Client,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    salt: str,
    stopped: Callable[[], bool] = lambda: False,
) -> Completion:
    """Continues a prompt greedily.

    Args:
        client: of the server.
        prompt: its tokens.
        max_new_tokens: the continuation's.
        salt: what of a prompt is kept is used again with the same salt only.
        stopped: asked between tokens; True ends the continuation where it is.

    Raises:
        AnswerError: the server refuses, or its answer has no token ids.
    """
    body = {
        "model": client.model,  # asked for, if it must be, before the clock runs
        "prompt": list(prompt),
        "max_tokens": max_new_tokens,
        "temperature": 0,
        "return_token_ids": True,
        "cache_salt": salt,
    }
    tokens: list[int] = []
    first_tokens, first = 0, 0.0
    begin = last = time.perf_counter()
    with client.stream(body) as events:
        for event in events:
            found = token_ids(event)
            if found:
                last = time.perf_counter()
                if not tokens:
                    first, first_tokens = last, len(found)
                tokens += found
            if stopped():
                break
    check_token_ids(client.endpoint, tokens)
    return Completion(tokens, first - begin, last - first, first_tokens)


class Load:
    """Prompts that are worked off so many at a time.

    Args:
        client: of the server that continues them.
        prompts: token ids.
        max_new_tokens: of each.
        concurrency: requests at a time.
        salt: see :func:`complete`.
        done: called after each prompt.
    """

    def __init__(
        self,
        client: Client,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        concurrency: int,
        salt: str,
        done: Callable[[], None] = lambda: None,
    ) -> None:
        self._client, self._max_new_tokens = client, max_new_tokens
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
            AnswerError: one of them failed; the others are given up.
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
                answer = complete(
                    self._client,
                    prompt,
                    self._max_new_tokens,
                    salt=self._salt,
                    stopped=self._stop.is_set,
                )
            except Exception as error:
                answer = error
            self._answers.put((number, answer))
