"""Stage ``generate``: prepared documents -> verifier -> a store of hidden states.

It says first what the work will take, and refuses what does not fit on the disk. A store is made
shard by shard in an order that depends on the data alone, so a run that was stopped, whatever the
reason, goes on after the last whole shard and ends with the bytes of a run that was not stopped.

How documents are batched and cut into shards decides about speed, not about content. So it is no
part of the content hash, and a run that ran out of memory can be continued with smaller batches.
"""

import dataclasses
import itertools
import os
import pathlib
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from speculators.data.artifact import (
    StaleArtifactError,
    check_reusable,
    hash_json,
    read_manifest,
)
from speculators.data.disk import check_free, full_disk, readable_bytes
from speculators.data.regenerate import RegenerateSettings
from speculators.data.sources import HiddenStateSource
from speculators.data.store import (
    INDEX,
    DTypeName,
    StoreIndex,
    StoreWriter,
    bytes_per_token,
    read_index,
)
from speculators.data.workload import (
    ResponseWriter,
    TokenizedDocument,
    TokenizedDocuments,
    Workload,
)

SHARD_BYTES = 256 << 20
_BATCHES_PER_SHARD = 8  # at most, where responses are written
_TIMED_FROM = 8  # batches; less work is done before its time has been measured


class Progress(Protocol):
    """What shows the user how far the work is."""

    def start(self, total: int, description: str) -> None:
        """Work of ``total`` documents begins."""

    def advance(self, count: int) -> None:
        """So many more documents are done."""

    def message(self, text: str) -> None:
        """A line for the user."""


class _Silent:
    def start(self, total: int, description: str) -> None:
        pass

    def advance(self, count: int) -> None:
        pass

    def message(self, text: str) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class GenerateReport:
    """What a run did.

    Attributes:
        directory: the store.
        content_hash: what it was made from.
        documents: in the store.
        tokens: in the store.
        learnable: learnable tokens in the store.
        file_bytes: the store's size.
        shards: files in the store.
        reused_documents: how many of the documents were there before.
        seconds: what this run took.
    """

    directory: pathlib.Path
    content_hash: str
    documents: int
    tokens: int
    learnable: int
    file_bytes: int
    shards: int
    reused_documents: int
    seconds: float


def generate(
    prepared: TokenizedDocuments,
    output_dir: str | os.PathLike[str],
    source: HiddenStateSource,
    *,
    regenerate: RegenerateSettings | None = None,
    store_dtype: DTypeName = "bfloat16",
    max_shard_tokens: int | None = None,
    batch_tokens: int = 16384,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> GenerateReport:
    """Makes a store, or goes on with one that was begun, or finds it complete.

    A complete store with further residual streams serves as well: several algorithms can learn
    from the data of the one that reads the most.

    Args:
        prepared: the documents.
        output_dir: the store's folder.
        source: the verifier.
        regenerate: lets the verifier write the last response of each document first; the source
            must be a ``ResponseWriter``. For the prompts see ``regenerate``.
        store_dtype: of the stored states.
        max_shard_tokens: tokens in a shard; by default what takes 256 MiB, or eight batches if that
            is less and responses are written.
        batch_tokens: tokens computed at once, padding included.
        overwrite: replaces a store that was made from something else, once the source has given
            the states of a whole shard. One that fits is never made again, with or without.
        progress: shows the progress; None for silence.

    Raises:
        StaleArtifactError: the folder has a store that was made from something else.
        FileExistsError: the folder has something that is no store.
        DiskSpaceError: the store does not fit on the disk (nothing is written), or the disk became
            full (whole shards stay, and the next run goes on after them).
        ValueError: settings or documents are wrong, or the source cannot do what is asked.
    """
    started = time.monotonic()
    directory = pathlib.Path(output_dir)
    _check(prepared, source, regenerate, max_shard_tokens, batch_tokens)
    index = _new_index(prepared, source, regenerate, store_dtype)
    stale = False
    try:
        if check_reusable(directory, index.content_hash, manifest=INDEX):
            index = read_index(directory)
    except StaleArtifactError:
        wider = _wider(directory, index)
        if wider is not None:
            index = wider
        elif not overwrite:
            raise
        else:
            stale = True
    reused = len(index.stored)
    if not index.complete:
        writer = source if regenerate is not None and isinstance(source, ResponseWriter) else None
        work = Workload(prepared, batch_tokens, writer, regenerate)
        if index.stored != work.order[:reused]:
            raise ValueError(
                f"{directory / INDEX} lists documents in another order than this version computes "
                "them; choose another folder, or remove this one"
            )
        progress = progress or _Silent()
        row_bytes = bytes_per_token(len(index.layer_ids), index.hidden_size, store_dtype)
        freed = _size(directory) if stale else 0
        at_most = "" if regenerate is None else "at most "
        progress.message(_say_what_it_takes(work, reused, row_bytes, directory, freed, at_most))
        with full_disk(
            f"{directory} keeps its whole shards; free some space and run the same command again: "
            "it goes on after them"
        ):
            shard_tokens = max_shard_tokens or max(1, SHARD_BYTES // row_bytes)
            if max_shard_tokens is None and work.regenerates:
                # What a killed run loses is a shard, and responses take long to write.
                shard_tokens = min(shard_tokens, _BATCHES_PER_SHARD * batch_tokens)
            store = StoreWriter(directory, index, replaces=stale)
            _run(work, source, store, reused, batch_tokens, shard_tokens, progress)
    shards = index.shards
    return GenerateReport(
        directory=directory,
        content_hash=index.content_hash,
        documents=index.num_documents,
        tokens=sum(sum(shard.lengths) for shard in shards),
        learnable=sum(sum(shard.learnable) for shard in shards),
        file_bytes=_size(directory),
        shards=len(shards),
        reused_documents=reused,
        seconds=time.monotonic() - started,
    )


def _check(
    prepared: TokenizedDocuments,
    source: HiddenStateSource,
    regenerate: RegenerateSettings | None,
    max_shard_tokens: int | None,
    batch_tokens: int,
) -> None:
    if batch_tokens < 1 or (max_shard_tokens is not None and max_shard_tokens < 1):
        raise ValueError(
            f"batch_tokens is {batch_tokens} and max_shard_tokens {max_shard_tokens}; expected 1 "
            "or more"
        )
    if regenerate is not None and not isinstance(source, ResponseWriter):
        raise ValueError(
            f"the source {type(source).__name__} writes no responses, which regenerating needs; "
            "use another source, such as 'transformers'"
        )
    empty = int((prepared.lengths < 1).sum())
    if empty or len(prepared) == 0:
        raise ValueError(
            f"the prepared data has {len(prepared)} documents, {empty} of them without a token; "
            "expected at least one document, each with tokens"
        )


def _new_index(
    prepared: TokenizedDocuments,
    source: HiddenStateSource,
    regenerate: RegenerateSettings | None,
    store_dtype: DTypeName,
) -> StoreIndex:
    made_from: dict[str, Any] = {
        "prepared": prepared.content_hash,
        "source": dict(source.identity),
        "layer_ids": list(source.layer_ids),
        "dtype": store_dtype,
        "regenerate": None if regenerate is None else dataclasses.asdict(regenerate),
    }
    return StoreIndex(
        content_hash=hash_json(made_from),
        made_from=made_from,
        verifier=source.verifier,
        layer_ids=list(source.layer_ids),
        hidden_size=source.hidden_size,
        dtype=store_dtype,
        num_documents=len(prepared),
    )


def _wider(directory: pathlib.Path, wanted: StoreIndex) -> StoreIndex | None:
    """The index of a whole store that has further residual streams and differs in nothing else."""
    manifest = read_manifest(directory, INDEX)
    streams = set(manifest.get("layer_ids", ()))
    made_from = {**manifest.get("made_from", {}), "layer_ids": wanted.made_from["layer_ids"]}
    if made_from != wanted.made_from or not set(wanted.layer_ids) <= streams:
        return None
    found = read_index(directory)
    return found if found.complete else None


def _say_what_it_takes(
    work: Workload, done: int, row_bytes: int, directory: pathlib.Path, freed: int, at_most: str
) -> str:
    """How much disk the rest needs; DiskSpaceError if there is less, ``freed`` bytes included."""
    tokens = sum(work.sizes[done:])
    what = f"the hidden states of {len(work.sizes) - done} documents"
    free = freed + check_free(
        directory,
        max(0, tokens * row_bytes - freed),
        f"{what} ({at_most}{tokens} tokens)",
        "free some space, choose another disk or a smaller store_dtype, or use fewer documents "
        "or layers",
    )
    needed = readable_bytes(tokens * row_bytes)
    return f"{what} take {at_most}{needed}; {readable_bytes(free)} are free"


def _run(
    work: Workload,
    source: HiddenStateSource,
    writer: StoreWriter,
    done: int,
    batch_tokens: int,
    max_shard_tokens: int,
    progress: Progress,
) -> None:
    """Computes and writes what is not done yet."""
    progress.start(len(work.order), "hidden states")
    progress.advance(done)
    batches = [batch for batch in work.batches if batch.stop > done]
    if not batches:  # the run before was killed between its last shard and the end
        writer.finish()
        return
    begin = time.monotonic()
    first = work.make(batches[0])
    if len(batches) >= _TIMED_FROM:
        seconds = time.monotonic() - begin + _time(source, first, batch_tokens)
        rest = sum(work.sizes[done:]) / sum(work.sizes[place] for place in batches[0])
        progress.message(f"this takes about {_readable_time(seconds * rest)}")
    rest_of_first = first[max(0, done - batches[0].start) :]
    if work.regenerates:  # that takes far longer than to read the documents afterwards
        progress.advance(len(rest_of_first))
    made = itertools.chain(rest_of_first, _made(work, batches[1:], progress))
    for shard in _shards(made, max_shard_tokens):
        streams = source.hidden_states([document.input_ids for document in shard], batch_tokens)
        for document, states in zip(shard, streams, strict=True):
            writer.add(document.number, document.input_ids, document.loss_mask, states)
            if not work.regenerates:
                progress.advance(1)
        writer.write_shard()
    writer.finish()


def _made(
    work: Workload, batches: Iterable[range], progress: Progress
) -> Iterator[TokenizedDocument]:
    for batch in batches:
        documents = work.make(batch)
        if work.regenerates:
            progress.advance(len(documents))
        yield from documents


def _time(
    source: HiddenStateSource, documents: Sequence[TokenizedDocument], batch_tokens: int
) -> float:
    """Seconds for the states of a batch, measured; the states are not used."""
    input_ids = [document.input_ids for document in documents]
    begin = 0.0
    for _ in range(2):  # the first pass of a process also loads kernels
        begin = time.monotonic()
        for _ in source.hidden_states(input_ids, batch_tokens):
            pass
    return time.monotonic() - begin


def _readable_time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _shards(
    documents: Iterable[TokenizedDocument], max_tokens: int
) -> Iterator[list[TokenizedDocument]]:
    """Groups of neighbours of at most so many tokens; a longer document is alone."""
    shard: list[TokenizedDocument] = []
    tokens = 0
    for document in documents:
        if shard and tokens + len(document.input_ids) > max_tokens:
            yield shard
            shard, tokens = [], 0
        shard.append(document)
        tokens += len(document.input_ids)
    if shard:
        yield shard


def _size(directory: pathlib.Path) -> int:
    return sum(file.stat().st_size for file in directory.iterdir() if file.is_file())
