"""Parquet in the Hugging Face layout: pictures as struct<bytes, path>, as plain bytes, or as paths."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from unime_ray.config import Columns, Source
from unime_ray.corpus.files import open_file
from unime_ray.corpus.records import Record, Reject
from unime_ray.corpus.rows import NESTED, MakeRecord, record_of
from unime_ray.corpus.units import STAGE, Unit, check_columns
from unime_ray.errors import CorpusError, RejectedRow

BATCH_ROWS = 64


def cut(file: str, source: Source, rows_per_task: int) -> Iterator[Unit]:
    """Units of whole row groups; `start` and `stop` are row group numbers."""
    parquet = _open(file)
    check_columns(source, parquet.schema_arrow.names, file)
    start, first_row, rows = 0, 1, 0
    for group in range(parquet.num_row_groups):
        rows += parquet.metadata.row_group(group).num_rows
        if rows >= rows_per_task or group == parquet.num_row_groups - 1:
            if rows:
                yield Unit(file, start, group + 1, first_row, rows)
            start, first_row, rows = group + 1, first_row + rows, 0


def read(
    unit: Unit, source: Source, make: MakeRecord = record_of, names: Collection[str | None] | None = None
) -> Iterator[Record | Reject]:
    """The rows of a unit, a few at a time; only the columns that are mapped (or `names`) are read."""
    parquet = _open(unit.file)
    wanted = names or {getattr(source.columns, key) for key in Columns.model_fields} | set(NESTED)
    columns = [name for name in parquet.schema_arrow.names if name in wanted]
    if not columns:  # reading no column would give no rows at all, and each must get its line in `rejects`
        columns = parquet.schema_arrow.names[:1]
    number = unit.first_row
    groups = list(range(unit.start, unit.stop))
    for batch in parquet.iter_batches(BATCH_ROWS, row_groups=groups, columns=columns, use_threads=False):
        for row in row_values(batch):
            yield row_record(row, number, source, unit.file, make)
            number += 1


def row_values(batch: pa.RecordBatch) -> list[dict[str, Any] | None]:
    """Python values of each row; None where a text is no UTF-8."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [None]
        return [row for index in range(batch.num_rows) for row in row_values(batch.slice(index, 1))]


def row_record(row: dict[str, Any] | None, number: int, source: Source, file: str, make: MakeRecord) -> Record | Reject:
    """What `make` makes of a row, or why it is refused."""
    if row is None:
        return Reject(file, number, STAGE, "text is not valid UTF-8")
    try:
        return make(row, number, source, file)
    except RejectedRow as error:
        return Reject(file, number, STAGE, error.reason)


def _open(file: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(open_file(file))
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(f"{file}: not a readable Parquet file: {' '.join(str(error).split())}") from error
