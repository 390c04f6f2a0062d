"""A repository for the machine's Python: its tool chain, headers, wheel tags and file suffix."""

# The versions that the project supports, the ones tried after `python3` itself in this order.
_VERSIONS = ["3.11", "3.12", "3.13"]

_BUILD = """
load("@rules_cc//cc:cc_library.bzl", "cc_library")
load("@rules_python//python:py_runtime.bzl", "py_runtime")
load("@rules_python//python:py_runtime_pair.bzl", "py_runtime_pair")

package(default_visibility = ["//visibility:public"])

py_runtime(
    name = "runtime",
    interpreter_path = "{python}",
    python_version = "PY3",
    stub_shebang = "#!{python}",
)

py_runtime_pair(
    name = "runtime_pair",
    py3_runtime = ":runtime",
)

toolchain(
    name = "toolchain",
    toolchain = ":runtime_pair",
    toolchain_type = "@rules_python//python:toolchain_type",
)

cc_library(
    name = "headers",
    hdrs = glob(["include/**/*.h"]),
    includes = ["include"],
)
"""

# One line each: the interpreter, the folder of Python.h, the platform tag, the extension suffix.
_DESCRIBE = """
import sys, sysconfig
print(sys.executable)
print(sysconfig.get_path("include"))
print(sysconfig.get_platform().replace("-", "_").replace(".", "_"))
print(sysconfig.get_config_var("EXT_SUFFIX"))
"""

def run(rctx, what, command, timeout = 600):
    """Runs a command and returns what it printed; its failure is the repository's.

    Args:
        rctx: the repository's context.
        what: what is being done, for the progress line and the error.
        command: the words of the command.
        timeout: seconds.

    Returns:
        The command's standard output.
    """
    rctx.report_progress(what)
    result = rctx.execute(command, timeout = timeout)
    if result.return_code:
        fail("{} failed:\n{}\n{}".format(what, result.stdout, result.stderr))
    return result.stdout

def _find_python(rctx):
    """The Python that builds and runs everything here.

    Args:
        rctx: the repository's context.

    Returns:
        The real path of the first supported Python among $SPECULATORS_PYTHON, python3 and
        python3.11 to python3.13 on PATH.
    """
    wanted = rctx.os.environ.get("SPECULATORS_PYTHON", "")
    names = [wanted] if wanted else ["python3"] + ["python" + version for version in _VERSIONS]
    ask = "import sys; print('%d.%d' % sys.version_info[:2], sys.executable)"
    found = []
    for name in names:
        python = name if "/" in name else rctx.which(name)
        if not python:
            continue
        answer = rctx.execute([python, "-c", ask])
        if answer.return_code:
            continue
        version, executable = answer.stdout.strip().split(" ", 1)
        if version in _VERSIONS:
            return executable
        found.append(version)
    fail("No supported Python: looked for {} and found {}; expected one of {}. Install one, or name it in SPECULATORS_PYTHON.".format(
        ", ".join(names),
        "version " + ", ".join(found) if found else "none",
        ", ".join(_VERSIONS),
    ))

def local_python_path(rctx):
    """The interpreter that local_python chose, for other repository rules.

    Args:
        rctx: the repository's context.

    Returns:
        Its path. The calling repository is made anew when another interpreter is chosen, and not when
        PATH merely changes.
    """
    return rctx.read(Label("@local_python//:interpreter.txt"))

def _local_python_impl(rctx):
    description = run(rctx, "asking Python about itself", [_find_python(rctx), "-c", _DESCRIBE])
    python, include, platform, suffix = description.strip().split("\n")
    if not rctx.path(include).get_child("Python.h").exists:
        fail("{} has no headers: expected Python.h in {}. Install them (Debian: python3-dev).".format(python, include))
    rctx.symlink(include, "include")
    rctx.file("interpreter.txt", python)
    rctx.file("python.bzl", "EXTENSION_SUFFIX = \"{}\"\n\nPLATFORM_TAG = \"{}\"\n".format(suffix, platform))
    rctx.file("BUILD.bazel", _BUILD.replace("{python}", python))

local_python = repository_rule(
    implementation = _local_python_impl,
    environ = ["PATH", "SPECULATORS_PYTHON"],
    local = True,
)
