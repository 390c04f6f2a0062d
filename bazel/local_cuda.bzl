"""A repository with nvcc, the CUDA headers and the static CUDA runtime.

The machine's toolkit where there is one, else the compiler that NVIDIA publishes on PyPI (271 MB, no
driver, no GPU needed). `--repo_env=SPECULATORS_CUDA=pypi` asks for the latter in any case.
"""

load(":local_python.bzl", "local_python_path", "run")

def _machine_toolkit(rctx):
    """The folder of a toolkit on this machine that has all we need, or None."""
    candidates = [rctx.os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    nvcc = rctx.which("nvcc")
    if nvcc:
        candidates.append(str(nvcc.realpath.dirname.dirname))
    for candidate in candidates:
        if candidate and rctx.path(candidate + "/bin/nvcc").exists and rctx.path(candidate + "/lib64/libcudart_static.a").exists:
            return rctx.path(candidate).realpath
    return None

def _pypi_toolkit(rctx):
    """Installs the compiler's packages; returns the folder that holds bin, include and lib."""
    pip = [local_python_path(rctx), "-m", "pip", "--disable-pip-version-check"]
    run(
        rctx,
        "installing nvcc from PyPI",
        pip + ["install", "--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes"] +
        ["--target", "packages", "-r", rctx.path(rctx.attr.requirements)],
        timeout = 1800,
    )
    return rctx.path("packages/nvidia/cu13")

def _local_cuda_impl(rctx):
    toolkit = None if rctx.os.environ.get("SPECULATORS_CUDA") == "pypi" else _machine_toolkit(rctx)
    toolkit = toolkit or _pypi_toolkit(rctx)
    rctx.symlink(toolkit, "toolkit")
    rctx.file("BUILD.bazel", rctx.read(rctx.attr.build_file))

local_cuda = repository_rule(
    implementation = _local_cuda_impl,
    attrs = {
        "build_file": attr.label(mandatory = True, allow_single_file = True),
        "requirements": attr.label(
            mandatory = True,
            allow_single_file = True,
            doc = "The compiler's packages on PyPI, with versions and hashes.",
        ),
    },
    environ = ["CUDA_HOME", "PATH", "SPECULATORS_CUDA"],
)
