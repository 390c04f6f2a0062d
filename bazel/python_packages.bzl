"""A repository of the Python packages that the lock names, put there by pip.

pip resolves requirements.in under the constraint of requirements.lock. On a machine whose torch comes
with CUDA libraries it therefore brings those too, while a machine with a CPU build of torch (from its
own pip configuration) gets the same versions without them. Every file that came from an index is then
checked against the lock's hashes by check_hashes.py; nothing has been run by then, since pip only
unpacks wheels.

All packages form one directory. Bazel does not look into it: packages.txt tells whether it changed.
"""

load(":local_python.bzl", "local_python_path", "run")

_BUILD = """
load("@rules_python//python:py_library.bzl", "py_library")

package(default_visibility = ["//visibility:public"])

exports_files(["constraints.txt"])

py_library(
    name = "packages",
    data = [
        "packages.txt",
        "site-packages",
    ],
    imports = ["site-packages"],
)
"""

_PACKAGE_BUILD = """
alias(
    name = "{name}",
    actual = "//:packages",
    visibility = ["//visibility:public"],
)
"""

def _python_packages_impl(rctx):
    python = local_python_path(rctx)
    lock = rctx.path(rctx.attr.lock)
    constraints = run(rctx, "reading the lock", [python, rctx.path(rctx.attr._check_hashes), "--constraints", lock])
    rctx.file("constraints.txt", constraints)
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    run(
        rctx,
        "installing the locked Python packages",
        pip + ["install", "--quiet", "--only-binary=:all:", "--target", "site-packages"] +
        ["--report", "report.json", "-r", rctx.path(rctx.attr.requirements), "-c", "constraints.txt"],
        timeout = 3600,
    )
    run(rctx, "checking hashes", [python, rctx.path(rctx.attr._check_hashes), lock, "report.json"])
    freeze = run(rctx, "listing the packages", pip + ["freeze", "--all", "--path", "site-packages"])
    rctx.file("packages.txt", freeze)
    rctx.file("BUILD.bazel", _BUILD)

    with_build_file = rctx.attr.build_files.values()
    for line in freeze.strip().split("\n"):
        name = line.split("==")[0].split(" @ ")[0].lower().replace("-", "_").replace(".", "_")
        if name not in with_build_file:
            rctx.file(name + "/BUILD.bazel", _PACKAGE_BUILD.replace("{name}", name))
    for build_file, name in rctx.attr.build_files.items():
        rctx.file(name + "/BUILD.bazel", rctx.read(build_file))
        for folder in rctx.path("site-packages/" + name).readdir():
            if folder.basename in ["include", "lib"]:
                rctx.symlink(folder, "{}/{}".format(name, folder.basename))

python_packages = repository_rule(
    implementation = _python_packages_impl,
    attrs = {
        "build_files": attr.label_keyed_string_dict(
            doc = "BUILD files of packages with C++ in them, to the package's name; they see its folders include and lib.",
        ),
        "lock": attr.label(mandatory = True, allow_single_file = True),
        "requirements": attr.label(mandatory = True, allow_single_file = True),
        "_check_hashes": attr.label(default = "//bazel:check_hashes.py"),
    },
    environ = [
        "PIP_EXTRA_INDEX_URL",
        "PIP_FIND_LINKS",
        "PIP_INDEX_URL",
    ],
)
