"""README's commands are run: by this test, by another one, or by CI itself."""

import doctest
import pathlib
import re
import runpy
import shlex
import subprocess
import sys

import pytest

README = pathlib.Path("README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)

# Commands that this test cannot run, and the file that does.
RUN_ELSEWHERE = {
    "./bazelw run //tools:train -- --algo=hass": ".ci/run",
    "./bazelw test //...": ".ci/run",
    "./bazelw build //:wheel": "tests/build_rules/BUILD.bazel",
    "speculators train --algo=eagle3 --verifier=MODEL --data=CONVERSATIONS.jsonl": (
        "tests/cli/test_job.py"
    ),
    "pip install bazel-bin/speculators-*.whl": "tests/build_rules/test_wheel.py",
    "python -m speculators.ops.build": "tests/ops/test_build.py",
}
# What must stand in that file for the claim to hold, where it is not the command itself.
EVIDENCE = {
    "./bazelw build //:wheel": '"//:wheel"',
    "speculators train --algo=eagle3 --verifier=MODEL --data=CONVERSATIONS.jsonl": (
        '["train", f"--algo={algorithm}", "--verifier", verifier, "--data", data]'
    ),
    "pip install bazel-bin/speculators-*.whl": '"pip", "install"',
    "python -m speculators.ops.build": '"speculators.ops.build"',
}


def commands() -> list[str]:
    lines = (line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines())
    found = [line.split(" #")[0].strip() for line in lines]
    return [command for command in found if command]


def test_it_has_commands_and_python() -> None:
    assert "./bazelw test //..." in commands()
    assert any(kind == "python" for kind, _ in BLOCKS)


def run_module(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """``python -m module arguments``, in this process, which has imported torch already."""
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as exit_:
        if exit_.code not in (None, 0):
            raise AssertionError(f"{module} {arguments} exited with {exit_.code}") from exit_


def test_every_command_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for command in commands():
        words = shlex.split(command)
        if command in RUN_ELSEWHERE:
            evidence = EVIDENCE.get(command, command)
            assert evidence in pathlib.Path(RUN_ELSEWHERE[command]).read_text(), command
        elif words[:4] == ["./bazelw", "run", "//tools:speculators", "--"]:
            subprocess.run(["tools/speculators", *words[4:]], check=True, capture_output=True)
        elif words[0] == "speculators":
            run_module("speculators", words[1:], monkeypatch)
        elif words[:2] == ["python", "-m"]:
            run_module(words[2], words[3:], monkeypatch)
        else:
            raise AssertionError(f"nothing runs README's command {command!r}; see RUN_ELSEWHERE")


def test_the_python_examples_print_what_they_say() -> None:
    """One after the other, as a reader would type them: later ones use what earlier ones made."""
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner()
    session: dict[str, object] = {}
    for number, (kind, block) in enumerate(BLOCKS):
        if kind == "python":
            example = parser.get_doctest(block, session, f"block {number}", "README.md", 0)
            assert example.examples, f"block {number} shows no session (>>>)"
            assert runner.run(example, clear_globs=False).failed == 0, f"block {number}: see above"
            session = example.globs


def test_the_tree_names_every_folder() -> None:
    """Each folder at the top, each package of the library and each operation has its phrase."""
    (tree,) = [block for kind, block in BLOCKS if kind == "text" and "csrc/" in block]
    root = pathlib.Path()
    folders = {path.parent for path in root.rglob("BUILD.bazel")}
    named = [
        path.name
        for path in folders
        if path.parent in (root, root / "csrc", root / "python/speculators")
    ]
    for name in named:
        if name:
            assert f"{name}/" in tree, f"README's tree lacks {name}/"
