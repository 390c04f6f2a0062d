"""A trace by a program.

``python -m speculators.integrations.vllm.contract.trace REQUEST.json RESULT.json``

vLLM wants an environment of its own, so whoever asks for a trace starts this with that
environment's Python. The files are a :class:`.trace_format.TraceRequest` and a
:class:`.trace_format.TraceResult`. vLLM's own talk goes to standard error and output. On a CPU, set
``OMP_NUM_THREADS`` to the cores that are free: small models are fastest with 1.

Exit status: 0 if there is a result, whatever became of the cases; 2 if the request is not valid.
"""

import pathlib
import sys
from collections.abc import Sequence

import pydantic

from speculators.atomic import atomic_file
from speculators.integrations.vllm.contract.engine import trace
from speculators.integrations.vllm.contract.trace_format import CaseResult, TraceRequest


def main(arguments: Sequence[str]) -> int:
    """Runs what the first file asks for and writes the second."""
    if len(arguments) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    source, target = map(pathlib.Path, arguments)
    try:
        request = TraceRequest.model_validate_json(source.read_bytes())
    except (OSError, pydantic.ValidationError) as error:
        print(f"{source} is not a request for a trace: {error}", file=sys.stderr)
        return 2
    result = trace(request, report=_report)
    with atomic_file(target, "w") as file:
        file.write(result.model_dump_json(indent=2) + "\n")
    return 0


def _report(result: CaseResult) -> None:
    outcome = result.error or f"{sum(map(len, result.token_ids))} tokens"
    print(f"{result.name}: {outcome}, {result.seconds:.1f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
