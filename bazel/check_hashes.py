"""Checks what pip installed against the hashes of lock files.

    check_hashes.py --constraints LOCK...   print the locks as pip constraints, without hashes
    check_hashes.py LOCK... REPORT          compare pip's installation report with the locks

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


def constraints(*locks: str) -> str:
    """The locks without hashes and comments: what ``pip install -c`` takes.

    Where several locks name a package, the first of them decides.
    """
    kept: dict[str, tuple[int, list[str]]] = {}
    for number, text in enumerate(locks):
        for entry in text.replace("\\\n", " ").splitlines():
            requirement = re.match(r"[A-Za-z0-9][\w.-]*", entry)
            if requirement:
                deciding, lines = kept.setdefault(normalise(requirement[0]), (number, []))
                if deciding == number:
                    lines.append(re.sub(r"\s+--hash=\S+", "", entry).rstrip())
    return "".join(f"{line}\n" for _, lines in kept.values() for line in lines)


def mismatches(lock: str, report: str) -> list[str]:
    """One line for each installed file that came from an index and is not in the lock.

    ``lock`` may be several locks, one after the other.
    """
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
        print(constraints(*(pathlib.Path(lock).read_text() for lock in arguments[1:])), end="")
        return 0
    *locks, report = (pathlib.Path(argument).read_text() for argument in arguments)
    wrong = mismatches("".join(locks), report)
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        print("Rewrite the lock if the index is right: ./bazelw run //:lock", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
