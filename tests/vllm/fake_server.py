"""Speaks as a vLLM server does, and fails as it is told to. No vLLM, no torch.

Either in a test's own process, with ``running``, or as a program in the place of
``python -P -m vllm.entrypoints.cli.main serve VERIFIER ...``. The program is told by variables:

==============  ===================================================================================
``FAKE_PLAN``   ``Fake.plan``, JSON
``FAKE_LOG``    a file that gets what it was asked, a line for each request
``FAKE_START``  ``fails``: it ends at once; ``hangs``: it never becomes healthy
``FAKE_CHILD``  a file that gets the number of a process that it starts and does not stop
==============  ===================================================================================
"""

import contextlib
import dataclasses
import http.server
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from safetensors.numpy import save_file

MODEL = "the model"
HIDDEN = 8


@dataclasses.dataclass(frozen=True)
class Connector:
    """Our connector: which streams go where."""

    storage: pathlib.Path
    layers: Sequence[int]
    dtype: str


@dataclasses.dataclass
class Fake:
    """A server: what it does, and what it has seen.

    Attributes:
        plan: for the sum of a prompt's tokens a list of faults, one for each time that it is
            asked; ``"*"`` is for all other prompts, together.
        drafts: whether it counts drafts: for each request 10, 9 of their 20 tokens accepted.
        key: which it wants to be given.
        trace: from a prompt, new tokens and what each verification accepted; None: the tokens are
            ``tokens`` and nothing is said of verifications.
        connector: if it gives hidden states.
        requests: the bodies of what it was asked, with how many were ``running`` then.
        headers: those of the same requests.
    """

    plan: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    drafts: bool = True
    key: str | None = None
    trace: Callable[[list[int]], tuple[list[int], list[int]]] | None = None
    connector: Connector | None = None
    healthy: bool = True
    requests: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    headers: list[dict[str, str]] = dataclasses.field(default_factory=list)
    log: pathlib.Path | None = None
    running: int = 0
    asked_for_health: int = 0
    lock: Any = dataclasses.field(default_factory=threading.Lock)


def tokens(prompt: Sequence[int], count: int) -> list[int]:
    """What it continues a prompt with: its sum and what follows that."""
    return list(range(sum(prompt), sum(prompt) + count))


def states(ids: Sequence[int], layer: int) -> "np.ndarray[tuple[int, int], np.dtype[np.float32]]":
    """The residual stream of a document: each token's depends on all before it."""
    sums = np.cumsum(np.array(ids, dtype=np.float64))[:, None]
    return np.sin(sums * np.arange(1, HIDDEN + 1) * (0.1 + layer)).astype(np.float32)


@contextlib.contextmanager
def running(fake: Fake) -> Iterator[str]:
    """The server in this process, on a port of its own; gives its address."""
    handler = type("Handler", (_Handler,), {"fake": fake})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    fake: Fake

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        answers = {
            "/health": "",
            "/v1/models": json.dumps({"data": [{"id": MODEL}]}),
            "/version": '{"version": "9.9"}',
            "/metrics": self._metrics() if self.fake.drafts else "",
        }
        if self.path == "/health":
            self.fake.asked_for_health += 1  # the first time, it is not there yet
            ready = self.fake.healthy and self.fake.asked_for_health > 1
            self._send(200 if ready else 503, "")
        elif self._allowed():
            self._send(200, answers[self.path])

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._allowed():
            return
        with self.fake.lock:
            self.fake.running += 1
            fault = self._fault(body["prompt"])
            self._note({**body, "running": self.fake.running})
        if self.path != "/v1/completions" or body["model"] != MODEL:
            fault = "404"
        if body.get("stream") and not fault.isdigit() and fault != "hang up":
            self._stream(body, fault)
        else:
            time.sleep(0.002 * (sum(body["prompt"]) % 7))  # answers come in another order
            self._done()
            self._answer(body, fault)

    def _allowed(self) -> bool:
        key = self.fake.key
        allowed = key is None or self.headers["Authorization"] == f"Bearer {key}"
        if not allowed:
            self._send(401, '{"error": "Unauthorized"}')
        return allowed

    def _metrics(self) -> str:
        count, name = len(self.fake.requests), "vllm:spec_decode_num"
        return (
            f"{name}_drafts_total {10 * count}\n"
            f"{name}_draft_tokens_total {20 * count}\n"
            f"{name}_accepted_tokens_total {9 * count}\n"
            f'{name}_accepted_tokens_per_pos_total{{position="0"}} {6 * count}\n'
            f'{name}_accepted_tokens_per_pos_total{{position="1"}} {3 * count}\n'
        )

    def _answer(self, body: dict[str, Any], fault: str) -> None:
        prompt = body["prompt"]
        if fault == "die":
            _die()
        if fault == "hang up":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif fault.isdigit():
            self._send(int(fault), '{"error": {"message": "not\\nnow"}}')
        elif body.get("kv_transfer_params") and self.fake.connector is not None:
            self._give_states(prompt, fault, self.fake.connector)
        elif self.fake.trace is not None:
            ids, accepted = self.fake.trace(prompt)
            metrics = {"speculative_decoding": {"per_step_accepted": accepted}}
            answer = {"choices": [{"token_ids": ids}], "metrics": metrics}
            if fault == "no metrics":
                answer["metrics"] = None  # type: ignore[assignment]
            self._send(200, json.dumps(answer))
        else:
            ids = tokens(prompt, body["max_tokens"])
            self._send(200, json.dumps({"choices": [{"token_ids": ids}]}))

    def _stream(self, body: dict[str, Any], fault: str) -> None:
        """The first token, then two at a time, as vLLM does with a draft."""
        ids = tokens(body["prompt"], body["max_tokens"])
        parts = [ids[:1], *(ids[i : i + 2] for i in range(1, len(ids), 2))]
        events = [json.dumps({"choices": [{"token_ids": part}]}) for part in parts]
        if fault == "no tokens":
            events = ['{"choices": []}']
        if fault == "fail":
            events[1:] = ['{"error": {"message": "out of memory"}}']
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in [*events, "[DONE]"]:
            line = f"data: {event}\n\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
            self.wfile.flush()
            time.sleep(0.005)
        self._done()
        self.wfile.write(b"0\r\n\r\n")

    def _give_states(self, prompt: list[int], fault: str, connector: Connector) -> None:
        path = connector.storage / f"cmpl-{time.monotonic_ns()}.safetensors"
        given: dict[str, Any] = {
            "path": str(path),
            "layer_ids": list(connector.layers),
            "dtype": connector.dtype,
        }
        if fault == "other layers":
            given["layer_ids"] = [1]
        transfer: dict[str, Any] = {"hidden_states": given}
        if fault == "stock connector":
            transfer = {"hidden_states_path": str(path)}
        # The answer may be there before the file is.
        self._send(200, json.dumps({"choices": [{}], "kv_transfer_params": transfer}))
        time.sleep(0.005)
        _write_states(path, prompt, fault, connector.layers)

    def _fault(self, prompt: list[int]) -> str:
        plan = self.fake.plan.get(str(sum(prompt)), self.fake.plan.get("*", []))
        return plan.pop(0) if plan else ""

    def _note(self, body: dict[str, Any]) -> None:
        self.fake.requests.append(body)
        self.fake.headers.append(dict(self.headers))
        if self.fake.log is not None:
            with self.fake.log.open("a") as file:
                file.write(json.dumps(body) + "\n")

    def _done(self) -> None:
        """Said before the client knows, who asks for the next at once."""
        with self.fake.lock:
            self.fake.running -= 1

    def _send(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())


def _write_states(path: pathlib.Path, prompt: list[int], fault: str, layers: Sequence[int]) -> None:
    if fault == "no write":
        path.with_name(f"{path.name}.error").write_text("OSError: the disk is full")
        return
    if fault == "no file":
        return
    stacked = np.stack([states(prompt, k + (fault == "off by one")) for k in layers], axis=1)
    ids = np.array(prompt, dtype=np.int64)
    if fault == "other tokens":
        ids = ids + 1
    if fault == "short":
        stacked = stacked[:-1]
    temporary = path.with_name(f".{path.name}.partial")
    save_file({"hidden_states": stacked, "token_ids": ids}, temporary)
    if fault == "corrupt":
        temporary.write_bytes(temporary.read_bytes()[:-5])
    temporary.replace(path)


def _die() -> None:
    where = "(Worker pid=7) ERROR 01-31 12:00:00 [worker.py:12]"
    print("WARNING a soft limit may lead to OSError: too many files")
    print(f"{where} the worker hit an exception.")
    print(f"{where} Traceback (most recent call last):")
    print(f"{where} RuntimeError: out of memory")
    print("\n".join(["stopping"] * 20), "the engine is dead", flush=True)
    os._exit(3)


def _value(flag: str, words: list[str]) -> str:
    return words[len(words) - 1 - words[::-1].index(flag) + 1]


def _connector(words: list[str]) -> Connector | None:
    """As vLLM's flags say."""
    if "--kv-transfer-config" not in words:
        return None
    transfer = json.loads(_value("--kv-transfer-config", words))
    speculation = json.loads(_value("--speculative-config", words))
    return Connector(
        pathlib.Path(transfer["kv_connector_extra_config"]["shared_storage_path"]),
        speculation["draft_model_config"]["hf_config"]["eagle_aux_hidden_state_layer_ids"],
        _value("--dtype", words),
    )


def _main(words: list[str]) -> None:
    print("started with", *words, flush=True)
    start = os.environ.get("FAKE_START", "")
    if start == "fails":
        raise SystemExit("no memory left")
    if "FAKE_CHILD" in os.environ:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        pathlib.Path(os.environ["FAKE_CHILD"]).write_text(str(child.pid))
    fake = Fake(
        plan=json.loads(os.environ.get("FAKE_PLAN", "{}")),
        connector=_connector(words),
        healthy=start != "hangs",
        log=pathlib.Path(os.environ["FAKE_LOG"]) if "FAKE_LOG" in os.environ else None,
    )
    address = (_value("--host", words), int(_value("--port", words)))
    handler = type("Handler", (_Handler,), {"fake": fake})
    http.server.ThreadingHTTPServer(address, handler).serve_forever()


if __name__ == "__main__":
    _main(sys.argv[1:])
