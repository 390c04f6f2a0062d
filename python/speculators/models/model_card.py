"""README.md of a saved draft: what the directory is and how to load it.

Only what the configuration says is told. Names in it come from anywhere, so each is shown as code,
on one line, with nothing that could end it; the header's YAML is the Hub library's.
"""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined] # documented

from speculators.configs.model_config import SpeculatorModelConfig

_LOADING = """\
```python
from speculators.models import SpeculatorModel

model = SpeculatorModel.from_pretrained("...")  # this directory, or its id on the Hub
```
"""


def model_card(config: SpeculatorModelConfig) -> str:
    """The text of README.md, with the metadata that the Hub reads.

    Args:
        config: the draft's; its verifier becomes ``base_model`` if it goes by a Hub id.

    Returns:
        Markdown that begins with a block of YAML.
    """
    kind = config.speculators_model_type_name()
    use = config.speculators_config
    verifier = use.verifier.name_or_path
    data = ModelCardData(
        base_model=verifier if _is_hub_id(verifier) else None,
        library_name="speculators",
        pipeline_tag="text-generation",
        tags=["speculative-decoding", kind],
    )
    facts = [f"Type: {_code(kind)}", f"Verifier: {_verifier(verifier, use.verifier.architectures)}"]
    if isinstance(size := getattr(config, "draft_vocab_size", None), int):
        facts.append(f"Draft vocabulary: {size} tokens")
    facts += [_proposal(method, use.default_proposal_method) for method in use.proposal_methods]
    body = "\n".join(
        [
            "# Draft model for speculative decoding",
            "",
            "It proposes tokens, and its verifier, the model that it was made for, checks them.",
            "",
            *(f"- {fact}" for fact in facts),
            "",
            "To load it with the library speculators:",
            "",
            _LOADING,
        ]
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))


def _verifier(name: str | None, architectures: list[str]) -> str:
    kinds = ", ".join(_code(architecture) for architecture in architectures)
    if name is None:
        return kinds or "not recorded"
    return f"{_code(name)} ({kinds})" if kinds else _code(name)


def _proposal(method: Any, default: str) -> str:
    settings = method.model_dump(mode="json", exclude={"proposal_type"})
    chosen = " (the default)" if method.proposal_type == default else ""
    return f"Proposes tokens: {_code(method.proposal_type)}{chosen}, {_code(json.dumps(settings))}"


def _is_hub_id(name: str | None) -> bool:
    """Whether a verifier's name can only be meant for the Hub; ``"model"`` may well be a folder."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name is not None and "/" in name and not Path(name).exists()


def _code(text: str, limit: int = 300) -> str:
    """Text as Markdown code on one line, whatever is in it."""
    plain = "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text
    )
    if len(plain) > limit:
        plain = f"{plain[:limit]}..."
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", plain)), default=0))
    space = " " if plain.startswith("`") or plain.endswith("`") or not plain.strip() else ""
    return f"{ticks}{space}{plain}{space}{ticks}"
