"""Requests to a server that gives hidden states: one at a time, asked again where that may help.

A run takes hours, and a request fails for reasons that pass: the server is busy, a connection
breaks, a file was cut. So all that may pass is tried again, with longer and longer pauses. What the
server refuses for good ends the run at once.
"""

import contextlib
import dataclasses
import pathlib
import re
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from speculators.data.regenerate import RegenerateSettings
from speculators.integrations.vllm.serving.client import (
    AnswerError,
    Client,
    check_token_ids,
    token_ids,
)
from speculators.integrations.vllm.serving.server import tail

_LONGEST_PAUSE = 30.0
_POLL_SECONDS = 0.002
_LONGEST_POLL = 0.1
_SHOWN_LINES = 8
# As in "(Worker pid=1) ERROR 01-31 12:00:00 [worker.py:12] RuntimeError: out of memory".
_ERROR = re.compile(r"\bERROR\b[^\[]*\[[^\]]*\] (.*\S)")
_EXCEPTION = re.compile(r"[\w.]*(?:Error|Exception): ")

_Result = TypeVar("_Result")


class HiddenStatesError(RuntimeError):
    """The server gives no hidden states, and asking again would not help."""


@dataclasses.dataclass(frozen=True)
class Patience:
    """How long failures are put up with.

    Attributes:
        attempts: of a request, all in all.
        first_pause: seconds after the first failure; it doubles with each further one.
        answer_seconds: until a request must be answered.
        file_seconds: until the file that an answer names must be there.
    """

    attempts: int = 6
    first_pause: float = 0.5
    answer_seconds: float = 600.0
    file_seconds: float = 60.0


class HiddenStatesServer:
    """A running server with our connector. Threads may share it.

    Args:
        endpoint: its address; for a key see ``serving.client``.
        layer_ids: the residual streams wanted, sorted.
        hidden_size: H.
        dtype: that the verifier is to run in, such as ``"bfloat16"``.
        command: what starts such a server; for error messages.
        log: of a server that we have started.
        patience: see there.

    Raises:
        AnswerError: it is no address.
    """

    def __init__(
        self,
        endpoint: str,
        layer_ids: Sequence[int],
        hidden_size: int,
        dtype: str,
        *,
        command: str,
        log: pathlib.Path | None = None,
        patience: Patience | None = None,
    ) -> None:
        self.endpoint = endpoint
        self._layer_ids, self._hidden_size, self._dtype = tuple(layer_ids), hidden_size, dtype
        self._command, self._log, self._patience = command, log, patience or Patience()
        self._client = Client(endpoint, timeout=self._patience.answer_seconds)
        self._stop = threading.Event()

    def stop(self) -> None:
        """Lets requests that wait or would be tried again end."""
        self._stop.set()

    def states(self, document: Tensor) -> dict[int, Tensor]:
        """The residual streams of a document, int64 ``[L]``.

        Raises:
            HiddenStatesError: there are none to be had.
        """
        ids: list[int] = document.tolist()
        return self._persist(lambda: self._states(ids))

    def response(
        self,
        prompt: Tensor,
        settings: RegenerateSettings,
        seed: int,
        eos_token_ids: Sequence[int],
    ) -> Tensor:
        """A response, int64 ``[M]``, to a prompt, int64 ``[L]``.

        Raises:
            HiddenStatesError: there is none to be had.
        """
        body = {
            "prompt": prompt.tolist(),
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "stop_token_ids": list(eos_token_ids),
            "return_token_ids": True,
        }
        if settings.temperature > 0:  # vLLM draws no numbers for greedy ones, if it has no seed
            body |= {"top_p": settings.top_p, "seed": seed % 2**63}
        ids = self._persist(lambda: self._response(body))
        return torch.tensor(ids, dtype=torch.int64)

    def _response(self, body: dict[str, Any]) -> list[int]:
        ids = token_ids(self._client.complete(body))
        check_token_ids(self.endpoint, ids)
        return ids

    def _states(self, ids: list[int]) -> dict[int, Tensor]:
        answer = self._client.complete(
            {
                "prompt": ids,
                "max_tokens": 1,
                "temperature": 0,
                # Nothing that is kept of another document is used for this one.
                "cache_salt": uuid.uuid4().hex,
                "kv_transfer_params": {"hidden_states": True},
            }
        )
        given = (answer.get("kv_transfer_params") or {}).get("hidden_states") or {}
        self._check_server(given)
        return self._read(pathlib.Path(given["path"]), ids)

    def _check_server(self, given: dict[str, Any]) -> None:
        """Whether the server was started as it must be."""
        expected = {"layer_ids": list(self._layer_ids), "dtype": self._dtype}
        found = {name: given.get(name) for name in expected}
        if "path" not in given or found != expected:
            what = f"gives {found}" if "path" in given else "gives no hidden states"
            raise HiddenStatesError(
                f"{self.endpoint} {what}; expected {expected}. Start it with\n{self._command}"
            )

    def _read(self, path: pathlib.Path, ids: list[int]) -> dict[int, Tensor]:
        """Reads a file and removes it, whatever is in it."""
        self._wait_for(path)
        try:
            # Whole into memory: a mapped file would be read after it has been removed.
            tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        except (OSError, SafetensorError) as error:
            raise AnswerError(f"{path} cannot be read: {error}", may_pass=True) from None
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
        states, tokens = tensors.get("hidden_states"), tensors.get("token_ids")
        shape = [len(ids), len(self._layer_ids), self._hidden_size]
        if states is None or tokens is None or list(states.shape) != shape:
            found = {name: list(tensor.shape) for name, tensor in tensors.items()}
            raise AnswerError(f"{path} has {found}; expected hidden_states {shape}", may_pass=True)
        if tokens.tolist() != ids:
            raise AnswerError(
                f"{path} has the states of other tokens than those asked for", may_pass=True
            )
        return {k: states[:, place] for place, k in enumerate(self._layer_ids)}

    def _wait_for(self, path: pathlib.Path) -> None:
        failed = path.with_name(f"{path.name}.error")
        end, pause = time.monotonic() + self._patience.file_seconds, _POLL_SECONDS
        while not path.exists():
            if failed.exists():
                reason = failed.read_text(encoding="utf-8", errors="replace")
                failed.unlink(missing_ok=True)
                raise AnswerError(f"the server could not write {path}: {reason}", may_pass=True)
            if time.monotonic() > end or self._stop.is_set():
                raise AnswerError(
                    f"{path}, which the server names, is not there; a server on another machine "
                    "must write to a folder that both see by the same name",
                    may_pass=True,
                )
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_POLL)

    def _persist(self, attempt: Callable[[], _Result]) -> _Result:
        """Tries until it works or the patience ends."""
        pause = self._patience.first_pause
        for number in range(1, self._patience.attempts + 1):
            try:
                return attempt()
            except AnswerError as error:
                if not error.may_pass:
                    raise HiddenStatesError(str(error)) from None
                if number == self._patience.attempts or self._stop.is_set():
                    raise HiddenStatesError(self._said(error, number)) from None
            self._stop.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        raise AssertionError

    def _said(self, error: AnswerError, attempts: int) -> str:
        text = f"{error} (tried {attempts} times)"
        if self._log is not None and self._log.exists():
            text += f"{_first_error(self._log)}; the server's log {self._log} ends:\n"
            text += tail(self._log, _SHOWN_LINES)
        return text


def _first_error(log: pathlib.Path) -> str:
    """What made a server fail stands far above the words with which its parts end.

    It logs tracebacks line by line, so the first line is followed by the first exception.
    """
    with log.open(encoding="utf-8", errors="replace") as lines:
        errors = [found[1] for found in map(_ERROR.search, lines) if found]
    telling = dict.fromkeys([*errors[:1], *filter(_EXCEPTION.match, errors)][:2])
    return f"; its first error was {' '.join(telling)[:400]}" if telling else ""
