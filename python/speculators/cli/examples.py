"""The recipes that come with the sources, for a user who has no model at hand yet."""

import pathlib

from speculators.cli.failures import UsageError

_FOLDER = pathlib.Path("examples") / "tiny_verifier"


def example_recipe(algorithm: str | None) -> pathlib.Path:
    """The small verifier's recipe of an algorithm, ``hass`` unless one is named.

    It is looked for from this file upwards, which finds it in a checkout and in what Bazel runs,
    and from the working folder upwards.

    Raises:
        UsageError: it is not there, or there is none for the algorithm.
    """
    here = pathlib.Path(__file__).absolute()
    for above in (*here.parents, pathlib.Path.cwd(), *pathlib.Path.cwd().parents):
        folder = above / _FOLDER
        recipes = {path.stem: path for path in folder.glob("*.yaml")}
        if recipes:
            break
    else:
        raise UsageError(
            "there is no verifier; give one with --verifier, or run this in a checkout of the "
            f"sources, which has a small one in {_FOLDER}"
        )
    name = algorithm or "hass"
    if name not in recipes:
        from speculators.models.algorithm import find_algorithm

        try:
            find_algorithm(name)
        except ValueError as error:
            raise UsageError(str(error)) from None
        raise UsageError(
            f"{folder} has no recipe for {name!r}, but for {', '.join(sorted(recipes))}; give one "
            "with --recipe, or a verifier with --verifier"
        )
    return recipes[name]
