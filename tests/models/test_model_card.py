"""README.md of a saved draft, as the Hub and a Markdown reader see it."""

import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from speculators.configs.model_config import SpeculatorModelConfig
from speculators.models.model_card import model_card

HOSTILE = [
    "org/name\n---\nlicense: mit\n---\n# Heading",
    "---\nbase_model: other/model\n---",
    "x` <script>alert(1)</script> `y",
    "``` \n<script>``````",
    "a\u2028b\x1b[31m\r- item",
    "[link](http://127.0.0.1)\t![image](x)",
    "{{ 7 * 7 }}{% include x %}",
    "z" * 10_000,
    "` `",
    "a ` b `` c",
    "",
]


def config(name: str | None, folder: str = "eagle3_llama") -> SpeculatorModelConfig:
    found: SpeculatorModelConfig = SpeculatorModelConfig.from_pretrained(
        Path("tests/golden") / folder
    )
    found.speculators_config.verifier.name_or_path = name
    return found


def metadata(text: str) -> dict[str, Any]:
    return {key: item for key, item in vars(ModelCard(text).data).items() if item is not None}


def test_a_card_says_what_the_configuration_says() -> None:
    text = model_card(config("meta-llama/Llama-3.1-8B"))
    assert metadata(text) == {
        "base_model": "meta-llama/Llama-3.1-8B",
        "library_name": "speculators",
        "pipeline_tag": "text-generation",
        "tags": ["speculative-decoding", "eagle3"],
    }
    for line in (
        "- Type: `eagle3`",
        "- Verifier: `meta-llama/Llama-3.1-8B` (`LlamaForCausalLM`)",
        "- Draft vocabulary: 40 tokens",
        "from speculators.models import SpeculatorModel",
        'model = SpeculatorModel.from_pretrained("...")  # this directory, or its id on the Hub',
    ):
        assert line in text.splitlines()
    assert '`greedy` (the default), `{"speculative_tokens": 3, ' in text


def test_what_is_not_known_is_not_said() -> None:
    text = model_card(config(None, "eagle_plain"))
    assert "base_model" not in metadata(text)
    assert metadata(text)["tags"] == ["speculative-decoding", "eagle"]
    assert "Draft vocabulary" not in text
    nothing = config(None)
    nothing.speculators_config.verifier.architectures = []
    assert "- Verifier: not recorded" in model_card(nothing)


def test_only_an_id_of_the_hub_is_a_base_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out" / "model").mkdir(parents=True)
    cards = {}
    for name in ("/data/llama", "./llama", "../x/y", "llama", "a/b/c", "out/model", "org/model"):
        found = config(name)
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            cards[name] = model_card(found)
    assert [name for name in cards if "base_model" in metadata(cards[name])] == ["org/model"]
    assert all(f"- Verifier: `{name}` (" in text for name, text in cards.items())


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_stays_on_its_line(name: str) -> None:
    plain = model_card(config("/m")).splitlines()
    found = config(name)
    found.speculators_config.verifier.architectures = [name]
    found.speculators_config.proposal_methods[0].note = name  # a key that no schema knows
    lines = model_card(found).splitlines()
    differing = [line for line, other in zip(lines, plain, strict=True) if line != other]
    assert [line.partition(":")[0] for line in differing] == ["- Verifier", "- Proposes tokens"]
    for line in differing:
        assert len(line) < 1000
        # By CommonMark, a run of backticks ends at the next run of the same length.
        outside = re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "@", line)
        assert outside in {"- Verifier: @ (@)", "- Proposes tokens: @ (the default), @"}
