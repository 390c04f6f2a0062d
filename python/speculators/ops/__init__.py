"""The operators for Python: one module per operation, each with a pure-torch reference.

``python -m speculators.ops`` says which back end serves which device, and why;
``python -m speculators.ops.build`` builds the compiled ones from a checkout without Bazel.

=========================  ================================================================
``chunked_distillation``   heads and loss over all drafting steps, never with all logits at once
``distillation_loss``      what a draft's logits lose against the verifier's, row by row
``draft_attention``        attention of drafts in training: a causal step, then one key per step
``draft_tree``             drafted tokens as a tree; a chain is the tree that never branches
``hidden_state_packing``   rows of several layers' hidden states, side by side in one buffer
``host``                   work on the host that needs no torch: packing documents, suffix index
``tree_verification``      the best tree of drafted tokens, and what the verifier accepts of it
``backend``                the choice between ``_C_cuda``, ``_C`` and the reference
=========================  ================================================================

The modules are imported when first named: ``speculators.ops.host`` does not bring torch along.
"""

from speculators.lazy_facade import lazy_facade

__all__ = [
    "backend",
    "chunked_distillation",
    "distillation_loss",
    "draft_attention",
    "draft_tree",
    "hidden_state_packing",
    "host",
    "tree_verification",
]

__getattr__, __dir__ = lazy_facade(__name__, {}, __all__)
