"""Rows of `candidates` by query id, for the actors of judge and select."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from unime_ray.artifacts import filesystem
from unime_ray.corpus.payload import IdIndex
from unime_ray.schemas import CANDIDATES, ID, conform
from unime_ray.stages.engine import parquet_files

FILES_IN_MEMORY = 4


class CandidateRows:
    """Random access to a `candidates` artifact; only its ids and a few of its files are in memory.

    Safe to use from several threads. Queries of one file asked for together read it once.
    """

    def __init__(self, data_uri: str) -> None:
        self.data_uri = data_uri
        self._lock = threading.Lock()
        self._files: list[str] = []
        self._starts: list[int] = []
        self._index: IdIndex | None = None
        self._open_files: OrderedDict[int, pa.Table] = OrderedDict()

    def __reduce__(self) -> tuple[type[CandidateRows], tuple[str]]:
        return CandidateRows, (self.data_uri,)

    def take(self, query_ids: Sequence[bytes]) -> pa.Table:
        """The rows of `query_ids`, in their order.

        Raises:
            ArtifactError: an id has no row.
        """
        with self._lock:
            rows = self._ids().rows(query_ids, self.data_uri)
            parts = [self._row(row) for row in rows]
        return pa.concat_tables(parts) if parts else CANDIDATES.empty_table()

    def _ids(self) -> IdIndex:
        if self._index is None:
            self._files, fs = parquet_files(self.data_uri)
            columns = [pq.read_table(path, columns=["query_id"], filesystem=fs).column(0) for path in self._files]
            total = 0
            for column in columns:
                self._starts.append(total)
                total += len(column)
            chunks = [chunk for column in columns for chunk in column.chunks]
            self._index = IdIndex(pa.chunked_array(chunks, type=ID))
        return self._index

    def _row(self, row: int) -> pa.Table:
        number = max(file for file, start in enumerate(self._starts) if start <= row)
        return self._table(number).slice(row - self._starts[number], 1)

    def _table(self, number: int) -> pa.Table:
        if number not in self._open_files:
            fs, _ = filesystem(self.data_uri)
            self._open_files[number] = conform(pq.read_table(self._files[number], filesystem=fs), CANDIDATES)
            if len(self._open_files) > FILES_IN_MEMORY:
                self._open_files.popitem(last=False)
        self._open_files.move_to_end(number)
        return self._open_files[number]
