"""mypy_cache: what mypy knows of the third-party packages, worked out once.

mypy needs most of its time for torch. This rule's output depends on the installed packages and the
settings, and on no source file of the project, so that a change of one file is checked in seconds.
"""

def _mypy_cache_impl(ctx):
    cache = ctx.actions.declare_directory(ctx.label.name)
    ctx.actions.run(
        outputs = [cache],
        inputs = [ctx.file.config],
        executable = ctx.executable._mypy,
        arguments = [
            "--config-file=" + ctx.file.config.path,
            "--cache-dir=" + cache.path,
            "-c",
            "\n".join(["import " + module for module in ctx.attr.modules]),
        ],
        mnemonic = "MypyCache",
        progress_message = "Typing the third-party packages",
    )
    return [DefaultInfo(files = depset([cache]))]

mypy_cache = rule(
    implementation = _mypy_cache_impl,
    attrs = {
        "config": attr.label(mandatory = True, allow_single_file = True),
        "modules": attr.string_list(doc = "Third-party modules that the project imports."),
        "_mypy": attr.label(default = "//bazel:mypy", executable = True, cfg = "exec"),
    },
)
