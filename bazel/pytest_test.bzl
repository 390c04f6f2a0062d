"""pytest_test: a py_test that runs its sources under pytest."""

load("@rules_python//python:py_test.bzl", "py_test")

def pytest_test(name, srcs, deps = [], args = [], packages = "@pypi", **kwargs):
    """A test target whose `srcs` pytest collects.

    Args:
        name: of the target.
        srcs: files of tests.
        deps: Python libraries.
        args: further words for pytest.
        packages: the repository that pytest is taken from. `deps` must be from the same one.
        **kwargs: the rest of py_test's attributes.
    """
    py_test(
        name = name,
        srcs = srcs + ["//bazel:pytest_main.py"],
        main = "//bazel:pytest_main.py",
        args = args + ["$(rootpath {})".format(src) for src in srcs],
        deps = deps + [packages + "//pytest"],
        **kwargs
    )
