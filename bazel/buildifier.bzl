"""A repository with buildifier, from the npm package that its authors publish.

Where npm is missing or cannot fetch it, a warning says so and Bazel lists the formatting test as skipped.
"""

load(":local_python.bzl", "local_python_path", "run")

_EXTRACT = """
import sys, tarfile
with tarfile.open(sys.argv[1]) as archive:
    with open("buildifier", "wb") as out:
        out.write(archive.extractfile("package/buildifier-linux_amd64").read())
"""

def _fetch(rctx):
    """Puts the program into the repository; returns why that cannot be done, or None."""
    npm = rctx.which("npm")
    if not npm:
        return "there is no npm"
    result = rctx.execute([npm, "pack", "--silent", rctx.attr.package])
    if result.return_code:
        return "npm pack {} failed: {}".format(rctx.attr.package, result.stderr)
    archive = result.stdout.strip().split("\n")[-1]
    found = run(rctx, "hashing buildifier", ["sha256sum", archive]).split(" ")[0]
    if found != rctx.attr.sha256:
        fail("{} has the sha256 {}, expected {}".format(rctx.attr.package, found, rctx.attr.sha256))
    run(rctx, "unpacking buildifier", [local_python_path(rctx), "-c", _EXTRACT, archive])
    run(rctx, "unpacking buildifier", ["chmod", "+x", "buildifier"])
    rctx.delete(archive)
    return None

def _buildifier_impl(rctx):
    problem = _fetch(rctx)
    if problem:
        # buildifier: disable=print
        print("The formatting of BUILD files is not checked: " + problem)
        rctx.file("buildifier")
    rctx.file("found.bzl", "FOUND = {}\n".format(not problem))
    rctx.file("BUILD.bazel", "exports_files([\"buildifier\"])\n")

buildifier = repository_rule(
    implementation = _buildifier_impl,
    attrs = {
        "package": attr.string(mandatory = True),
        "sha256": attr.string(mandatory = True),
    },
    environ = ["PATH"],
)
