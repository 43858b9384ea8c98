"""Texts, with or without vectors, from a Parquet file of the user's: what a teacher is made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.fs as pafs

from unime_ray.artifacts import filesystem
from unime_ray.config_teacher import TeacherConfig
from unime_ray.corpus.files import file_signature, is_remote
from unime_ray.errors import CorpusError
from unime_ray.ids import item_id
from unime_ray.schemas import ID

MIN_NORM = 1e-6
TEXTS = pa.schema([pa.field("text_id", ID), pa.field("text", pa.string())])


def parquet_files(settings: TeacherConfig) -> list[str]:
    """The Parquet files at `settings.path`; none if there is no path."""
    if settings.path is None:
        return []
    fs, path = filesystem(settings.path)
    info = fs.get_file_info(path)
    if info.type == pafs.FileType.Directory:
        found = fs.get_file_info(pafs.FileSelector(path, recursive=True))
        files = sorted(file.path for file in found if file.path.endswith(".parquet"))
    else:
        files = [path] if info.type == pafs.FileType.File else []
    if not files:
        raise CorpusError(f"{settings.path}: no Parquet file there; check the teacher's `path`")
    return files


def text_signatures(settings: TeacherConfig) -> dict[str, str]:
    """What changes with the content of each file; of remote files size and time."""
    if settings.path is None or not is_remote(settings.path):
        return {f"file {number}": file_signature(file) for number, file in enumerate(parquet_files(settings))}
    fs, _ = filesystem(settings.path)
    infos = fs.get_file_info(parquet_files(settings))
    return {f"file {number}": f"{info.path} {info.size} {info.mtime_ns}" for number, info in enumerate(infos)}


def distinct_texts(settings: TeacherConfig, columns: list[str]) -> Iterator[tuple[pa.Table, np.ndarray]]:
    """Batches of (text_id, text) and their vectors, the first of equal texts only.

    Raises:
        CorpusError: a column is missing, a text is empty, a vector has another width than its neighbours, is not
            finite or has no direction.
    """
    seen: set[bytes] = set()
    start = 0
    with_vectors = len(columns) > 1
    for batch in _batches(settings, columns):
        texts = batch.column(0).to_pylist()
        ids = [_text_id(settings, start + row, text) for row, text in enumerate(texts)]
        first = {identifier: row for row, identifier in reversed(list(enumerate(ids))) if identifier not in seen}
        seen.update(first)
        fresh = sorted(first.values())
        vectors_NT = _unit(settings, start, batch.column(1)) if with_vectors else np.zeros((len(ids), 0), np.float32)
        start += len(ids)
        if fresh:
            table = pa.table([pa.array([ids[row] for row in fresh], ID), [texts[row] for row in fresh]], schema=TEXTS)
            yield table, vectors_NT[fresh]


def _batches(settings: TeacherConfig, columns: list[str]) -> Iterator[pa.RecordBatch]:
    files = parquet_files(settings)
    fs, _ = filesystem(settings.path or "")
    try:
        dataset = pads.dataset(files, filesystem=fs, format="parquet")
    except (pa.ArrowInvalid, OSError) as error:
        raise CorpusError(f"{settings.path}: not readable as Parquet ({error})") from error
    for column in columns:
        if column not in dataset.schema.names:
            names = ", ".join(dataset.schema.names)
            raise CorpusError(
                f"{settings.path}: no column {column!r}; it has {names}: set text_column or vector_column"
            )
    if len(columns) > 1 and not _holds_numbers(dataset.schema.field(columns[1]).type):
        found = dataset.schema.field(columns[1]).type
        raise CorpusError(f"{settings.path}: column {columns[1]!r} holds {found}, not lists of numbers")
    yield from dataset.scanner(columns=columns, batch_size=settings.rows_per_batch).to_batches()


def _holds_numbers(kind: pa.DataType) -> bool:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(is_one(kind) for is_one in lists):
        return False
    # Of lists that are all empty nothing is known; the first row says so.
    return any(is_one(kind.value_type) for is_one in (pa.types.is_floating, pa.types.is_integer, pa.types.is_null))


def _text_id(settings: TeacherConfig, row: int, text: Any) -> bytes:
    if not isinstance(text, str) or not text.strip():
        raise CorpusError(f"{settings.path}: row {row}: no text in column {settings.text_column!r}; leave the row out")
    return item_id(text, None)


def _unit(settings: TeacherConfig, start: int, column: pa.Array) -> np.ndarray:
    """The vectors (N, T) float32 of a column, divided by their norms."""
    rows = column.to_pylist()
    width = len(rows[0] or []) if rows else 0
    for row, vector in enumerate(rows):
        if not vector or len(vector) != width or any(value is None for value in vector):
            raise CorpusError(
                f"{settings.path}: row {start + row}: column {settings.vector_column!r} must hold {width or 'some'} "
                "numbers, as in the other rows; make the vectors with one model"
            )
    vectors_NT = np.asarray(rows, dtype=np.float32).reshape(len(rows), width)
    norms_N = np.linalg.norm(vectors_NT, axis=1)
    bad = np.flatnonzero(~(np.isfinite(norms_N) & (norms_N > MIN_NORM)))
    if len(bad):
        raise CorpusError(f"{settings.path}: row {start + bad[0]}: the vector is zero or not finite; leave the row out")
    return vectors_NT / norms_N[:, None]
