"""JSON lines, one object a line, UTF-8; pictures as paths."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator

from unime_ray.config import Source
from unime_ray.corpus.files import open_file
from unime_ray.corpus.records import Record, Reject
from unime_ray.corpus.rows import MakeRecord, record_of
from unime_ray.corpus.units import STAGE, Unit
from unime_ray.errors import CorpusError, RejectedRow

READ_BYTES = 2**22
MAX_LINE_BYTES = 2**26
BOM = b"\xef\xbb\xbf"


def cut(file: str, source: Source, rows_per_task: int) -> Iterator[Unit]:
    """Units of whole lines; `start` and `stop` are byte offsets. Rows are numbered as lines, from 1.

    Raises:
        CorpusError: a line is longer than `MAX_LINE_BYTES`: it would have to be held whole.
    """
    start, first_row, lines, offset = 0, 1, 0, 0
    for line in _lines(file, 0, None):
        offset += len(line)
        lines += 1
        check_line(line, first_row + lines - 1, file)
        if lines == rows_per_task:
            yield Unit(file, start, offset, first_row, lines)
            start, first_row, lines = offset, first_row + lines, 0
    if lines:
        yield Unit(file, start, offset, first_row, lines)


def read(
    unit: Unit, source: Source, make: MakeRecord = record_of, names: Collection[str | None] | None = None
) -> Iterator[Record | Reject]:
    """The rows of a unit; blank lines are skipped. `names` is for formats of columns: a line is parsed whole."""
    for number, line in enumerate(_lines(unit.file, unit.start, unit.stop), unit.first_row):
        if number == 1:
            line = line.removeprefix(BOM)
        if line.strip():
            yield _record(line, number, source, unit.file, make)


def _record(line: bytes, number: int, source: Source, file: str, make: MakeRecord) -> Record | Reject:
    try:
        row = json.loads(line.decode())
        if not isinstance(row, dict):
            raise RejectedRow(f"the line holds {type(row).__name__}, not an object {{...}}")
        return make(row, number, source, file)
    except RejectedRow as error:
        reason = error.reason
    except UnicodeDecodeError as error:
        reason = f"not valid UTF-8 at byte {error.start} of the line"
    except json.JSONDecodeError as error:
        reason = f"not valid JSON: {error.msg} at character {error.colno}"
    except (ValueError, RecursionError) as error:
        reason = f"not usable JSON: {error}"
    return Reject(file, number, STAGE, reason)


def check_line(line: bytes, number: int, file: str) -> None:
    """Raise CorpusError if `line` is too long to be held."""
    if len(line) > MAX_LINE_BYTES:
        raise CorpusError(f"{file}: line {number} is longer than {MAX_LINE_BYTES} bytes; is it another format?")


def _lines(file: str, start: int, stop: int | None) -> Iterator[bytes]:
    """Lines with their line end, from byte `start` to `stop` (None: the end of the file)."""
    with open_file(file) as stream:
        stream.seek(start)
        left = (stream.size() if stop is None else stop) - start
        pending = b""
        while left > 0 and (chunk := stream.read(min(READ_BYTES, left))):
            left -= len(chunk)
            *whole, pending = (pending + chunk).split(b"\n")
            for line in whole:
                yield line + b"\n"
            if len(pending) > MAX_LINE_BYTES:
                break  # no need to look for its end
        if pending:
            yield pending
