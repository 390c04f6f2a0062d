"""torch_operators: schemas and bindings of operators in torch's stable ABI."""

load("@rules_cc//cc:cc_library.bzl", "cc_library")
load(":cuda_library.bzl", "REQUIRES_CUDA")

_STABLE_ABI = "@pypi//torch:stable_abi"

def torch_operators(name, interface, cpu, cuda):
    """NAME_op, from NAME_op.cc, and NAME_op_cuda, from NAME_op_cuda.cc, for _C and _C_cuda.

    Both include NAME_arguments.h, which turns torch's tensors into the kernels' arguments.

    Args:
        name: the prefix of targets and files.
        interface: headers of the kernels.
        cpu: kernels for the CPU.
        cuda: those for CUDA.
    """
    cc_library(
        name = name + "_arguments",
        hdrs = [name + "_arguments.h"],
        deps = interface + [_STABLE_ABI],
    )
    for suffix, kernels, attributes in (
        ("_op", cpu, {}),
        ("_op_cuda", cuda, {
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
