"""The verifier: the large model whose output speculative decoding must reproduce.

================  =================================================================================
``verifier``      ``Verifier``: prefill, step and crop with a KV cache, and the residual streams
``head``          ``VerifierHead``: final norm, head, scale and softcap; the one source of targets
``architecture``  where a model keeps its layers, norm and head; which layers a draft reads
``checkpoint``    a few tensors read from a checkpoint, without the rest of the model
``parts``         ``VerifierParts``: embedding and head, which is what a draft borrows
``capture``       hooks that hand out residual streams
``cache``         the KV cache, and how rejected tokens leave it
``rows``          the shape of a batch: padding on the left, or documents packed into rows
================  =================================================================================

Residual stream ``k`` is what ENTERS layer ``k``: ``k = 0`` is the embedding, its scale included,
and ``k = n`` the last layer's output BEFORE the final norm. What transformers returns as
``hidden_states[-1]`` is ``norm`` of stream ``n``, no stream.

The modules are imported when first named.
"""

from typing import TYPE_CHECKING

from speculators.lazy_facade import lazy_facade

if TYPE_CHECKING:  # for editors and type checkers, which do not run __getattr__
    from speculators.models.verifier.architecture import (
        UnsupportedVerifierError as UnsupportedVerifierError,
    )
    from speculators.models.verifier.head import VerifierHead as VerifierHead
    from speculators.models.verifier.parts import VerifierParts as VerifierParts
    from speculators.models.verifier.verifier import Verifier as Verifier

_DEFINED_IN = {
    "UnsupportedVerifierError": "speculators.models.verifier.architecture",
    "Verifier": "speculators.models.verifier.verifier",
    "VerifierHead": "speculators.models.verifier.head",
    "VerifierParts": "speculators.models.verifier.parts",
}
_MODULES = ("architecture", "cache", "capture", "checkpoint", "head", "parts", "rows", "verifier")

__all__ = ["UnsupportedVerifierError", "Verifier", "VerifierHead", "VerifierParts"]

__getattr__, __dir__ = lazy_facade(__name__, _DEFINED_IN, _MODULES)
