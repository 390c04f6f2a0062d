"""The documentation says what is true: it builds, its examples run, its flags and names exist.

A page that describes the command or the format goes stale without a sound, so what it names is
looked up here in the code: settings, flags, keys of config.json, tensors.
"""

import doctest
import logging
import pathlib
import re
import shlex
from typing import Any

import pytest
import torch
import typer.main
import yaml
from mkdocs.commands.build import build
from mkdocs.config import load_config
from tests.docs import settings_page
from transformers import LlamaConfig

from speculators.cli.app import app
from speculators.cli.recipe import Recipe, parse_flags
from speculators.models.algorithm import find_algorithm
from speculators.models.speculator_model import SpeculatorModel
from speculators.training.settings import merge_settings, setting_names

DOCS = pathlib.Path("docs")
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = {path: path.read_text(encoding="utf-8") for path in PAGES}
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", flags=re.DOTALL | re.MULTILINE)
COMMAND: Any = typer.main.get_command(app)
ALGORITHMS = ("eagle", "hass", "eagle3")


def page_id(path: pathlib.Path) -> str:
    return path.relative_to(DOCS).as_posix()


def blocks(path: pathlib.Path, kind: str) -> list[str]:
    return [block for _, found, block in FENCE.findall(TEXTS[path]) if found == kind]


def prose(path: pathlib.Path) -> str:
    return FENCE.sub("", TEXTS[path])


# ---- the site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, list[str]]:
    """The built site, and what MkDocs warned of."""
    folder = tmp_path_factory.mktemp("site")
    warnings: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warnings.append(record.getMessage())

    handler = Collect(logging.WARNING)
    logging.getLogger("mkdocs").addHandler(handler)
    try:
        config = load_config("mkdocs.yml", site_dir=str(folder))
        assert config.strict
        config.plugins.on_startup(command="build", dirty=False)
        config.strict = False  # a warning ends the build there; here all of them are to be told
        build(config)
        config.plugins.on_shutdown()
    finally:
        logging.getLogger("mkdocs").removeHandler(handler)
    return folder, warnings


def test_it_builds_without_a_warning(site: tuple[pathlib.Path, list[str]]) -> None:
    folder, warnings = site
    assert not warnings
    built = {path.relative_to(folder).as_posix() for path in folder.rglob("*.html")}
    assert built >= {page_id(path).removesuffix(".md") + ".html" for path in PAGES}
    assert not list(folder.rglob("*.bazel"))


def test_the_site_fetches_nothing_from_elsewhere(site: tuple[pathlib.Path, list[str]]) -> None:
    folder, _ = site
    fetched = re.compile(
        r"<(?:script|img|link|iframe)\b[^>]*?(?:src|href)=[\"']?((?:https?:)?//[^\"' >]+)"
    )
    for path in folder.rglob("*.html"):
        assert not fetched.findall(path.read_text(encoding="utf-8")), path.name


# ---- the examples


@pytest.mark.parametrize("path", [path for path in PAGES if blocks(path, "python")], ids=page_id)
def test_the_python_examples_print_what_they_say(path: pathlib.Path) -> None:
    """One after the other, as a reader would type them: later ones use what earlier ones made."""
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner()
    session: dict[str, object] = {"__name__": "docs"}
    torch.manual_seed(0)
    for number, block in enumerate(blocks(path, "python")):
        example = parser.get_doctest(block, session, f"block {number}", str(path), 0)
        assert example.examples, f"block {number} shows no session (>>>)"
        assert runner.run(example, clear_globs=False).failed == 0, f"block {number}: see above"
        session = example.globs


def commands() -> list[tuple[str, str]]:
    """Page and command of each line of the shell blocks."""
    lines = [
        (page_id(path), line.strip())
        for path in PAGES
        for block in blocks(path, "bash")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    return [(page, line) for page, line in lines if line]


@pytest.mark.parametrize(("page", "line"), commands())
def test_every_command_can_be_given(page: str, line: str) -> None:
    """The command line is parsed to its end; what it would do is done in the tests of cli."""
    words = shlex.split(line)
    if words[:2] == ["./bazelw", "run"]:
        target = words[2].removeprefix("//tools:")
        assert words[3] == "--", f"{page}: {line}"
        words = words[4:] if target == "speculators" else [target, *words[4:]]
    else:
        assert words.pop(0) == "speculators", f"{page}: nothing checks {line!r}"
    name, *rest = words
    assert name in COMMAND.commands, f"{page}: there is no command {name!r}"
    for word in rest:
        path = word.rpartition("=")[2]
        assert not path.startswith("examples/") or pathlib.Path(path).exists(), f"{page}: {path}"
    context = COMMAND.commands[name].make_context(name, rest)
    drafts = context.params.get("drafts") or ()
    settings = [*context.args, *(word for word in drafts if word.startswith("--"))]
    flags = parse_flags(settings)
    flags["algorithm"] = context.params.get("algo") or "hass"
    merge_settings(Recipe, flags, source=f"{page}: {line}").check()


@pytest.mark.parametrize("path", [path for path in PAGES if blocks(path, "yaml")], ids=page_id)
def test_every_recipe_is_valid(path: pathlib.Path) -> None:
    for block in blocks(path, "yaml"):
        merge_settings(Recipe, yaml.safe_load(block), source=page_id(path)).check()


def test_commands_and_examples_are_found() -> None:
    """The searches above find something, or they would prove nothing."""
    assert len(commands()) > 5
    assert any(">>>" in block for path in PAGES for block in blocks(path, "python"))


# ---- the names


def test_the_settings_page_is_that_of_the_settings() -> None:
    named = re.findall(r"^\| `([\w.]+)` \|", TEXTS[DOCS / "settings.md"], flags=re.MULTILINE)
    assert set(setting_names(Recipe)) <= set(named)
    assert TEXTS[DOCS / "settings.md"] == settings_page.page(), (
        "run ./bazelw run //tests/docs:settings_page > docs/settings.md"
    )


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_every_setting_that_is_named_exists(path: pathlib.Path) -> None:
    sections = "verifier|prepare|generate|draft|objective|training|evaluate"
    found = re.findall(rf"`(?:--)?((?:{sections})\.[\w.-]+)[`=:]", prose(path))
    algorithm = path.stem if path.stem in ALGORITHMS else None
    known = set(setting_names(Recipe))
    for name in (name.replace("-", "_") for name in found):
        section, _, option = name.partition(".")
        if section in {"draft", "objective"}:
            options = {
                row.strip("`")
                for row in re.findall(r"`(?:draft|objective)\.\w+`", settings_of(algorithm))
            }
            assert f"{section}.{option}" in options or option == "NAME", name
        else:
            assert any(name == one or name.startswith(f"{one}.") for one in known), name


def settings_of(algorithm: str | None) -> str:
    """The part of the settings page that holds for an algorithm; the whole for None."""
    text = TEXTS[DOCS / "settings.md"]
    for other in ALGORITHMS:
        if algorithm is not None and other != algorithm:
            text = re.sub(rf"### Of `{other}`.*?(?=\n##)", "", text, flags=re.DOTALL)
    return text


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_format_page_has_all_keys(name: str) -> None:
    fields = find_algorithm(name).config_class.schema_class.model_fields
    missing = [key for key in fields if f"`{key}`" not in TEXTS[DOCS / "format.md"]]
    assert not missing


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("eagle", {"layer_type": "qwen3"}),
        ("hass", {"layernorms": True}),
        ("eagle3", {"draft_vocab_size": 40, "norm_before_fc": True, "layer_type": "qwen3"}),
        ("eagle3", {"fc_norm": True, "num_layers": 2}),
    ],
)
def test_the_format_page_has_all_tensors_and_their_shapes(
    name: str, options: dict[str, Any]
) -> None:
    sizes = {
        "H": 32,
        "A": 4 * 12,
        "N": 2 * 12,
        "I": 40,
        "V": 64,
        "head size": 12,
        "n S": 96,
        "S": 32,
    }
    verifier = LlamaConfig(
        hidden_size=sizes["H"],
        head_dim=sizes["head size"],
        intermediate_size=sizes["I"],
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=12,
        vocab_size=sizes["V"],
    )
    config = find_algorithm(name).new_config(verifier, **options)
    draft = SpeculatorModel.from_config(config)
    sizes |= {"W": draft.draft_vocab_size, "2H": 2 * sizes["H"]}
    section = "eagle3" if name == "eagle3" else "eagle` and `hass"
    text = TEXTS[DOCS / "format.md"].partition(f"### `{section}`")[2].partition("\n##")[0]
    shapes: dict[str, list[int]] = {}
    for names, shape in re.findall(r"^\| (`.*`) \| [^|]*\[(.*?)\]", text, flags=re.MULTILINE):
        for tensor in re.findall(r"`(.*?)`", names):
            shapes[tensor] = [sizes[size] for size in shape.split(", ")]
    for tensor, value in draft.state_dict().items():
        if tensor.startswith("layers.1."):
            continue
        documented = shapes[re.sub(r"^fc_norm\.\d+", "fc_norm.I", tensor)]
        assert documented == list(value.shape), tensor
