"""A folder that Hugging Face's `datasets` saved (`save_to_disk`): Arrow streams, read without that package.

A row is a row of the dataset, counted per file. Pictures are `Image` features (struct<bytes, path>). Columns are mapped
as for Parquet. Only the files that `state.json` lists are read: caches of `map` may lie beside them. A file is cut
between record batches (1,000 rows unless the writer said otherwise), each of which a worker holds at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from unime_ray.artifacts import filesystem, join
from unime_ray.config import Columns, Source
from unime_ray.corpus.captions import read_object
from unime_ray.corpus.files import folder_of, is_remote, open_file
from unime_ray.corpus.parquet import BATCH_ROWS, row_record, row_values
from unime_ray.corpus.records import Record, Reject
from unime_ray.corpus.rows import NESTED, record_of
from unime_ray.corpus.units import Unit, check_columns
from unime_ray.errors import CorpusError

DICT, STATE = "dataset_dict.json", "state.json"


def cut(file: str, source: Source, rows_per_task: int) -> Iterator[Unit]:
    """Units of whole record batches; `start` and `stop` are byte offsets of their messages."""
    _refuse_dict(source)
    if not _is_listed(file):
        return
    with _open(file) as stream:
        schema = _schema(stream, file)
        check_columns(source, schema.names, file)
        start, first_row, rows = stream.tell(), 1, 0
        while (batch := _next_batch(stream, schema, file)) is not None:
            rows += batch.num_rows
            if rows >= rows_per_task:
                yield Unit(file, start, stream.tell(), first_row, rows)
                start, first_row, rows = stream.tell(), first_row + rows, 0
        if rows:
            yield Unit(file, start, stream.tell(), first_row, rows)


def read(unit: Unit, source: Source) -> Iterator[Record | Reject]:
    """The rows of a unit, a few at a time; only the columns that are mapped become Python values."""
    wanted = {getattr(source.columns, key) for key in Columns.model_fields} | set(NESTED)
    number = unit.first_row
    with _open(unit.file) as stream:
        schema = _schema(stream, unit.file)
        names = [name for name in schema.names if name in wanted] or schema.names[:1]
        stream.seek(unit.start)
        while stream.tell() < unit.stop and (batch := _next_batch(stream, schema, unit.file)) is not None:
            batch = batch.select(names)
            for start in range(0, batch.num_rows, BATCH_ROWS):
                for row in row_values(batch.slice(start, BATCH_ROWS)):
                    yield row_record(row, number, source, unit.file, record_of)
                    number += 1


def _refuse_dict(source: Source) -> None:
    """Raise if the folder holds several splits: which is trained on is the config's to say."""
    if "*" in source.path:
        return
    found = _read_json(join(source.path, DICT))
    if found is not None:
        splits = list(found.get("splits") or [])
        first = join(source.path, str(splits[0])) if splits else source.path
        raise CorpusError(
            f"{source.path}: a saved DatasetDict with the splits {', '.join(map(str, splits))}; name each as a source "
            f"of its own with its `split`, such as `path: {first}`"
        )


def _is_listed(file: str) -> bool:
    state = _read_json(join(folder_of(file), STATE))
    if state is None:
        return True
    names = [one.get("filename") for one in state.get("_data_files") or [] if isinstance(one, dict)]
    return file.partition("?")[0].rpartition("/")[2] in names


def _read_json(uri: str) -> dict[str, Any] | None:
    """The object in a small file that `save_to_disk` wrote, or None if there is no such file."""
    fs, path = filesystem(uri)
    if fs.get_file_info(path).type != pafs.FileType.File:
        return None
    return read_object(uri, "save the dataset again")


def _open(file: str) -> pa.NativeFile:
    """Local files are mapped, so that cutting touches no pixel."""
    try:
        return open_file(file) if is_remote(file) else pa.memory_map(file.removeprefix("file://"))
    except OSError as error:
        raise CorpusError(f"{file}: cannot be read: {' '.join(str(error).split())}") from error


def _schema(stream: pa.NativeFile, file: str) -> pa.Schema:
    try:
        return pa.ipc.read_schema(pa.ipc.read_message(stream))
    except (pa.ArrowException, EOFError, OSError) as error:
        raise CorpusError(f"{file}: not an Arrow stream as `save_to_disk` writes it: {error}") from error


def _next_batch(stream: pa.NativeFile, schema: pa.Schema, file: str) -> pa.RecordBatch | None:
    """The next record batch, None at the end."""
    try:
        message = pa.ipc.read_message(stream)
        if message.type != "record batch":
            raise CorpusError(f"{file}: holds a {message.type}; save the dataset without dictionary-encoded columns")
        return pa.ipc.read_record_batch(message, schema)
    except EOFError:
        return None
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(f"{file}: cut short or damaged: {' '.join(str(error).split())}") from error
