"""installed_wheel: a folder into which pip installed a wheel, and nothing that the wheel requires.

A Python target that depends on it has the folder on its path: as a user has it, not as the sources
lie. The wheel's requirements are the target's own affair.
"""

load("@rules_python//python:py_info.bzl", "PyInfo")

_PYTHON = "@rules_python//python:toolchain_type"

def _installed_wheel_impl(ctx):
    folder = ctx.actions.declare_directory(ctx.label.name)
    wheel = ctx.file.wheel
    distribution, version = wheel.basename.split("-")[:2]
    ctx.actions.run(
        outputs = [folder],
        inputs = [wheel],
        executable = ctx.toolchains[_PYTHON].py3_runtime.interpreter_path,
        # By name, since pip writes the path of a wheel that is named by its path into what it installs.
        arguments = [
            "-m",
            "pip",
            "--isolated",
            "--disable-pip-version-check",
            "install",
            "--quiet",
            "--no-cache-dir",
            "--no-compile",
            "--no-deps",
            "--no-index",
            "--find-links",
            wheel.dirname,
            "--target",
            folder.path,
            "{}=={}".format(distribution, version),
        ],
        mnemonic = "InstallWheel",
        progress_message = "Installing %{input}",
    )
    imports = "{}/{}".format(ctx.workspace_name, folder.short_path)
    return [
        DefaultInfo(files = depset([folder]), runfiles = ctx.runfiles([folder])),
        PyInfo(imports = depset([imports]), transitive_sources = depset()),
    ]

installed_wheel = rule(
    implementation = _installed_wheel_impl,
    attrs = {"wheel": attr.label(mandatory = True, allow_single_file = [".whl"])},
    toolchains = [_PYTHON],
)
