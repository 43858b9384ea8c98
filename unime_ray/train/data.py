"""Training rows by number: `hard_negatives` as one memory-mapped Arrow file, and the order they are visited in.

Ray Data's training shards start over at row 0 after a crash, with other rows for each rank. So the loop addresses rows
by number instead: batch b of epoch e is permutation(seed, e)[b*G:(b+1)*G] for a batch of G queries, and rank r of W
takes every W-th of it from the r-th on. Where a run stands is then one number, its step, and a resumed run sees what
an uninterrupted one would have seen.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from unime_ray.artifacts import Artifact, filesystem
from unime_ray.errors import TrainingError
from unime_ray.ids import show

COLUMNS = ("query_id", "positive_id", "positive_score", "negative_ids", "negative_scores")
ROWS_PER_CHUNK = 1024


class Asked(Protocol):
    """What every training row has: the id that errors name it by."""

    @property
    def query_id(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Example:
    """One (query, positive) with its hard negatives, in the order they were selected. Scores are in [0, 1]."""

    row: int
    query_id: bytes
    positive_id: bytes
    positive_score: float
    negative_ids: tuple[bytes, ...]
    negative_scores: tuple[float, ...]


def prepare_examples(table: Artifact) -> str:
    """Write a `hard_negatives` artifact as one Arrow IPC file sorted by ids, once; return the file's URI.

    Raises:
        ArtifactError: the artifact is not there.
        TrainingError: it has no rows.
    """
    return prepare_rows(table, COLUMNS, ("query_id", "positive_id"), "hard negatives")


def prepare_rows(table: Artifact, columns: Sequence[str], order: Sequence[str], what: str) -> str:
    """`columns` of an artifact, sorted by `order`, as one Arrow IPC file beside it; see `prepare_examples`.

    The name carries the artifact's fingerprint, so that a file of older rows is never taken for this one.
    """
    mark = table.require().fingerprint
    uri = table.child(f"examples-{mark}.arrow")
    fs, path = filesystem(uri)
    if fs.get_file_info(path).type == pafs.FileType.File:
        return uri
    rows = table.read(columns).sort_by([(name, "ascending") for name in order])
    if rows.num_rows == 0:
        raise TrainingError(f"{table.uri}: no {what} to train on; see its manifest for what was dropped")
    local = isinstance(fs, pafs.LocalFileSystem)
    target = f"{path}.{os.getpid()}.tmp" if local else path
    with fs.open_output_stream(target) as sink, pa.ipc.new_file(sink, rows.schema) as writer:
        writer.write_table(rows.combine_chunks(), max_chunksize=ROWS_PER_CHUNK)
    if local:
        os.replace(target, path)
    return uri


class RowFile:
    """The rows of a prepared file, by number, without reading it into memory."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._reader = pa.ipc.open_file(pa.memory_map(_local_copy(uri)))
        last = self._reader.num_record_batches - 1
        self._length = last * ROWS_PER_CHUNK + self._reader.get_batch(last).num_rows

    def __len__(self) -> int:
        return self._length

    @property
    def columns(self) -> list[str]:
        return self._reader.schema.names

    def chunk_of(self, row: int) -> pa.RecordBatch:
        """The chunk that `row` lies in, at place `row % ROWS_PER_CHUNK`."""
        if not 0 <= row < self._length:
            raise IndexError(row)
        return self._reader.get_batch(row // ROWS_PER_CHUNK)


class Examples(RowFile):
    """Hard negatives, by number."""

    def __getitem__(self, row: int) -> Example:
        chunk = self.chunk_of(row)
        values = [chunk.column(name)[row % ROWS_PER_CHUNK].as_py() for name in COLUMNS]
        return Example(row, values[0], values[1], values[2], tuple(values[3]), tuple(values[4]))

    def known_positives(self, example: Example) -> tuple[bytes, ...]:
        """Every positive of the example's query: rows are sorted, so they are its neighbours."""
        found = [example.positive_id]
        for direction in (-1, 1):
            row = example.row + direction
            while 0 <= row < self._length and self._query_id(row) == example.query_id:
                found.append(self[row].positive_id)
                row += direction
        return tuple(found)

    def _query_id(self, row: int) -> bytes:
        return self.chunk_of(row).column("query_id")[row % ROWS_PER_CHUNK].as_py()

    def require_negatives(self, count: int) -> None:
        """Raise TrainingError, naming the first query, unless every row has at least `count` negatives."""
        for number in range(self._reader.num_record_batches):
            chunk = self._reader.get_batch(number)
            short = pc.less(pc.list_value_length(chunk.column("negative_ids")), count)
            if pc.any(short).as_py():
                row = pc.index(short, True).as_py()
                length = len(chunk.column("negative_ids")[row])
                raise TrainingError(
                    f"{self.uri}: query {show(chunk.column('query_id')[row].as_py())} has {length} hard negatives, "
                    f"training wants {count}; lower num_negatives or raise select.num_negatives"
                )


def _local_copy(uri: str) -> str:
    """A path on this machine with the file's content: itself, or a copy fetched once per machine."""
    fs, path = filesystem(uri)
    if isinstance(fs, pafs.LocalFileSystem):
        if not os.path.exists(path):
            raise TrainingError(f"{uri}: prepared training rows are gone; run the training stage again")
        return path
    folder = Path(tempfile.gettempdir()) / "unime-ray"
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / Path(path).name  # the name carries the fingerprint of its content
    if not copy.exists():
        part = folder / f"{copy.name}.{os.getpid()}.tmp"
        pafs.copy_files(path, str(part), source_filesystem=fs, destination_filesystem=pafs.LocalFileSystem())
        os.replace(part, copy)
    return str(copy)


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """The order of an epoch: a permutation of range(num_rows) that depends on seed and epoch alone."""
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


@dataclass(frozen=True)
class BatchOrder:
    """Which rows step s trains on. A corpus smaller than a batch is one batch; a tail shorter than a batch is left out
    of its epoch (another permutation brings it back)."""

    num_rows: int
    batch_queries: int
    seed: int

    @property
    def batch_size(self) -> int:
        return min(self.batch_queries, self.num_rows)

    @property
    def batches_per_epoch(self) -> int:
        return self.num_rows // self.batch_size

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, batch) of a step; steps count from 0."""
        return divmod(step, self.batches_per_epoch)

    def batch_rows(self, step: int) -> np.ndarray:
        """Rows of the global batch of a step, (G,)."""
        epoch, batch = self.position(step)
        return permutation(self.seed, epoch, self.num_rows)[batch * self.batch_size : (batch + 1) * self.batch_size]

    def rank_rows(self, step: int, rank: int, world: int) -> np.ndarray:
        """The part of the batch that one rank trains on.

        Raises:
            TrainingError: there are more workers than queries in a batch.
        """
        if world > self.batch_size:
            raise TrainingError(f"{world} workers share a batch of {self.batch_size} queries; use fewer workers")
        return self.batch_rows(step)[rank::world]
