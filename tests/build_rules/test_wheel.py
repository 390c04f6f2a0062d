"""The wheel: pip installs it, it works where it landed, and it promises what it needs and no
more.
"""

import ast
import email.message
import email.parser
import os
import pathlib
import subprocess
import sys
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

import speculators

WHEEL = next(pathlib.Path().glob("speculators-*.whl"))
(CONSTRAINTS,) = pathlib.Path("..").glob("*pypi/constraints.txt")
SITE_PACKAGES = next(path for path in sys.path if path.endswith("site-packages") and "pypi" in path)

# Distributions whose module has another name, and modules that only `ops.build` imports, on
# machines that build the library and so have them.
DISTRIBUTION_OF_MODULE = {"yaml": "pyyaml"}
# Imported through another package: torch.utils.tensorboard.
THROUGH_OTHERS = {"tensorboard"}
BUILD_ONLY = {"ninja", "setuptools"}
# Imported only where it is there: by its plugin, or to ask it.
BESIDE = {"vllm"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder into which pip installed the wheel and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*command, "--target", str(target), str(WHEEL)], check=True)
    return target


def run(installed: pathlib.Path, *command: str) -> str:
    """Runs a command with the installed wheel and the locked packages, far from the sources."""
    path = os.pathsep.join([str(installed), SITE_PACKAGES])
    process = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": path},
        cwd=installed,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def metadata() -> email.message.Message:
    with zipfile.ZipFile(WHEEL) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return email.parser.Parser().parsestr(archive.read(name).decode())


def test_one_version_everywhere() -> None:
    name, version, _, tags = parse_wheel_filename(WHEEL.name)
    assert name == "speculators"
    assert str(version) == metadata()["Version"] == speculators.__version__
    assert {(tag.interpreter, tag.abi) for tag in tags} == {("cp311", "abi3")}


def test_the_command_and_the_operators_work(installed: pathlib.Path) -> None:
    command = str(installed / "bin" / "speculators")
    assert run(installed, command, "--version") == f"speculators {speculators.__version__}\n"
    report = run(installed, sys.executable, "-m", "speculators.ops")
    assert f"_C: loaded: {installed}" in report
    assert "tensors on cpu: _C (_C is loaded)" in report
    assert f"_host: loaded: {installed}" in report


def test_the_wheel_is_the_library_and_nothing_else(installed: pathlib.Path) -> None:
    assert {path.name for path in installed.iterdir()} == {
        "bin",
        "speculators",
        f"speculators-{speculators.__version__}.dist-info",
    }
    licences = list(installed.glob("*.dist-info/licenses/LICENSE"))
    assert [licence.read_text() for licence in licences] == [pathlib.Path("LICENSE").read_text()]


def test_it_requires_just_what_it_imports(installed: pathlib.Path) -> None:
    imported = set()
    for path in (installed / "speculators").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    third_party = imported - sys.stdlib_module_names - {"speculators"} - BUILD_ONLY - BESIDE
    required = {Requirement(line).name for line in metadata().get_all("Requires-Dist", [])}
    named = {DISTRIBUTION_OF_MODULE.get(module, module) for module in third_party}
    assert required == named | THROUGH_OTHERS


def test_its_ranges_admit_the_locked_versions() -> None:
    lines = [Requirement(line) for line in CONSTRAINTS.read_text().splitlines()]
    here = [line for line in lines if line.marker is None or line.marker.evaluate()]
    locked = {line.name: str(line.specifier).removeprefix("==") for line in here}
    for line in metadata().get_all("Requires-Dist", []):
        requirement = Requirement(line)
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), (
            requirement
        )
        assert not any(clause.operator == "==" for clause in requirement.specifier), requirement
