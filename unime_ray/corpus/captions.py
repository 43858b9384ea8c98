"""Pictures with several captions each, whatever file names them: rows in either direction, and their work units.

`i2t`: a picture is the query, all its captions are its positives. `t2i`: each caption is a query for its picture.
Both together become two datasets, `<name>_i2t` and `<name>_t2i`, since each direction searches a pool of its own.
An annotation file is read whole, by each process once, and must stay below `MAX_BYTES`; the pictures are streamed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from unime_ray.artifacts import filesystem
from unime_ray.config import Columns, Source
from unime_ray.corpus.files import open_file, stem
from unime_ray.corpus.records import Record, Reject
from unime_ray.corpus.rows import record_of
from unime_ray.corpus.units import STAGE, Unit
from unime_ray.errors import CorpusError, RejectedRow

MAX_BYTES = 2**30
DIRECTIONS = {"i2t": ("i2t",), "t2i": ("t2i",), "both": ("i2t", "t2i"), None: ("i2t", "t2i")}


@dataclass(frozen=True, slots=True)
class Captioned:
    """A picture (its file name, path or bytes) with its captions; `problem` says why the entry cannot be used."""

    image: str | bytes
    captions: Sequence[Any]
    name: str
    split: str | None = None
    problem: str | None = None


Load = Callable[[str], Sequence[Captioned]]


@dataclass(frozen=True)
class CaptionReader:
    """The reader of a format whose `load` gives every picture of an annotation file with its captions."""

    load: Load

    def cut(self, file: str, source: Source, rows_per_task: int) -> Iterator[Unit]:
        """Units of whole pictures; `start` and `stop` count them from 0."""
        total = len(self.load(file))
        for start in range(0, total, rows_per_task):
            stop = min(start + rows_per_task, total)
            yield Unit(file, start, stop, start + 1, stop - start)

    def read(self, unit: Unit, source: Source) -> Iterator[Record | Reject]:
        """The rows of a unit: several per picture, all with the number of the picture."""
        for number, entry in enumerate(self.load(unit.file)[unit.start : unit.stop], unit.first_row):
            yield from caption_records(entry, number, source, unit.file)


def caption_records(entry: Captioned, number: int, source: Source, file: str) -> Iterator[Record | Reject]:
    """The records of one picture in the source's direction (a pool source: its items)."""
    if entry.problem is None and not entry.captions:
        entry = Captioned(entry.image, (), entry.name, problem=f"{entry.name}: no caption for this picture")
    if entry.problem is not None:
        yield Reject(file, number, STAGE, entry.problem)
        return
    plain = source.model_copy(update={"columns": Columns()})
    for row in _rows(entry, source, file):
        try:
            yield record_of(row, number, plain, file)
        except RejectedRow as error:
            yield Reject(file, number, STAGE, f"{entry.name}: {error.reason}")


def _rows(entry: Captioned, source: Source, file: str) -> Iterator[dict[str, Any]]:
    """Rows under the default names of columns."""
    directions = DIRECTIONS[source.direction]
    for direction in directions:
        name = source.dataset or stem(file)
        common = {"dataset": name if len(directions) == 1 else f"{name}_{direction}"}
        if entry.split is not None and source.columns.split is not None:
            common["split"] = entry.split
        numbered = [(f"{entry.name}#{place}", caption) for place, caption in enumerate(entry.captions)]
        if direction == "i2t" and source.role == "pairs":
            yield common | {"id": entry.name, "query_image": entry.image, "pos_text": list(entry.captions)}
        elif direction == "t2i" and source.role == "pool":
            yield common | {"id": entry.name, "image": entry.image}
        elif direction == "t2i":
            yield from (common | {"id": one, "query_text": text, "pos_image": entry.image} for one, text in numbered)
        else:
            yield from (common | {"id": one, "text": text} for one, text in numbered)


def read_whole(file: str) -> bytes:
    """The bytes of an annotation file.

    Raises:
        CorpusError: it is not there, or larger than `MAX_BYTES`.
    """
    with open_file(file) as stream:
        size = stream.size()
        if size > MAX_BYTES:
            raise CorpusError(f"{file}: {size} bytes; an annotation file may have {MAX_BYTES}: split it, or use jsonl")
        return stream.read()


def read_object(file: str, fix: str) -> dict[str, Any]:
    """The one object that a JSON file holds.

    Raises:
        CorpusError: it does not, or is too large to be read whole; the message ends with `fix`.
    """
    try:
        content = json.loads(read_whole(file))
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{file}: not valid JSON: {' '.join(str(error).split())}; {fix}") from error
    if not isinstance(content, dict):
        raise CorpusError(f"{file}: holds {type(content).__name__}, not an object; {fix}")
    return content


def stamp(file: str) -> tuple[int, int]:
    """(bytes, modification time in ns): with the name, the key under which a process keeps what it has read."""
    fs, path = filesystem(file)
    info = fs.get_file_info(path)
    return info.size or 0, info.mtime_ns or 0
