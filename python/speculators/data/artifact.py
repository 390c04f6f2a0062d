"""What an artifact was made from, as one number: its content hash.

A prepared dataset or a store of hidden states is a folder with a manifest, a JSON file that carries
``content_hash``: SHA-256 over the content of the inputs and over the settings. The hash is known
before the work begins, so a folder that is already there is either what the caller asks for, and
can be used again, or it was made from something else, which is an error that names both hashes.
Names and times of files do not count: a copy is the same input.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any

Path = str | os.PathLike[str]


class StaleArtifactError(ValueError):
    """An artifact was made from other inputs than those given; the message names both hashes."""


def hash_files(paths: Iterable[Path]) -> str:
    """SHA-256, 64 hex digits, of files in the order given; of a folder all files with their names.

    Raises:
        FileNotFoundError: a path does not exist.
    """
    digests: list[Any] = []
    for path in map(pathlib.Path, paths):
        if path.is_dir():
            inside = sorted(child for child in path.rglob("*") if child.is_file())
            digests.append([[str(p.relative_to(path).as_posix()), _digest(p)] for p in inside])
        else:
            digests.append(_digest(path))
    return hash_json(digests)


def hash_json(value: Any) -> str:
    """SHA-256, 64 hex digits, of a value made of dicts, lists, strings, numbers, booleans and None.

    The order of keys does not count; tuples are lists.

    Raises:
        TypeError: the value holds something else.
        ValueError: it holds a number that JSON does not know (nan, infinity).
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_tokenizer(tokenizer: Any) -> str:
    """SHA-256 of what turns text into ids: the vocabulary and its rules, not the chat template.

    Two tokenizers of one hash give the same ids. The hash of a fast tokenizer is that of its
    ``tokenizer.json`` without padding and truncation, which any call may change; one without it is
    hashed by its class and vocabulary.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return hash_json([type(tokenizer).__name__, tokenizer.get_vocab()])
    content = json.loads(backend.to_str())
    return hash_json({k: v for k, v in content.items() if k not in {"padding", "truncation"}})


def check_reusable(directory: Path, expected_hash: str, *, manifest: str) -> bool:
    """Whether ``directory`` holds the artifact of this hash already.

    Args:
        directory: the artifact's folder.
        expected_hash: the hash of what it would be made from now.
        manifest: the name of its JSON file, such as ``prepare.json``.

    Returns:
        True if it is there; False if the folder is absent or empty, so that it can be made.

    Raises:
        StaleArtifactError: the folder holds an artifact of another hash.
        FileExistsError: the folder holds something that is no such artifact.
    """
    directory = pathlib.Path(directory)
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return False
    found = read_manifest(directory, manifest)["content_hash"]
    if found == expected_hash:
        return True
    raise StaleArtifactError(
        f"{directory} was made from content {found}; the inputs and settings given now have "
        f"content {expected_hash}. Choose another folder, or ask for it to be overwritten"
    )


def read_manifest(directory: Path, manifest: str) -> dict[str, Any]:
    """The manifest of an artifact.

    Raises:
        FileNotFoundError: the folder is absent.
        FileExistsError: the folder has no manifest, or one without a content hash.
    """
    directory = pathlib.Path(directory)
    if not directory.exists():
        raise FileNotFoundError(f"{directory} does not exist; expected a folder with {manifest}")
    try:
        content = json.loads((directory / manifest).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileExistsError(
            f"{directory} has no readable {manifest} ({error}); expected an artifact, or no folder"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("content_hash"), str):
        raise FileExistsError(f"{directory / manifest} has no content_hash; expected an artifact")
    return content


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
