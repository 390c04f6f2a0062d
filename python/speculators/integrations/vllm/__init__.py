"""vLLM: a plugin that teaches it our drafts, what it accepts of them, and how fast it serves them.

====================  ==============================================================================
``plugin``            ``register``, the entry point of the group ``vllm.general_plugins``
``speculator_types``  the types ``eagle`` and ``hass``, in terms of vLLM's configuration
``eagle_model``       their draft model, on vLLM's own parallel layers
``strict_weights``    what a draft's file must have, no more and no less
``cpu_sampling``      a defect of vLLM's sampling on a CPU, mended where it is found
``internals``         what we take from vLLM's insides, checked before it is used
``trace_format``      what a trace is asked for with, and what it answers: JSON
``engine``            runs a verifier with and without drafts in vLLM, in this process
``trace``             the same as a program: ``python -m speculators.integrations.vllm.trace``
``comparison``        vLLM's trace beside that of our own decoder
``contract``          the contract check: the same prompts here and in vLLM
``endpoint``          a server that runs already, asked for traces
``hidden_states``     a source of hidden states: a server with our ``connector``, or files of others
``serve``             vLLM's command for a draft; ``serve_checks`` looks at its files first
``server``            a server that is started, waited for and stopped
``bench``             served speed with and without a draft; ``bench_*`` are its parts
====================  ==============================================================================

Nothing here is imported before it is named, and vLLM not before something asks for it: vLLM runs
the plugin in each of its processes, and the rest of the library runs where there is no vLLM.
"""

from typing import TYPE_CHECKING

from speculators.lazy_facade import lazy_facade

if TYPE_CHECKING:  # for editors and type checkers, which do not run __getattr__
    from speculators.integrations.vllm.plugin import register as register

_DEFINED_IN = {"register": "speculators.integrations.vllm.plugin"}
_MODULES = (
    "bench",
    "bench_client",
    "bench_model",
    "bench_report",
    "bench_run",
    "comparison",
    "connector",
    "contract",
    "cpu_sampling",
    "eagle_model",
    "endpoint",
    "engine",
    "hidden_states",
    "hidden_states_client",
    "hidden_states_comparison",
    "hidden_states_files",
    "internals",
    "plugin",
    "serve",
    "serve_checks",
    "server",
    "speculator_types",
    "strict_weights",
    "trace",
    "trace_format",
)

__all__ = [*_DEFINED_IN]  # noqa: PLE0604 - all of them are strings

__getattr__, __dir__ = lazy_facade(__name__, _DEFINED_IN, _MODULES)
