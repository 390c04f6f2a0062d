"""Runs a verifier with and without drafts in vLLM, in this process, and says what was accepted.

Whether a draft that was trained and measured here is worth the same when it is served, only the
server can tell. vLLM records for each request how many drafted tokens each verification accepted;
greedily and in float32 that is the same list as ``speculators.decoding.GenerationOutput.traces``.

Engines in one process start in a few seconds each; one is taken down before the next.
"""

import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from speculators.configs.model_config import SpeculatorModelConfig
from speculators.integrations.vllm.contract.trace_format import (
    CaseResult,
    TraceCase,
    TraceRequest,
    TraceResult,
)
from speculators.integrations.vllm.plugin.registration import register
from speculators.models.algorithm import find_algorithm
from speculators.models.hub import local_directory
from speculators.version import __version__

# What vLLM reads while it is imported; what the caller has set stays.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; by default half of the machine's memory
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
_COUNTERS = "vllm:spec_decode_"


def trace(request: TraceRequest, report: Callable[[CaseResult], None] | None = None) -> TraceResult:
    """Runs all cases, greedily. A case that fails does not keep the others from running.

    Args:
        request: what to run.
        report: called with each result as soon as it is there.

    Raises:
        ImportError: there is no vLLM.
    """
    prepare()
    import vllm

    results = []
    for case in request.cases:
        begin = time.monotonic()
        try:
            result = _run(request, case)
        except Exception as error:
            result = CaseResult(name=case.name, error=f"{type(error).__name__}: {error}")
        seconds = round(time.monotonic() - begin, 3)
        results.append(result.model_copy(update={"seconds": seconds}))
        if report is not None:
            report(results[-1])
    return TraceResult(
        vllm_version=vllm.__version__, speculators_version=__version__, cases=results
    )


def speculative_config(case: TraceCase) -> dict[str, Any] | None:
    """VLLM's ``speculative_config`` for a case; None without a draft.

    Raises:
        OSError: there is no such directory.
        ConfigError: its configuration is not valid.
        ValueError: vLLM has no way to draft with it.
    """
    if case.draft is None:
        return None
    directory = str(local_directory(case.draft))
    config = SpeculatorModelConfig.from_pretrained(directory)
    method = find_algorithm(config.speculators_model_type).vllm_method
    if method is None:
        raise ValueError(
            f"{case.draft} is of the type {config.speculators_model_type!r}, which vLLM cannot "
            "draft with; expected a type whose AlgorithmSpec has a vllm_method"
        )
    count = (
        case.num_draft_tokens or config.speculators_config.proposal_methods[0].speculative_tokens
    )
    return {"method": method, "model": directory, "num_speculative_tokens": count}


@contextlib.contextmanager
def running_engine(request: TraceRequest, case: TraceCase) -> Iterator[Any]:
    """A ``vllm.LLM`` for a case, taken down at the end, so that another one can follow.

    Args:
        request: the verifier, and what the engine must have room for.
        case: the draft.

    Raises:
        ImportError: there is no vLLM.
        Exception: whatever vLLM raises where it cannot load the models.
    """
    prepare()
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    speculation = speculative_config(case)
    options = {
        "model": request.verifier,
        "dtype": request.dtype,
        "speculative_config": speculation,
        "max_num_seqs": min(len(request.prompts), 64),
        "max_model_len": _max_model_len(request, speculation),
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
        "per_request_spec_decode_metrics": "detailed" if speculation else "none",
    }
    engine: Any = None
    # vLLM collects garbage ten times per engine; the modules it has loaded need no look each time.
    gc.freeze()
    try:
        engine = LLM(**(options | request.engine_options))
        yield engine
    finally:
        if engine is not None:
            engine.llm_engine.engine_core.shutdown()
        del engine
        cleanup_dist_env_and_memory()  # unfreezes, and collects


def prepare() -> None:
    """Sets what vLLM reads when it is imported, imports it, and registers our types.

    Raises:
        ImportError: there is no vLLM.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import vllm  # noqa: F401

    register()  # where the library is not installed, vLLM does not find its entry point


def _run(request: TraceRequest, case: TraceCase) -> CaseResult:
    with running_engine(request, case) as engine:
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=request.max_new_tokens,
            ignore_eos=request.ignore_eos,
            detokenize=False,
        )
        prompts = [{"prompt_token_ids": prompt} for prompt in request.prompts]
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        return _result(case, outputs, engine.get_metrics())


def _max_model_len(request: TraceRequest, speculation: dict[str, Any] | None) -> int | None:
    """As few positions as will do, but all of the verifier's where those are fewer.

    vLLM does not draft where the draft would reach beyond them, so there is room for two more.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(request.verifier).get_text_config(decoder=True)
    count = speculation["num_speculative_tokens"] if speculation else 0
    longest = max(len(prompt) for prompt in request.prompts)
    needed = longest + request.max_new_tokens + 2 * (count + 1)
    return int(needed) if needed < getattr(config, "max_position_embeddings", 0) else None


def _result(case: TraceCase, outputs: Any, metrics: Any) -> CaseResult:
    completions = [output.outputs[0] for output in outputs]
    steps = [completion.spec_decode_metrics for completion in completions]
    counters: dict[str, Any] = {}
    for metric in metrics:
        if metric.name.startswith(_COUNTERS):
            value = getattr(metric, "values", None) or getattr(metric, "value", 0)
            counters[metric.name.removeprefix(_COUNTERS)] = value
    return CaseResult(
        name=case.name,
        token_ids=[list(completion.token_ids) for completion in completions],
        accepted=[list(step.per_step_accepted) if step else [] for step in steps],
        drafted=[list(step.per_step_drafted) if step else [] for step in steps],
        counters=counters,
    )
