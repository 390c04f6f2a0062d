"""torch_operators: schemas and bindings of operators in torch's stable ABI."""

load("@rules_cc//cc:cc_library.bzl", "cc_library")
load(":cuda_library.bzl", "REQUIRES_CUDA")

_STABLE_ABI = "@pypi//torch:stable_abi"

def torch_operators(name, arguments, interface, cpu, cuda):
    """NAME, from NAME.cc, and NAME_cuda, from NAME_cuda.cc: for _C and _C_cuda.

    Args:
        name: the prefix of targets and sources.
        arguments: a header for both that turns torch's tensors into the kernels' arguments.
        interface: headers of the kernels.
        cpu: kernels for the CPU.
        cuda: those for CUDA.
    """
    cc_library(
        name = name + "_arguments",
        hdrs = [arguments],
        deps = interface + [_STABLE_ABI],
    )
    for suffix, kernels, attributes in (
        ("", cpu, {}),
        ("_cuda", cuda, {
            "local_defines": ["USE_CUDA"],
            "target_compatible_with": REQUIRES_CUDA,
        }),
    ):
        cc_library(
            name = name + suffix,
            srcs = [name + suffix + ".cc"],
            # Only what a module must show is visible: tests/csrc/test_abi.py.
            copts = ["-fvisibility=hidden"],
            visibility = ["//python/speculators/ops:__pkg__"],
            deps = kernels + [
                ":" + name + "_arguments",
                _STABLE_ABI,
            ],
            alwayslink = True,
            **attributes
        )
