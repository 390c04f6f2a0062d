"""vLLM: a plugin that teaches it our drafts, what it accepts of them, and how fast it serves them.

=================  =================================================================================
``plugin``         what runs inside vLLM: the types ``eagle`` and ``hass``, and a defect mended
``serving``        what is served, by which command; a server started, waited for, stopped and asked
``contract``       the contract check: the same prompts in our decoder and in vLLM
``bench``          served speed without a draft and with one, at several numbers of drafted tokens
``hidden_states``  a source of hidden states: a server with our connector, or files of others
=================  =================================================================================

``register`` is the entry point of the group ``vllm.general_plugins``.

Nothing here is imported before it is named, and vLLM not before something asks for it: vLLM runs
the plugin in each of its processes, and the rest of the library runs where there is no vLLM.
"""

from typing import TYPE_CHECKING

from speculators.lazy_facade import lazy_facade

if TYPE_CHECKING:  # for editors and type checkers, which do not run __getattr__
    from speculators.integrations.vllm.plugin.registration import register as register

_DEFINED_IN = {"register": "speculators.integrations.vllm.plugin.registration"}
_MODULES = ("bench", "contract", "hidden_states", "plugin", "serving")

__all__ = [*_DEFINED_IN]  # noqa: PLE0604 - all of them are strings

__getattr__, __dir__ = lazy_facade(__name__, _DEFINED_IN, _MODULES)
