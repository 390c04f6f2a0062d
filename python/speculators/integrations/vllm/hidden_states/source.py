"""``--generate.source=vllm``: hidden states, and responses, from a vLLM server.

The server is started here, with the Python of an environment that has vLLM and this library, and
stopped at the end; or it runs already, on this machine or one that shares a folder with it. Both
are asked over HTTP, so that nothing of vLLM is needed in this process, and both answer many
requests at a time, which vLLM batches as it likes.

*Are these states the same as those of transformers?* In float32 nearly, in bfloat16 up to rounding:
see ``comparison``, which looks at the first documents of every run. A store that was
begun must end with the bytes that it would have had, so states that round otherwise are others:
``identity`` is that of transformers with ``"computed_by": "vllm"`` beside it, and no store is
finished by the other one. Which server it is, where, in which batches and of which release does not
count, as the device and the attention kernel do not count for transformers.

Prefix caching is off in servers that are started here. Another server may have it on: each request
has a salt of its own, so that states of all its tokens are computed. vLLM's default, chunked
prefill, stays: states are read when the last chunk is done.
"""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import torch
from torch import Tensor

from speculators.data.ordering import derived_seed
from speculators.data.regenerate import RegenerateSettings
from speculators.data.sources import HiddenStateSource, TransformersSource, register_source
from speculators.integrations.vllm.hidden_states.client import (
    HiddenStatesError,
    HiddenStatesServer,
    Patience,
)
from speculators.integrations.vllm.hidden_states.comparison import (
    Tolerance,
    check_states,
    compare_states,
)
from speculators.integrations.vllm.serving.server import (
    ServerCommand,
    ServerError,
    check_server_flags,
    running_server,
)

_CONNECTOR = "HiddenStatesConnector"
_CONNECTOR_MODULE = "speculators.integrations.vllm.hidden_states.connector"
_COMPARED_TOKENS = 4096
_OURS = ("--speculative-config", "--kv-transfer-config", "--model", "--dtype")
_ANY_LENGTH = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"


@dataclasses.dataclass(frozen=True)
class VllmOptions:
    """How vLLM is used.

    Attributes:
        endpoint: a server that runs already; None starts one.
        python: of the environment with vLLM; None: this one.
        flags: further ones of ``vllm serve``, such as ``--tensor-parallel-size=2``.
        eager: no graphs are captured and nothing is compiled, which reading gains little from and
            writing much.
        max_model_len: tokens of the longest request, one for the answer included; None: the
            verifier's positions.
        max_requests: in flight.
        storage: the folder through which states come, best one in memory; None: a temporary one.
        start_timeout: seconds until the server must answer.
        patience: with failures.
        tolerance: of the comparison with transformers.
    """

    endpoint: str | None = None
    python: str | os.PathLike[str] | None = None
    flags: Sequence[str] = ()
    eager: bool = True
    max_model_len: int | None = None
    max_requests: int = 32
    storage: str | os.PathLike[str] | None = None
    start_timeout: float = 900.0
    patience: Patience = dataclasses.field(default_factory=Patience)
    tolerance: Tolerance = dataclasses.field(default_factory=Tolerance)

    def __post_init__(self) -> None:
        if self.max_requests < 1:
            raise ValueError(f"max_requests is {self.max_requests}; expected 1 or more")
        check_server_flags(self.flags)
        for flag in self.flags:
            if flag.replace("_", "-").partition("=")[0].partition(".")[0] in _OURS:
                raise ValueError(f"{flag} is not for vLLM here: generate sets it itself")


def server_command(
    verifier: str, layer_ids: Sequence[int], dtype: str, storage: str, options: VllmOptions
) -> ServerCommand:
    """The command for a server that gives hidden states; host and port are left out.

    Args:
        verifier: a folder or a name on the Hub.
        layer_ids: the residual streams, sorted.
        dtype: of the verifier.
        storage: the folder that states are written into.
        options: see there.
    """
    speculation = {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": list(layer_ids)}},
    }
    transfer = {
        "kv_connector": _CONNECTOR,
        "kv_connector_module_path": _CONNECTOR_MODULE,
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"shared_storage_path": storage},
    }
    words = [str(options.python or sys.executable), "-P", "-m", "vllm.entrypoints.cli.main"]
    words += ["serve", verifier, "--dtype", dtype, "--no-enable-prefix-caching"]
    # The verifier's own distribution, not that of sampling settings that come with it.
    words += ["--generation-config", "vllm", "--max-num-seqs", str(options.max_requests)]
    words += ["--speculative-config", json.dumps(speculation)]
    words += ["--kv-transfer-config", json.dumps(transfer)]
    changes = {}
    if options.max_model_len is not None:
        words += ["--max-model-len", str(options.max_model_len)]
        # A document may fill all positions; the token behind it is drawn, never read.
        changes[_ANY_LENGTH] = "1"
    if options.eager:
        words.append("--enforce-eager")
    return ServerCommand((*words, *options.flags), changes)


class VllmSource:
    """A verifier in vLLM: a ``HiddenStateSource`` and a ``ResponseWriter``.

    Nothing is started before states or responses are asked for. Leave it as a context manager, or
    with ``close``, to stop what was started.

    Args:
        verifier: a folder or a name on the Hub, as the server loads it.
        reference: the same verifier in transformers, with the streams wanted.
        dtype: of its weights, such as ``"bfloat16"``.
        eos_token_ids: the tokens that end a response.
        options: see there.
        report: is told of the comparison with ``reference``, a line each.
    """

    def __init__(
        self,
        verifier: str,
        reference: HiddenStateSource,
        *,
        dtype: str,
        eos_token_ids: Sequence[int] = (),
        options: VllmOptions | None = None,
        report: Callable[[str], None] | None = None,
    ) -> None:
        self.layer_ids = reference.layer_ids
        self.hidden_size = reference.hidden_size
        self.verifier = verifier
        self.identity: Mapping[str, Any] = {**reference.identity, "computed_by": "vllm"}
        self._reference, self._dtype = reference, dtype
        self._eos_token_ids = tuple(eos_token_ids)
        self._options, self._report = options or VllmOptions(), report
        self._resources = contextlib.ExitStack()
        self._server: HiddenStatesServer | None = None
        self._compared = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._resources.__exit__(*error)  # type: ignore[arg-type]
        self._server = None

    def close(self) -> None:
        """Stops the server, if one was started."""
        self.__exit__(None, None, None)

    def hidden_states(
        self, documents: Sequence[Tensor], batch_tokens: int
    ) -> Iterator[dict[int, Tensor]]:
        """As the protocol says; on the CPU, in the server's dtype.

        Raises:
            ServerError: the server did not start.
            HiddenStatesError: it gives no states, refuses, or has died.
            DifferentStatesError: its states are not those of transformers.
        """
        server = self._running()
        states = self._ordered(server.states, documents)
        first = [] if self._compared else self._to_compare(documents)
        found = [next(states) for _ in first]
        if first:
            expected = list(self._reference.hidden_states(first, batch_tokens))
            differences = compare_states(found, expected)
            if self._report is not None:
                tokens = sum(map(len, first))
                self._report(f"vLLM beside transformers, {len(first)} documents, {tokens} tokens:")
                for difference in differences:
                    self._report(f"  {difference}")
            check_states(differences, self._options.tolerance, server.endpoint)
            self._compared = True
        yield from found
        yield from states

    def write_responses(
        self, prompts: Sequence[Tensor], settings: RegenerateSettings, seed: int
    ) -> list[Tensor]:
        """As ``regenerate.write_responses``, with a seed for each prompt.

        Greedy ones are those of transformers but for rounding; sampled ones have the same
        distribution, and the same seed gives the same text where the server batches alike.
        """
        server = self._running()
        items = [(prompt, derived_seed(seed, place)) for place, prompt in enumerate(prompts)]
        return list(
            self._ordered(
                lambda item: server.response(item[0], settings, item[1], self._eos_token_ids),
                items,
            )
        )

    def _ordered(self, ask: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        """The answers in the order of the items; at most ``max_requests`` are asked or waiting."""
        pool = ThreadPoolExecutor(self._options.max_requests, thread_name_prefix="hidden-states")
        waiting: collections.deque[Future[Any]] = collections.deque()
        rest = iter(items)
        try:
            for item in rest:
                waiting.append(pool.submit(ask, item))
                if len(waiting) == self._options.max_requests:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except HiddenStatesError as error:
            raise HiddenStatesError(
                f"{error}\nWhat was written so far stays: the same command goes on from there"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    @staticmethod
    def _to_compare(documents: Sequence[Tensor]) -> list[Tensor]:
        """The first documents, at least one, of not many tokens."""
        count, tokens = 0, 0
        for document in documents:
            tokens += len(document)
            if count and tokens > _COMPARED_TOKENS:
                break
            count += 1
        return list(documents[:count])

    def _running(self) -> HiddenStatesServer:
        """The server, started when first asked for."""
        if self._server is not None:
            return self._server
        endpoint, log = self._options.endpoint, None
        parent = pathlib.Path(self._options.storage or tempfile.gettempdir()).absolute()
        if endpoint is None:
            folder = self._resources.enter_context(_folder(parent))
            command, log = self._command(folder / "states"), folder / "server.log"
            started = running_server(command, log, timeout=self._options.start_timeout)
            try:
                endpoint = self._resources.enter_context(started)
            except (OSError, ServerError) as error:
                raise ServerError(
                    f"{error}\nThe environment of {command.words[0]} must have vLLM and this "
                    "library; choose another one with generate.vllm.python"
                ) from None
        else:
            command = self._command(parent)
        self._server = HiddenStatesServer(
            endpoint,
            self.layer_ids,
            self.hidden_size,
            self._dtype,
            command=command.line(),
            log=log,
            patience=self._options.patience,
        )
        self._resources.callback(self._server.stop)
        return self._server

    def _command(self, storage: pathlib.Path) -> ServerCommand:
        return server_command(
            self.verifier, self.layer_ids, self._dtype, str(storage), self._options
        )


@contextlib.contextmanager
def _folder(parent: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder for a server; after a failure its log stays in it."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = pathlib.Path(tempfile.mkdtemp(prefix="speculators-vllm-", dir=parent))
    (folder / "states").mkdir()
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder / "states", ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def make_vllm_source(
    verifier: str | os.PathLike[str],
    layer_ids: Iterable[int],
    *,
    reference: TransformersSource | None = None,
    options: VllmOptions | None = None,
    report: Callable[[str], None] | None = None,
    **loading: Any,
) -> VllmSource:
    """The factory of ``make_source("vllm", ...)``.

    Args:
        verifier: a folder or a name on the Hub.
        layer_ids: the residual streams wanted.
        reference: the verifier in transformers, if it is loaded already.
        options: how vLLM is used.
        report: is told of the comparison.
        **loading: else, how transformers loads it: see ``Verifier.from_pretrained``.
    """
    if reference is None:
        reference = TransformersSource.from_pretrained(verifier, layer_ids, **loading)
    elif reference.layer_ids != tuple(sorted(layer_ids)):
        raise ValueError(
            f"the reference has the streams {reference.layer_ids}; expected {sorted(layer_ids)}"
        )
    model: torch.nn.Module | Any = reference.model.model
    return VllmSource(
        str(verifier),
        reference,
        dtype=str(model.dtype).removeprefix("torch."),
        eos_token_ids=reference.model.eos_token_ids,
        options=options,
        report=report,
    )


register_source("vllm", make_vllm_source)
