"""Writes a wheel from files: the program behind the python_wheel rule.

    make_wheel.py [options] OUT.whl NAME=FILE...

The same inputs give the same bytes: files are sorted and carry the date of SOURCE_DATE_EPOCH.
"""

import argparse
import pathlib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from wheel.wheelfile import WheelFile


def read_ranges(text: str) -> dict[str, Requirement]:
    """The requirements of a requirements file by normalised name, without its options."""
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    found = [Requirement(line) for line in lines if line and not line.startswith("-")]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def metadata(options: argparse.Namespace, name: str, version: str) -> str:
    """The METADATA file: core metadata 2.4, the readme as its body."""
    ranges = read_ranges(options.requirements.read_text())
    missing = [name for name in options.requires if canonicalize_name(name) not in ranges]
    if missing:
        raise SystemExit(f"{options.requirements} has no range for {', '.join(missing)}; add one")
    lines = [
        "Metadata-Version: 2.4",
        f"Name: {name}",
        f"Version: {version}",
        f"Summary: {options.summary}",
        "License-Expression: Apache-2.0",
        f"License-File: {options.license.name}",
        f"Requires-Python: {options.requires_python}",
        *(f"Requires-Dist: {ranges[canonicalize_name(name)]}" for name in options.requires),
        "Description-Content-Type: text/markdown",
    ]
    readme: str = options.readme.read_text()
    return "\n".join(lines) + "\n\n" + readme


def entry_points(values: list[str]) -> str:
    """The entry_points.txt file from ``GROUP:NAME=MODULE:FUNCTION`` values."""
    groups: dict[str, list[str]] = {}
    for value in values:
        group, entry = value.split(":", 1)
        groups.setdefault(group, []).append(entry)
    return "\n".join(f"[{group}]\n" + "\n".join(lines) + "\n" for group, lines in groups.items())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--requirements", type=pathlib.Path, required=True)
    parser.add_argument("--requires", action="append", default=[])
    parser.add_argument("--requires-python", required=True)
    parser.add_argument("--entry-point", action="append", default=[])
    parser.add_argument("--summary", required=True)
    parser.add_argument("--readme", type=pathlib.Path, required=True)
    parser.add_argument("--license", type=pathlib.Path, required=True)
    parser.add_argument("wheel", type=pathlib.Path)
    parser.add_argument("files", nargs="+", metavar="NAME=FILE")
    options = parser.parse_args()

    name, version, python, abi, platform = options.wheel.stem.split("-")
    info = f"{name}-{version}.dist-info"
    tag = f"{python}-{abi}-{platform}"
    with WheelFile(options.wheel, "w") as out:
        for pair in sorted(options.files):
            target, source = pair.split("=", 1)
            out.writestr(target, pathlib.Path(source).read_bytes())
        out.writestr(f"{info}/licenses/{options.license.name}", options.license.read_bytes())
        out.writestr(f"{info}/METADATA", metadata(options, name, version))
        out.writestr(
            f"{info}/WHEEL",
            f"Wheel-Version: 1.0\nGenerator: speculators\nRoot-Is-Purelib: false\nTag: {tag}\n",
        )
        out.writestr(f"{info}/entry_points.txt", entry_points(options.entry_point))


if __name__ == "__main__":
    main()
