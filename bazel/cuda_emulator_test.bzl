"""cuda_emulator_test: a test of CUDA kernels on the host, in three builds of the same source."""

load("@rules_cc//cc:cc_test.bzl", "cc_test")
load(":cuda_library.bzl", "REQUIRES_CUDA")

_BUILDS = {
    "": struct(copts = [], linkopts = []),
    "_address": struct(
        copts = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
        linkopts = ["-fsanitize=address,undefined"],
    ),
    "_thread": struct(
        copts = ["-fsanitize=thread", "-DSPECULATORS_EMULATOR_THREADS"],
        linkopts = ["-fsanitize=thread"],
    ),
}

def cuda_emulator_test(name, srcs, deps = [], **kwargs):
    """NAME (plain), NAME_address (address and undefined sanitizers), NAME_thread (thread sanitizer).

    Args:
        name: of the plain test and the prefix of the others.
        srcs: the test's sources; csrc/common/cuda_emulator.h says how they are written.
        deps: the kernels' headers.
        **kwargs: the rest of cc_test's attributes.
    """
    for suffix, build in _BUILDS.items():
        cc_test(
            name = name + suffix,
            size = "small",
            srcs = srcs,
            copts = [
                "-O1",
                "-g",
                "-fno-strict-aliasing",
                "-Wno-unknown-pragmas",  # `#pragma unroll` is for nvcc
            ] + build.copts,
            linkopts = build.linkopts,
            target_compatible_with = REQUIRES_CUDA,
            visibility = ["//tests:__subpackages__"],
            deps = deps + [
                "//csrc/common:cuda_emulator",
                "//csrc/common:testing",
            ],
            **kwargs
        )
