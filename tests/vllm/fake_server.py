"""Speaks as a vLLM server with our connector does, and fails as it is told to. No vLLM, no torch.

Started in the place of ``python -P -m vllm.entrypoints.cli.main serve VERIFIER ...``. What it does
wrong is in the environment's ``FAKE_PLAN``, JSON: for the sum of a prompt's tokens a list of
faults, one for each time that it is asked; ``"*"`` is for all other prompts, together. What it was
asked is appended to the file ``FAKE_LOG``.
"""

import http.server
import json
import os
import pathlib
import socket
import sys
import threading
import time

import numpy as np
from safetensors.numpy import save_file

HIDDEN = 8


def states(tokens: list[int], layer: int) -> "np.ndarray[tuple[int, int], np.dtype[np.float32]]":
    """The residual stream of a document: each token's depends on all before it."""
    sums = np.cumsum(np.array(tokens, dtype=np.float64))[:, None]
    return np.sin(sums * np.arange(1, HIDDEN + 1) * (0.1 + layer)).astype(np.float32)


def value(flag: str, words: list[str]) -> str:
    return words[len(words) - 1 - words[::-1].index(flag) + 1]


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    lock = threading.Lock()
    running = 0

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def do_GET(self) -> None:  # noqa: D102 - http.server's
        self._send(200, {"data": [{"id": "the model"}]})

    def do_POST(self) -> None:  # noqa: D102 - http.server's
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            Handler.running += 1
            fault = self._fault(body)
            self._note({**body, "running": Handler.running})
        time.sleep(0.002 * (sum(body["prompt"]) % 7))  # answers come in another order
        with self.lock:
            Handler.running -= 1
        self._answer(body, fault)

    def _answer(self, body: dict[str, object], fault: str) -> None:
        prompt: list[int] = body["prompt"]  # type: ignore[assignment]
        if fault == "die":
            where = "(Worker pid=7) ERROR 01-31 12:00:00 [worker.py:12]"
            print("WARNING a soft limit may lead to OSError: too many files")
            print(f"{where} the worker hit an exception.")
            print(f"{where} Traceback (most recent call last):")
            print(f"{where} RuntimeError: out of memory")
            print("\n".join(["stopping"] * 20), "the engine is dead", flush=True)
            os._exit(3)
        if fault == "hang up":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        if fault.isdigit():
            self._send(int(fault), {"error": {"message": "not now"}})
            return
        if not body.get("kv_transfer_params"):
            limit = body["max_tokens"]
            ids = [(sum(prompt) + n) % 97 for n in range(int(limit))]  # type: ignore[call-overload]
            self._send(200, {"choices": [{"token_ids": ids}]})
            return
        path = STORAGE / f"cmpl-{time.monotonic_ns()}.safetensors"
        given: dict[str, object] = {"path": str(path), "layer_ids": LAYERS, "dtype": DTYPE}
        if fault == "other layers":
            given["layer_ids"] = [1]
        if fault == "stock connector":
            transfer: dict[str, object] = {"hidden_states_path": str(path)}
        else:
            transfer = {"hidden_states": given}
        # The answer may be there before the file is.
        self._send(200, {"choices": [{}], "kv_transfer_params": transfer})
        time.sleep(0.005)
        self._write(path, prompt, fault)

    def _write(self, path: pathlib.Path, prompt: list[int], fault: str) -> None:
        if fault == "no write":
            path.with_name(f"{path.name}.error").write_text("OSError: the disk is full")
            return
        if fault == "no file":
            return
        layers = [layer + (fault == "off by one") for layer in LAYERS]
        stacked = np.stack([states(prompt, layer) for layer in layers], axis=1)
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

    def _fault(self, body: dict[str, object]) -> str:
        plan = PLAN.get(str(sum(body["prompt"])), PLAN.get("*", []))  # type: ignore[call-overload]
        return plan.pop(0) if plan else ""

    def _note(self, body: dict[str, object]) -> None:
        with LOG.open("a") as file:
            file.write(json.dumps(body) + "\n")

    def _send(self, status: int, content: object) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


if __name__ == "__main__":
    WORDS = sys.argv[1:]
    PLAN = json.loads(os.environ.get("FAKE_PLAN", "{}"))
    LOG = pathlib.Path(os.environ["FAKE_LOG"])
    transfer = json.loads(value("--kv-transfer-config", WORDS))
    STORAGE = pathlib.Path(transfer["kv_connector_extra_config"]["shared_storage_path"])
    speculation = json.loads(value("--speculative-config", WORDS))
    LAYERS = speculation["draft_model_config"]["hf_config"]["eagle_aux_hidden_state_layer_ids"]
    DTYPE = value("--dtype", WORDS)
    print("started", flush=True)
    address = (value("--host", WORDS), int(value("--port", WORDS)))
    http.server.ThreadingHTTPServer(address, Handler).serve_forever()
