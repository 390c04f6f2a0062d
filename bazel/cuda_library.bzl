"""cuda_library: CUDA sources compiled by nvcc, linked like any C++ library."""

load("@rules_cc//cc:cc_library.bzl", "cc_library")
load("@rules_cc//cc/common:cc_info.bzl", "CcInfo")

# Compute capabilities that get machine code; the last one also gets PTX, for devices after it.
_ARCHITECTURES = ["80", "90"]

def _cuda_object_impl(ctx):
    out = ctx.actions.declare_file(ctx.label.name + ".o")
    args = ctx.actions.args()
    args.add(ctx.file._nvcc)
    args.add_all(["-c", ctx.file.src, "-o", out])
    args.add_all(["-O3", "-std=c++20", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden"])

    # Registers and spills of every kernel; a spill is an error.
    args.add_all(["-Xptxas", "-v,-warn-spills", "-Werror", "all-warnings"])
    for number in _ARCHITECTURES:
        args.add("-gencode=arch=compute_{n},code=sm_{n}".format(n = number))
    args.add("-gencode=arch=compute_{n},code=compute_{n}".format(n = _ARCHITECTURES[-1]))
    headers = []
    for dep in ctx.attr.deps:
        context = dep[CcInfo].compilation_context
        headers.append(context.headers)
        args.add_all(context.includes, before_each = "-I")
        args.add_all(context.quote_includes, before_each = "-I")
        args.add_all(context.system_includes, before_each = "-isystem")
    ctx.actions.run_shell(
        outputs = [out],
        inputs = depset([ctx.file.src, ctx.file._nvcc], transitive = headers),
        # nvcc looks for the rest of its toolkit beside its own real path.
        command = '"$(realpath "$1")" "${@:2}"',
        arguments = [args],
        mnemonic = "CudaCompile",
        progress_message = "Compiling %{input}",
        use_default_shell_env = True,
    )
    return [DefaultInfo(files = depset([out]))]

_cuda_object = rule(
    implementation = _cuda_object_impl,
    attrs = {
        "deps": attr.label_list(providers = [CcInfo]),
        "src": attr.label(allow_single_file = [".cu"], mandatory = True),
        "_nvcc": attr.label(default = "@cuda//:nvcc", allow_single_file = True),
    },
)

# For every target that needs CUDA's compiler or headers: left out by --config=cpu.
REQUIRES_CUDA = select({
    "//bazel:cuda_enabled": [],
    "//conditions:default": ["@platforms//:incompatible"],
})

def cuda_library(name, src, deps = [], **kwargs):
    """A C++ library made of one CUDA source.

    Args:
        name: of the library.
        src: the .cu file.
        deps: C++ libraries whose headers it includes.
        **kwargs: the rest of cc_library's attributes.
    """
    _cuda_object(
        name = name + "_object",
        src = src,
        target_compatible_with = REQUIRES_CUDA,
        visibility = ["//visibility:private"],
        deps = deps + ["@cuda//:headers"],
    )
    cc_library(
        name = name,
        srcs = [name + "_object"],
        target_compatible_with = REQUIRES_CUDA,
        deps = deps + ["@cuda//:runtime"],
        **kwargs
    )
