"""torch_extension: a shared object with operators in torch's stable ABI, importable from any Python."""

load("@rules_cc//cc:cc_binary.bzl", "cc_binary")
load("@rules_cc//cc:cc_library.bzl", "cc_library")

def torch_extension(name, deps, **kwargs):
    """Builds NAME.abi3.so, an importable module that registers the operators of `deps`.

    Args:
        name: the module's name, such as "_C".
        deps: the operators' bindings, cc_library targets with alwayslink.
        **kwargs: attributes of the shared object's target.
    """
    cc_library(
        name = name + "_module",
        srcs = ["//csrc/extension:module.cc"],
        alwayslink = True,
        local_defines = ["SPECULATORS_MODULE=" + name],
        visibility = ["//visibility:private"],
        deps = ["@local_python//:headers"],
    )
    cc_binary(
        name = name + ".abi3.so",
        linkshared = True,
        linkstatic = True,
        deps = deps + [
            name + "_module",
            "@pypi//torch:link",
        ],
        **kwargs
    )
