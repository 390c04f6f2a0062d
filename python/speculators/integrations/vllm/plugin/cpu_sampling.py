"""A defect of vLLM's sampling on a CPU, mended where it is found.

To verify a draft at a temperature above 0, vLLM repeats each request's temperature and the like for
each of its tokens. On a CPU without Triton, vLLM 0.32 and 0.33 do that in a function that converts
its output to int64 and writes into the copy, so that anything but int64 stays what happened to lie
in memory, and what is sampled does not have the verifier's distribution. Greedy decoding does not
come here. Whether the function at hand has the defect is tried when it is first called; one without
it is left alone.
"""

import functools
import warnings
from typing import Any

from speculators.integrations.vllm.plugin.internals import check_parameters, find

_MODULE = "vllm.utils.cpu_triton_utils"
_NAME = "_expand_kernel_impl"
_PARAMETERS = ["output", "input_val", "cu_num_tokens", "replace_from", "replace_to"]
_OUR_MARK = "speculators_plugin"


def install() -> None:
    """Puts a guard around vLLM's function, on a CPU only.

    vLLM takes the function into use when a worker starts, which is after its plugins.

    Raises:
        UnknownInternalsError: vLLM is not as it was tested; nothing has been changed.
    """
    if not find("vllm.platforms:current_platform").is_cpu():
        return
    module = find(_MODULE)
    expand = find(f"{_MODULE}:{_NAME}")
    check_parameters(_NAME, expand, _PARAMETERS)
    if not hasattr(expand, _OUR_MARK):
        setattr(module, _NAME, guarded(expand))


def guarded(expand: Any) -> Any:
    """The function itself, or :func:`expand_batch` if a first call shows that it has the defect."""
    chosen: list[Any] = []

    @functools.wraps(expand)
    def guard(*args: Any, **kwargs: Any) -> None:
        if not chosen:
            chosen.append(expand if _writes_its_output(expand) else expand_batch)
            if chosen[0] is expand_batch:
                warnings.warn(
                    "vLLM's sampling of drafts on a CPU has a defect, which the speculators plugin "
                    "mends; without the plugin, a temperature above 0 is not lossless",
                    RuntimeWarning,
                    stacklevel=2,
                )
        chosen[0](*args, **kwargs)

    setattr(guard, _OUR_MARK, True)
    return guard


def expand_batch(
    output: Any,
    input_val: Any,
    cu_num_tokens: Any,
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: int | None = None,
) -> None:
    """Repeats each request's value for each of its tokens.

    Args:
        output: ``[num_tokens]``, written in place.
        input_val: ``[batch]``, of the output's type.
        cu_num_tokens: int ``[batch]``, tokens of all requests up to and with each.
        replace_from: a value that is replaced ...
        replace_to: ... by this.
        MAX_NUM_TOKENS: not used.
    """
    import torch

    del MAX_NUM_TOKENS
    counts = torch.diff(cu_num_tokens.long(), prepend=cu_num_tokens.new_zeros(1).long())
    replacement = torch.full_like(input_val, replace_to)
    values = torch.where(input_val == replace_from, replacement, input_val)
    output.copy_(values.repeat_interleave(counts))


def _writes_its_output(expand: Any) -> bool:
    import torch

    for dtype in (torch.float32, torch.int32):
        output = torch.full((3,), -1, dtype=dtype)
        ends = torch.tensor([1, 3], dtype=torch.int32)
        expand(output, torch.tensor([2, 0], dtype=dtype), ends, 0, 5)
        if output.tolist() != [2, 5, 5]:
            return False
    return True
