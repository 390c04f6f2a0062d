"""Checks what pip installed against the hashes of a lock file.

    check_hashes.py --constraints LOCK   print the lock as pip constraints, without hashes
    check_hashes.py LOCK REPORT          compare pip's installation report with the lock

pip's own hash mode is all or nothing: it refuses a torch that a machine takes from a local folder
(another file than the index's), and the CUDA packages that such a torch does or does not bring. So
pip gets the lock without its hashes, and this program compares afterwards: every file that came
from an index must have a hash of the lock. Files from this machine (file://) are what its owner put
there.

Runs before any package is installed, so it has the standard library only.
"""

import json
import pathlib
import re
import sys


def read_lock(text: str) -> dict[str, set[str]]:
    """The accepted hashes (``sha256:...``) of each ``name==version``; names are normalised."""
    accepted: dict[str, set[str]] = {}
    for entry in text.replace("\\\n", " ").splitlines():
        requirement = re.match(r"([A-Za-z0-9][\w.-]*)==([^\s;]+)", entry)
        if requirement:
            key = f"{normalise(requirement[1])}=={requirement[2]}"
            accepted.setdefault(key, set()).update(re.findall(r"--hash=(\S+)", entry))
    return accepted


def normalise(name: str) -> str:
    """A distribution's name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def constraints(text: str) -> str:
    """The lock without hashes and comments: what ``pip install -c`` takes."""
    entries = text.replace("\\\n", " ").splitlines()
    kept = (re.sub(r"\s+--hash=\S+", "", entry).rstrip() for entry in entries)
    return "".join(f"{entry}\n" for entry in kept if entry and not entry.lstrip().startswith("#"))


def mismatches(lock: str, report: str) -> list[str]:
    """One line for each installed file that came from an index and is not in the lock."""
    accepted = read_lock(lock)
    wrong = []
    for item in json.loads(report)["install"]:
        name, version = normalise(item["metadata"]["name"]), item["metadata"]["version"]
        download = item["download_info"]
        if download["url"].startswith("file:"):
            continue
        found = "sha256:" + download["archive_info"]["hashes"]["sha256"]
        if found not in accepted.get(f"{name}=={version}", set()):
            wrong.append(f"{name}=={version}: {found} is not among the lock's hashes")
    return wrong


def main(arguments: list[str]) -> int:
    """The command line; returns the exit status."""
    if arguments[0] == "--constraints":
        print(constraints(pathlib.Path(arguments[1]).read_text()), end="")
        return 0
    lock, report = (pathlib.Path(argument).read_text() for argument in arguments)
    wrong = mismatches(lock, report)
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        print("Rewrite the lock if the index is right: ./bazelw run //:lock", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
