"""The verifier: the large model whose output speculative decoding must reproduce.

================  =================================================================================
``verifier``      ``Verifier``: prefill, step and crop with a KV cache, and the residual streams
``head``          ``VerifierHead``: final norm, head, scale and softcap; the one source of targets
``architecture``  where a model keeps its layers, norm and head; which layers a draft reads
``checkpoint``    the head's few tensors read from a checkpoint, without the rest of the model
``capture``       hooks that hand out residual streams
``cache``         the KV cache, and how rejected tokens leave it
``rows``          the shape of a batch: padding on the left, or documents packed into rows
================  =================================================================================

Residual stream ``k`` is what ENTERS layer ``k``: ``k = 0`` is the embedding, its scale included,
and ``k = n`` the last layer's output BEFORE the final norm. What transformers returns as
``hidden_states[-1]`` is ``norm`` of stream ``n``, no stream.

The modules are imported when first named.
"""

import importlib
from types import ModuleType

__all__ = ["architecture", "cache", "capture", "checkpoint", "head", "rows", "verifier"]


def __getattr__(name: str) -> ModuleType:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
