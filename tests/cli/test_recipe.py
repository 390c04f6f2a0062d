"""Recipes: flag before file before default, and every wrong name or value is told."""

import pathlib

import pytest
import yaml

from speculators.cli.recipe import Recipe, parse_flags, read_recipe
from speculators.configs.errors import ConfigError

TINY = pathlib.Path("examples/tiny_verifier")


def write(path: pathlib.Path, text: str) -> pathlib.Path:
    path.write_text(text)
    return path


def test_a_flag_goes_before_the_file_and_the_file_before_the_default(
    tmp_path: pathlib.Path,
) -> None:
    file = write(tmp_path / "r.yaml", "training: {epochs: 7, optimizer: {learning_rate: 0.5}}\n")
    recipe = read_recipe(file, parse_flags(["--training.optimizer.learning-rate=1e-3"]))
    assert recipe.training.optimizer.learning_rate == 1e-3
    assert recipe.training.epochs == 7
    assert recipe.training.rows_per_batch == Recipe().training.rows_per_batch


def test_values_are_what_they_look_like() -> None:
    words = ["--seed=3", "--training.max-steps", "20", "--evaluate.ngram=false", "--data=a b.jsonl"]
    assert parse_flags(words) == {
        "seed": 3,
        "training.max_steps": 20,
        "evaluate.ngram": False,
        "data": "a b.jsonl",
    }
    flags = parse_flags(["--objective.losses={kl: 1.0, topk: 0.5}", "--objective.steps=2"])
    objective = read_recipe(None, flags).objective_settings
    assert objective.losses == {"kl": 1.0, "topk": 0.5}
    assert objective.steps == 2
    assert objective.detach_states, "the rest is the algorithm's"


def test_one_seed_is_for_all_unless_training_has_its_own() -> None:
    assert read_recipe(None, {"seed": 5}).training.seed == 5
    assert read_recipe(None, {"seed": 5, "training.seed": 6}).training.seed == 6


def test_paths_in_a_file_are_beside_it(tmp_path: pathlib.Path) -> None:
    recipe = read_recipe(TINY / "hass.yaml", {})
    folder = (TINY / "hass.yaml").resolve().parent  # Bazel has links
    assert recipe.verifier.path == str(folder / "model")
    assert recipe.data == str(folder / "prompts_train.jsonl")
    assert recipe.evaluate.prompts == str(folder / "prompts_eval.jsonl")
    text = "verifier: {path: organisation/model}\ninit_from: draft\ngenerate: {files: states}\n"
    file = write(tmp_path / "r.yaml", text)
    (tmp_path / "draft").mkdir()
    (tmp_path / "states").mkdir()
    link = tmp_path / "elsewhere" / "link.yaml"
    link.parent.mkdir()
    link.symlink_to(file)
    for path in (file, link):
        recipe = read_recipe(path, {})
        assert recipe.verifier.path == "organisation/model", "a name on the Hub"
        assert recipe.init_from == str(tmp_path / "draft")
        assert recipe.generate.files == str(tmp_path / "states")


@pytest.mark.parametrize("file", sorted(TINY.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_recipes_that_come_with_the_sources_are_valid(file: pathlib.Path) -> None:
    recipe = read_recipe(file, {})
    assert recipe.algorithm == file.stem
    assert recipe.spec.name == file.stem


def test_what_is_written_is_read_the_same(tmp_path: pathlib.Path) -> None:
    recipe = read_recipe(TINY / "hass.yaml", {"seed": 4})
    recipe.write(tmp_path / "run.yaml")
    assert read_recipe(tmp_path / "run.yaml", {}) == recipe
    assert yaml.safe_load((tmp_path / "run.yaml").read_text())["training"]["epochs"] >= 1


def test_a_dtype_has_a_short_name(tmp_path: pathlib.Path) -> None:
    """Which must not make another store of it."""
    for name, meant in (("bf16", "bfloat16"), ("bfloat16", "bfloat16"), ("fp8", "fp8")):
        recipe = read_recipe(None, {"generate.store_dtype": name})
        assert recipe.generate.store_dtype == meant
        recipe.write(tmp_path / "run.yaml")
        assert read_recipe(tmp_path / "run.yaml", {}) == recipe


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"training.epoch": 3}, "training.epoch: there is no such setting; did you mean training"),
        ({"verifer.path": "x"}, r"verifer.path: .* did you mean verifier.path\?"),
        ({"training.epochs": 0}, "training.epochs: found 0; input should be greater than"),
        ({"generate.store_dtype": "int3"}, 'generate.store_dtype: found "int3"'),
        ({"draft": {"layer_norms": True}}, r"draft.layer_norms: hass .* mean draft.layernorms\?"),
        ({"evaluate.tree": "4,x"}, "evaluate.tree: "),
        ({"evaluate.tree": "none.json"}, "evaluate.tree: .*none.json"),
        ({"objective": {"step": 3}}, r"step: there is no such setting; did you mean steps\?"),
    ],
)
def test_a_wrong_setting_is_an_error_that_names_the_right_one(
    flags: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_recipe(None, flags)


def test_an_unknown_algorithm_is_an_error_with_the_list() -> None:
    with pytest.raises(ValueError, match="no algorithm 'has'; expected one of eagle, eagle3, hass"):
        read_recipe(None, {"algorithm": "has"})


@pytest.mark.parametrize("word", ["epochs", "--", "--training.epochs"])
def test_a_word_that_is_no_setting_is_an_error(word: str) -> None:
    with pytest.raises(ConfigError, match="is no setting; expected --name=value"):
        parse_flags([word])


@pytest.mark.parametrize("text", ["a: [", "- 1\n"])
def test_a_file_that_holds_no_settings_is_an_error(text: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"r\.yaml (is no YAML|holds list)"):
        read_recipe(write(tmp_path / "r.yaml", text), {})
