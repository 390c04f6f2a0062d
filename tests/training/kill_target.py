"""A server of training runs that may be killed: it imports once, and forks a process for each run.

``python kill_target.py FOLDER``; a line on its input names a run, a folder in FOLDER that is begun
or resumed. It prints the process's id, then each update's number as it is made, then how the
process ended.
"""

import os
import pathlib
import sys
from typing import Any

import torch
from tests.training.tiny_runs import make_draft, make_store, make_verifier, run

from speculators.data.store import HiddenStateStore
from speculators.models.verifier import Verifier

CHANGES = {
    "epochs": 8,
    "row_tokens": 40,
    "rows_per_batch": 1,
    "optimizer.name": "muon",
    "validation.every_steps": 5,
    "validation.prompts": 2,
    "checkpoints.every_steps": 2,
}


class _Printed:
    def start(self, total: int, description: str) -> None:
        pass

    def advance(self, count: int) -> None:
        print("updates", count, flush=True)

    def message(self, text: str) -> None:
        pass


def _run(folder: pathlib.Path, store: HiddenStateStore, verifier: Verifier) -> None:
    draft = make_draft("hass", verifier)
    torch.seed()  # a new process does not begin with an old one's random numbers
    options: dict[str, Any] = {"drafting": True, "resume": "auto", "progress": _Printed()}
    run(folder, store, verifier, CHANGES, draft=draft, **options)


def main(folder: pathlib.Path) -> None:
    """Serves runs until the input ends."""
    verifier = make_verifier()
    store = make_store(folder / "store", verifier)
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            try:
                _run(folder / line.strip(), store, verifier)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            os._exit(0)
        print("process", process, flush=True)
        print("ended", os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
