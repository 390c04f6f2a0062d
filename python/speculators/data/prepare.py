"""Stage ``prepare``: rows of any kind -> token ids and loss masks in one folder.

The rows are worked off in parts of some thousand, each written whole beside the output. A run that
was killed goes on after its last part: the parts' folder is named by the hash of the content, so
that parts of other inputs or settings are never taken. At the end the parts become one dataset,
which takes the output's name in one rename.
"""

import dataclasses
import itertools
import json
import pathlib
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import datasets
from transformers import PreTrainedTokenizerBase

from speculators.atomic import atomic_directory
from speculators.data import artifact, chat, parts
from speculators.data.disk import full_disk
from speculators.data.parts import PrepareSettings
from speculators.data.prepared import (
    MANIFEST,
    PrepareCounts,
    PreparedDataset,
    PrepareReport,
    token_counts,
)
from speculators.data.raw_rows import RawRow, RowSource

__all__ = [
    "MalformedDataError",
    "PrepareCounts",
    "PrepareReport",
    "PreparedDataset",
    "prepare",
    "token_counts",
]

FORMAT = 1
"""Raised when the same inputs come to give another result; part of the content hash."""

_ROWS_PER_PART = 2000


class MalformedDataError(ValueError):
    """A row is malformed, or none can be used; the message names file, line and reason."""


def prepare(
    data: artifact.Path | Iterable[artifact.Path],
    output_dir: artifact.Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    split: str = "train",
    last_turn_only: bool = False,
    add_generation_prompt: bool = False,
    on_malformed: Literal["skip", "error"] = "skip",
    min_learnable: int = 0,
    require_learnable: bool = True,
    num_samples: int | None = None,
    seed: int | None = None,
    template_arguments: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> PrepareReport:
    """Turns conversations, texts or token ids into a dataset of token ids and loss masks.

    A folder that was made from the same content is used again. A run that was interrupted goes on
    where it was, if it is called with the same arguments.

    Args:
        data: what to read, see ``records.read_records``.
        output_dir: the folder to write.
        tokenizer: the verifier's, a fast one; with a chat template if there are conversations.
        max_length: rows keep their first ``max_length`` tokens, and the mask of these.
        split: the split of a dataset.
        last_turn_only: learn only what the assistant said after the user's last message.
        add_generation_prompt: end conversations in which the assistant does not speak last with
            what asks it to, so that the verifier can write the answer.
        on_malformed: ``"skip"`` counts malformed rows, ``"error"`` makes them an error.
        min_learnable: leave out rows with fewer learnable tokens, after truncation.
        require_learnable: make it an error if no token at all is learnable, as in data of prompts
            alone.
        num_samples: use only so many rows: the first, or with ``seed`` rows drawn from all.
        seed: for drawing.
        template_arguments: further variables of the chat template, such as ``enable_thinking``.
        overwrite: exchange what is in ``output_dir``, whatever it was made from.
        progress: called with the number of rows done, every two thousand rows and at the end.

    Returns:
        The counts, and the content hash. ``PreparedDataset.open(output_dir)`` has the data.

    Raises:
        StaleArtifactError: ``output_dir`` was made from something else.
        FileExistsError: ``output_dir`` holds something that ``prepare`` did not write.
        ChatTemplateError: the template does not tell what the assistant said.
        MalformedDataError: a row is malformed and that is an error, no row can be used, or no
            token is learnable though one must be.
        ValueError: an argument is out of its range, the tokenizer is a slow one, or a file is
            broken beyond some point.
    """
    if on_malformed not in {"skip", "error"}:
        raise ValueError(f"on_malformed is {on_malformed!r}; expected 'skip' or 'error'")
    settings = PrepareSettings(
        max_length=max_length,
        last_turn_only=last_turn_only,
        add_generation_prompt=add_generation_prompt,
        min_learnable=min_learnable,
        num_samples=num_samples,
        seed=seed,
        template_arguments=dict(template_arguments or {}),
    )
    chat.check_tokenizer(tokenizer)
    source = RowSource(data, split=split)
    report = _new_report(source, tokenizer, settings)
    output = pathlib.Path(output_dir).absolute()
    if not overwrite and artifact.check_reusable(output, report.content_hash, manifest=MANIFEST):
        report = PreparedDataset.open(output).report.model_copy(update={"reused": True})
        _check(report, on_malformed, require_learnable)
        return report
    folder = output.with_name(f".{output.name}.{report.content_hash[:16]}.parts")
    files: list[pathlib.Path] = []
    with full_disk(
        f"{output} is as it was; free some space and run the same command again, or choose "
        "another folder"
    ):
        selected = _selected(source, settings)
        while rows := list(itertools.islice(selected, _ROWS_PER_PART)):
            files.append(folder / f"{len(files):06}.arrow")
            report.add(parts.counts_of(files[-1], rows, tokenizer, settings))
            if on_malformed == "error":
                _check_malformed(report)
            if progress is not None:
                progress(report.rows)
        _check(report, on_malformed, require_learnable)
        with atomic_directory(output, overwrite=overwrite) as new:
            _write(new, files, report, settings)
        shutil.rmtree(folder)
    return report


def _new_report(
    source: RowSource, tokenizer: PreTrainedTokenizerBase, settings: PrepareSettings
) -> PrepareReport:
    tokenizer_hash = artifact.hash_tokenizer(tokenizer)
    content = {
        "format": FORMAT,
        "rows": source.content_hash(),
        "tokenizer": tokenizer_hash,
        "special_tokens": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
        "settings": dataclasses.asdict(settings),
    }
    return PrepareReport(content_hash=artifact.hash_json(content), tokenizer_hash=tokenizer_hash)


def _selected(source: RowSource, settings: PrepareSettings) -> Iterator[RawRow]:
    count = settings.num_samples
    if count is None or settings.seed is None:
        return itertools.islice(source, count)
    total = sum(1 for _ in source)
    drawn = random.Random(settings.seed).sample(range(total), min(count, total))  # noqa: S311
    chosen = set(drawn)
    return (row for number, row in enumerate(source) if number in chosen)


def _check(report: PrepareReport, on_malformed: str, require_learnable: bool) -> None:
    if on_malformed == "error":
        _check_malformed(report)
    if report.kept == 0:
        found = f"{report.malformed} malformed {report.malformed_by_kind}, "
        raise MalformedDataError(
            f"no row can be used, of {report.rows}: {found if report.malformed else ''}"
            f"{report.without_tokens} without tokens, {report.below_min_learnable} with too few "
            f"learnable tokens. {_first(report)}"
        )
    if require_learnable and report.learnable_tokens == 0:
        raise MalformedDataError(
            f"no token of the {report.kept} rows is learnable: the conversations have no answers "
            f"of the assistant (within the maximal length, {report.truncated} rows were cut). Add "
            "answers, or let the verifier write them (regenerate)"
        )


def _check_malformed(report: PrepareReport) -> None:
    if report.malformed:
        raise MalformedDataError(_first(report))


def _first(report: PrepareReport) -> str:
    return "".join(
        f"{row.file}, line {row.line}: {row.reason}" for row in report.first_malformed[:1]
    )


def _write(
    directory: pathlib.Path,
    files: list[pathlib.Path],
    report: PrepareReport,
    settings: PrepareSettings,
) -> None:
    pieces = [datasets.Dataset.from_file(str(file)) for file in files]
    datasets.concatenate_datasets(pieces).save_to_disk(directory)
    manifest = {
        "format": FORMAT,
        "content_hash": report.content_hash,
        "settings": dataclasses.asdict(settings),
        "report": report.model_dump(mode="json", exclude={"reused"}),
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
