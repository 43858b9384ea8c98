"""WebDataset: tar archives of samples, a picture with its captions each, or a row with pictures beside it.

    0001.jpg  0001.txt                        one caption
    0001.jpg  0001.json {"text": ...}         a caption, or a list of them (`caption` too)
    0001.json {"query_text": ..., "pos_image": "pos.png"}  0001.pos.png
                                              a row as in JSON lines, whose pictures are members of the sample

A row is a sample, counted from 1. The key is the id of a picture with captions; a JSON row has its own or none. See
`tar` for what a sample is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from unime_ray.config import Source
from unime_ray.corpus.captions import Captioned, caption_records
from unime_ray.corpus.records import Record, Reject
from unime_ray.corpus.rows import NESTED, record_of
from unime_ray.corpus.tar import Archive, Sample, member_of
from unime_ray.corpus.units import STAGE, Unit
from unime_ray.errors import CorpusError, RejectedRow

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "jp2", "ppm")
TEXTS = ("txt", "text", "caption")


def cut(file: str, source: Source, rows_per_task: int) -> Iterator[Unit]:
    """Units of whole samples; `start` and `stop` are byte offsets. Only headers are read."""
    with Archive(file) as archive:
        if not archive.size:
            raise CorpusError(f"{file}: the archive is empty")
        start, first_row, rows, stop = 0, 1, 0, 0
        for sample in archive.samples():
            start = sample.start if not rows else start
            rows, stop = rows + 1, sample.stop
            if rows == rows_per_task:
                yield Unit(file, start, stop, first_row, rows)
                first_row, rows = first_row + rows, 0
        if rows:
            yield Unit(file, start, stop, first_row, rows)


def read(unit: Unit, source: Source) -> Iterator[Record | Reject]:
    """The rows of a unit, a sample at a time."""
    last = unit.first_row + unit.num_rows - 1
    with Archive(unit.file) as archive:
        for number, sample in enumerate(archive.samples(unit.start), unit.first_row):
            try:
                yield from _records(sample, archive, number, source, unit.file)
            except RejectedRow as error:
                yield Reject(unit.file, number, STAGE, error.reason)
            if number == last:
                return


def _records(sample: Sample, archive: Archive, number: int, source: Source, file: str) -> Iterator[Record | Reject]:
    if sample.problem is not None:
        raise RejectedRow(f"sample {sample.key!r}: {sample.problem}" if sample.key else sample.problem)
    row = _json(sample, archive) if "json" in sample.members else {}
    if _is_row(row, sample, source):
        yield record_of(_with_pictures(row, sample, archive, source), number, source, file)
        return
    pictures = [name for name in PICTURES if name in sample.members]
    if len(pictures) != 1:
        raise RejectedRow(f"sample {sample.key!r} has {len(pictures)} pictures ({', '.join(PICTURES[:4])}, ...), not 1")
    captions = _captions(row, sample, archive, source)
    split = row.get(source.columns.split) if source.columns.split is not None else None
    entry = Captioned(archive.read(sample, pictures[0]), captions, sample.key, split=split)
    yield from caption_records(entry, number, source, file)


def _json(sample: Sample, archive: Archive) -> dict[str, Any]:
    try:
        row = json.loads(archive.read(sample, "json").decode())
    except (ValueError, RecursionError) as error:
        raise RejectedRow(f"member '{sample.key}.json' is not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise RejectedRow(f"member '{sample.key}.json' holds {type(row).__name__}, not an object {{...}}")
    return row


def _is_row(row: Mapping[str, Any], sample: Sample, source: Source) -> bool:
    """Whether the JSON is a row of its own and no mere caption."""
    columns = source.columns
    if source.role == "pairs":
        return any(
            name in row for name in (columns.query_text, columns.query_image, columns.pos_text, columns.pos_image)
        )
    return columns.image in row or (columns.text in row and not any(name in sample.members for name in PICTURES))


def _with_pictures(row: dict[str, Any], sample: Sample, archive: Archive, source: Source) -> dict[str, Any]:
    """The row with the bytes of members where it names pictures; each is read once, however often it is named."""
    held: dict[str, bytes] = {}

    def filled(value: Any) -> Any:
        if isinstance(value, list):
            return [filled(one) for one in value]
        if not isinstance(value, str):
            return None if value is None else value
        name = value.lower()
        if name and name not in held:
            held[name] = archive.read(sample, member_of(sample, name))
        return held[name] if name else None

    def side(entry: Any) -> Any:
        if isinstance(entry, Mapping) and "image" in entry:
            return {**entry, "image": filled(entry["image"])}
        return [entry[0], filled(entry[1])] if isinstance(entry, list) and len(entry) == 2 else entry

    columns = source.columns
    names = [name for name in (columns.query_image, columns.pos_image, columns.image) if name in row]
    found = row | {name: filled(row[name]) for name in names if name is not None}
    lists = [name for name in (NESTED[0], NESTED[3]) if isinstance(row.get(name), list)]
    return found | {name: [side(entry) for entry in row[name]] for name in lists}


def _captions(row: Mapping[str, Any], sample: Sample, archive: Archive, source: Source) -> list[Any]:
    for name in TEXTS:
        if name in sample.members:
            try:
                return [archive.read(sample, name).decode("utf-8-sig")]
            except UnicodeDecodeError as error:
                raise RejectedRow(f"member '{sample.key}.{name}' is not valid UTF-8 at byte {error.start}") from error
    for key in (source.columns.text, "caption", "captions"):
        if row.get(key or "") is not None:
            found = row[key or ""]
            return found if isinstance(found, list) else [found]
    raise RejectedRow(f"sample {sample.key!r} has no caption: no member {' or '.join(TEXTS)}, none in its json")
