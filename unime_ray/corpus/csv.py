"""CSV (commas) and TSV (tabs) with a header, UTF-8; pictures as paths. Quoted fields may hold line breaks."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from unime_ray.config import Source
from unime_ray.corpus.files import open_file
from unime_ray.corpus.jsonl import MAX_LINE_BYTES, check_line
from unime_ray.corpus.records import Record, Reject
from unime_ray.corpus.rows import record_of
from unime_ray.corpus.units import STAGE, Unit, check_columns
from unime_ray.errors import CorpusError, RejectedRow

BUFFER_BYTES = 2**20


class _Lines:
    """Decoded lines of a file from byte `start` on; `offset` is the byte after the last one handed out.

    The csv reader takes lines only as it needs them, so after each record `offset` is where the next one begins.
    Bytes that are no UTF-8 become lone surrogates, which `read` recognises.
    """

    def __init__(self, file: str, start: int) -> None:
        self._stream = io.BufferedReader(open_file(file), BUFFER_BYTES)  # type: ignore[type-var]
        self._stream.seek(start)
        self._file, self.offset = file, start

    def __iter__(self) -> Iterator[str]:
        number = 0
        while line := self._stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            check_line(line, number, self._file)
            self.offset += len(line)
            yield line.decode("utf-8", "surrogateescape")


def cut(file: str, source: Source, rows_per_task: int) -> Iterator[Unit]:
    """Units of whole records; `start` and `stop` are byte offsets. Rows are numbered as records after the header."""
    lines = _Lines(file, 0)
    records = _records(lines, file)
    header, _ = next(records, (None, None))
    if not header:
        raise CorpusError(f"{file}: the file is empty; the first line must name the columns")
    check_columns(source, _names(header), file)
    start, first_row, rows = lines.offset, 1, 0
    for _ in records:
        rows += 1
        if rows == rows_per_task:
            yield Unit(file, start, lines.offset, first_row, rows)
            start, first_row, rows = lines.offset, first_row + rows, 0
    if rows:
        yield Unit(file, start, lines.offset, first_row, rows)


def read(unit: Unit, source: Source) -> Iterator[Record | Reject]:
    """The rows of a unit."""
    header, _ = next(_records(_Lines(unit.file, 0), unit.file))
    names = _names(header or [])
    lines = _Lines(unit.file, unit.start)
    for number, (fields, reason) in enumerate(_records(lines, unit.file), unit.first_row):
        if number == unit.first_row + unit.num_rows:
            return
        if fields is None:
            yield Reject(unit.file, number, STAGE, reason or "")
        else:
            yield _record(fields, names, number, source, unit.file)


def _record(fields: list[str], names: list[str], number: int, source: Source, file: str) -> Record | Reject:
    if len(fields) != len(names):
        return Reject(file, number, STAGE, f"the row has {len(fields)} fields, the header {len(names)}")
    try:
        "".join(fields).encode()
        return record_of(dict(zip(names, fields, strict=True)), number, source, file)
    except UnicodeEncodeError:
        return Reject(file, number, STAGE, "text is not valid UTF-8")
    except RejectedRow as error:
        return Reject(file, number, STAGE, error.reason)


def _records(lines: _Lines, file: str) -> Iterator[tuple[list[str] | None, str | None]]:
    """(fields, None), or (None, reason) for a record the csv module refuses; blank lines are skipped."""
    delimiter = "\t" if file.partition("?")[0].lower().endswith(".tsv") else ","
    reader = csv.reader(lines, delimiter=delimiter)
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield None, f"not valid CSV: {error} (is a quote left open?)"
            continue
        if fields:
            yield fields, None


def _names(header: list[str]) -> list[str]:
    return [name.removeprefix("\ufeff").strip() for name in header]
