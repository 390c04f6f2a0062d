"""python_wheel: packs Python libraries and the files they need at run time into a wheel."""

load("@local_python//:python.bzl", "PLATFORM_TAG")

def _python_wheel_impl(ctx):
    wheel = ctx.actions.declare_file("{}-{}-{}-{}.whl".format(
        ctx.attr.distribution,
        ctx.attr.version,
        ctx.attr.python_tag,
        PLATFORM_TAG,
    ))
    prefix = ctx.attr.strip_prefix + "/"
    runfiles = [dep[DefaultInfo].default_runfiles.files for dep in ctx.attr.deps]
    files = [f for f in depset(transitive = runfiles).to_list() if f.short_path.startswith(prefix)]
    args = ctx.actions.args()
    args.add("--requirements", ctx.file.requirements)
    args.add_all(ctx.attr.requires, before_each = "--requires")
    args.add_all(ctx.attr.entry_points, before_each = "--entry-point")
    args.add("--requires-python", ctx.attr.requires_python)
    args.add("--summary", ctx.attr.summary)
    args.add("--readme", ctx.file.readme)
    args.add("--license", ctx.file.license)
    args.add(wheel)
    for f in files:
        args.add("{}={}".format(f.short_path.removeprefix(prefix), f.path))
    ctx.actions.run(
        outputs = [wheel],
        inputs = files + [ctx.file.requirements, ctx.file.readme, ctx.file.license],
        executable = ctx.executable._make_wheel,
        arguments = [args],
        env = {"SOURCE_DATE_EPOCH": "315532800"},  # 1980, the first year that a zip file can say
        mnemonic = "PythonWheel",
        progress_message = "Packing %{output}",
    )
    return [DefaultInfo(files = depset([wheel]))]

python_wheel = rule(
    implementation = _python_wheel_impl,
    attrs = {
        "deps": attr.label_list(mandatory = True, doc = "Python libraries, packed with their runfiles."),
        "distribution": attr.string(mandatory = True),
        "entry_points": attr.string_list(doc = "GROUP:NAME=MODULE:FUNCTION."),
        "license": attr.label(mandatory = True, allow_single_file = True),
        "python_tag": attr.string(mandatory = True, doc = "Python and ABI tag, such as cp311-abi3."),
        "readme": attr.label(mandatory = True, allow_single_file = True),
        "requirements": attr.label(
            mandatory = True,
            allow_single_file = True,
            doc = "A requirements file with the range of every distribution in `requires`.",
        ),
        "requires": attr.string_list(doc = "Distributions that the wheel needs, without ranges."),
        "requires_python": attr.string(mandatory = True),
        "strip_prefix": attr.string(mandatory = True, doc = "The folder whose files are packed; others are not."),
        "summary": attr.string(mandatory = True),
        "version": attr.string(mandatory = True),
        "_make_wheel": attr.label(default = "//bazel:make_wheel", executable = True, cfg = "exec"),
    },
)
