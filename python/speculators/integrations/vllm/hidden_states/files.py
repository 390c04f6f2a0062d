"""``--generate.source=files``: hidden states that another program has already written.

vLLM's stock connector, and libraries that build on it, write a file for each document:
``hs_0.safetensors`` and so on, with ``hidden_states`` ``[T, streams, H]`` in bfloat16 or float8,
``token_ids`` int64 ``[T]``, and sometimes ``loss_mask``. Which streams these are, the files do not
say; so they are taken for those wanted, and the first documents are compared with transformers.

Documents are found by their tokens: files may lie in any order, and rows that ``prepare`` dropped
may be among them. The program in this module writes the rows for ``--data``::

    python -m speculators.integrations.vllm.hidden_states.files FOLDER ROWS.jsonl
"""

import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from speculators.atomic import atomic_file
from speculators.data.sources import HiddenStateSource
from speculators.integrations.vllm.hidden_states.comparison import (
    Tolerance,
    check_states,
    compare_states,
)

PATTERN = "hs_*.safetensors"
_FLOAT8 = {torch.float8_e4m3fn, torch.float8_e5m2}
_KNOWN = {"hidden_states", "token_ids", "input_ids", "loss_mask"}
_COMPARED = 4


class FilesSource:
    """A folder of such files as a ``HiddenStateSource``.

    Args:
        folder: with ``hs_*.safetensors``.
        reference: the verifier in transformers, with the streams of the files, in their order.
        tolerance: of the comparison with it; float8 keeps three bits of each entry, so it is
            taken four times as wide for such files.
        report: is told of the comparison, a line each.

    Raises:
        ValueError: there are no files, or one of them is something else.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        reference: HiddenStateSource,
        *,
        tolerance: Tolerance | None = None,
        report: Callable[[str], None] | None = None,
    ) -> None:
        self.layer_ids = reference.layer_ids
        self.hidden_size = reference.hidden_size
        self.verifier = reference.verifier
        self._folder, self._reference = pathlib.Path(folder), reference
        self._tolerance, self._report = tolerance, report
        self._compared = False
        self._paths = {_key(tokens): path for path, tokens, _ in read_tokens(self._folder)}
        sizes = sorted((key, path.stat().st_size) for key, path in self._paths.items())
        self.identity: Mapping[str, Any] = {
            **reference.identity,
            "computed_by": "files",
            "files": hashlib.sha256(repr(sizes).encode()).hexdigest(),
        }

    def hidden_states(
        self, documents: Sequence[Tensor], batch_tokens: int
    ) -> Iterator[dict[int, Tensor]]:
        """As the protocol says; float8 comes as bfloat16.

        Raises:
            ValueError: a document has no file, or its file has other streams.
            DifferentStatesError: the states are not those of transformers.
        """
        if not self._compared:
            first = documents[:_COMPARED]
            found = [self._read(document) for document in first]
            expected = list(self._reference.hidden_states(first, batch_tokens))
            differences = compare_states([states for states, _ in found], expected)
            for difference in differences if self._report is not None else ():
                self._report(f"files beside transformers, {difference}")  # type: ignore[misc]
            tolerance = self._tolerance or Tolerance()
            if any(dtype in _FLOAT8 for _, dtype in found):
                tolerance = Tolerance(1 - 4 * (1 - tolerance.cosine), 4 * tolerance.max_difference)
            check_states(differences, tolerance, str(self._folder))
            self._compared = True
        for document in documents:
            yield self._read(document)[0]

    def _read(self, document: Tensor) -> tuple[dict[int, Tensor], torch.dtype]:
        path = self._paths.get(_key(document))
        if path is None:
            raise ValueError(
                f"{self._folder} has no file for a document of {len(document)} tokens that begins "
                f"with {document[:8].tolist()}; prepare the very rows that the files were made "
                "from, uncut"
            )
        with _opened(path) as file:
            states: Tensor = file.get_tensor("hidden_states")
        shape = [len(document), len(self.layer_ids), self.hidden_size]
        if list(states.shape) != shape:
            raise ValueError(
                f"{path} has hidden states {list(states.shape)}; expected {shape}, the streams "
                f"{list(self.layer_ids)}"
            )
        dtype = states.dtype
        if dtype in _FLOAT8:
            states = states.bfloat16()
        return {k: states[:, place] for place, k in enumerate(self.layer_ids)}, dtype


def read_tokens(
    folder: str | os.PathLike[str],
) -> Iterator[tuple[pathlib.Path, Tensor, Tensor | None]]:
    """The files of a folder by their numbers: path, tokens ``[T]``, and the loss mask if any.

    Raises:
        ValueError: there are no files, or one of them is something else.
    """
    paths = sorted(pathlib.Path(folder).glob(PATTERN), key=lambda path: (len(path.name), path.name))
    if not paths:
        raise ValueError(f"{folder} has no {PATTERN}; expected a folder of hidden states")
    for path in paths:
        with _opened(path) as file:
            names = set(file.keys())
            tokens = names & {"token_ids", "input_ids"}
            if "hidden_states" not in names or len(tokens) != 1 or not names <= _KNOWN:
                raise ValueError(
                    f"{path} holds {sorted(names)}; expected hidden_states and token_ids, and "
                    "perhaps loss_mask"
                )
            mask = file.get_tensor("loss_mask").bool() if "loss_mask" in names else None
            yield path, file.get_tensor(tokens.pop()).long(), mask


def write_rows(folder: str | os.PathLike[str], target: str | os.PathLike[str]) -> int:
    """Writes the files' tokens and loss masks as rows that ``prepare`` reads.

    Args:
        folder: with ``hs_*.safetensors``.
        target: a ``.jsonl`` file.

    Returns:
        How many rows.
    """
    count = 0
    with atomic_file(target, "w") as file:
        for _, tokens, mask in read_tokens(folder):
            row: dict[str, Any] = {"input_ids": tokens.tolist()}
            if mask is not None:
                row["loss_mask"] = [int(learned) for learned in mask]
            file.write(json.dumps(row) + "\n")
            count += 1
    return count


def _key(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.long().numpy().tobytes()).hexdigest()


def _opened(path: pathlib.Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from None


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(write_rows(*sys.argv[1:]), "rows")
