"""What ingest keeps of each unit until all are read: small Parquet files in the run's `.ingest` folder.

    rows-N      one line per good row: who it is and the ids of its sides, no payload
    items-N     the items its rows name, each once per unit
    images-N    their pictures, each once per unit
    rejects-N   the rows that cannot be used
    paths-N     the picture files looked at, with size and time, so that a changed file is noticed later

Every unit is written by one worker on its own, whole or again: a task that runs twice leaves the same files.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from unime_ray.artifacts import filesystem, join
from unime_ray.config import CorpusConfig, Source
from unime_ray.corpus.files import is_remote, picture_stamp
from unime_ray.corpus.readers import read_unit
from unime_ray.corpus.records import Record, Reject
from unime_ray.corpus.resolve import Entry, Resolved, Resolver
from unime_ray.corpus.units import Unit
from unime_ray.schemas import FLOATS, ID, IDS, IMAGES, ITEMS, REJECTS

FLUSH_BYTES = 32 * 2**20

ROWS = pa.schema(
    [
        ("unit", pa.int32()),
        ("source_index", pa.int32()),
        ("source", pa.string()),
        ("row", pa.int64()),
        ("dataset", pa.string()),
        ("split", pa.string()),
        ("meta_task", pa.string()),
        ("row_id", pa.string()),
        ("query_id", ID),
        ("positive_ids", IDS),
        ("relevances", FLOATS),
        ("negative_ids", IDS),
        ("negative_scores", FLOATS),
        ("positive_score", pa.float32()),
        ("candidate_ids", IDS),
        ("item_id", ID),
    ]
)
PATHS = pa.schema([("path", pa.string()), ("size", pa.int64()), ("mtime_ns", pa.int64())])


@dataclass(frozen=True, slots=True)
class UnitSummary:
    """What a unit came to; `image_bytes` is the size of its pictures."""

    number: int
    rows: int
    rejected: int
    image_bytes: int
    has_candidates: bool


def staged(folder: str, table: str, number: int) -> str:
    """Where a unit's file of `table` lies."""
    return join(folder, f"{table}-{number:06d}.parquet")


def read_staged(folder: str, table: str, number: int, columns: list[str] | None = None) -> pa.Table:
    """One staged table of a unit."""
    fs, path = filesystem(staged(folder, table, number))
    return pq.read_table(path, filesystem=fs, columns=columns)


def stage_unit(
    number: int, source_index: int, unit: Unit, source: Source, corpus: CorpusConfig, folder: str
) -> UnitSummary:
    """Read, check and write one unit."""
    resolver = Resolver(corpus)
    rejects: list[Reject] = []
    rows: list[dict[str, Any]] = []
    with _Payload(number, folder) as payload:
        for found in resolver.resolve_all(read_unit(unit, source, corpus)):
            if isinstance(found, Reject):
                rejects.append(found)
            else:
                payload.add(found)
                rows.append(_row(found, number, source_index))
    paths = [(path, *picture_stamp(path)) for path in sorted(resolver.paths) if not is_remote(path)]
    _write(staged(folder, "rows", number), pa.Table.from_pylist(rows, ROWS))
    _write(staged(folder, "rejects", number), pa.Table.from_pylist([asdict(one) for one in rejects], REJECTS))
    _write(staged(folder, "paths", number), _paths_table(paths))
    has_candidates = any(row["candidate_ids"] is not None for row in rows)
    return UnitSummary(number, len(rows), len(rejects), payload.image_bytes, has_candidates)


def _row(resolved: Resolved, number: int, source_index: int) -> dict[str, Any]:
    record = resolved.record
    return {
        "unit": number,
        "source_index": source_index,
        "source": record.source,
        "row": record.row,
        "dataset": record.dataset,
        "split": record.split,
        "meta_task": record.meta_task,
        "row_id": record.row_id,
        "query_id": None if resolved.query is None else resolved.query.item_id,
        "positive_ids": _ids(resolved.positives),
        "relevances": list(record.relevances),
        "negative_ids": _ids(resolved.negatives),
        "negative_scores": list(record.negative_scores),
        "positive_score": record.positive_score,
        "candidate_ids": None if resolved.candidates is None else _ids(resolved.candidates),
        "item_id": None if resolved.item is None else resolved.item.item_id,
    }


def _ids(entries: Iterable[Entry]) -> list[bytes]:
    return [entry.item_id for entry in entries]


def _paths_table(paths: list[tuple[str, int, int]]) -> pa.Table:
    columns = zip(*paths, strict=True) if paths else ([], [], [])
    return pa.table([pa.array(list(column)) for column in columns] if paths else list(columns), schema=PATHS)


def _write(uri: str, table: pa.Table) -> None:
    fs, path = filesystem(uri)
    pq.write_table(table, path, filesystem=fs)


class _Payload:
    """Writes the items and pictures of a unit as they come, holding about `FLUSH_BYTES` of texts and pictures."""

    def __init__(self, number: int, folder: str) -> None:
        self._writers = {name: _writer(staged(folder, name, number), schema) for name, schema in _PAYLOAD.items()}
        self._buffers: dict[str, list[dict[str, Any]]] = {name: [] for name in _PAYLOAD}
        self._seen_items: set[bytes] = set()
        self._seen_images: set[bytes] = set()
        self._pending = 0
        self.image_bytes = 0

    def __enter__(self) -> _Payload:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        for writer in self._writers.values():
            writer.close()

    def add(self, resolved: Resolved) -> None:
        for entry in resolved.entries():
            if entry.item_id not in self._seen_items:
                self._seen_items.add(entry.item_id)
                self._buffers["items"].append(_item_row(entry, resolved.record))
                self._pending += len(entry.rendered)
            picture = entry.picture
            if picture is not None and picture.data is not None and picture.image_id not in self._seen_images:
                self._seen_images.add(picture.image_id)
                size = {"width": picture.width, "height": picture.height}
                self._buffers["images"].append(
                    {"image_id": picture.image_id, "bytes": picture.data, "path": None, **size}
                )
                self._pending += len(picture.data)
                self.image_bytes += len(picture.data)
        if self._pending > FLUSH_BYTES:
            self._flush()

    def _flush(self) -> None:
        for name, schema in _PAYLOAD.items():
            if self._buffers[name]:
                self._writers[name].write_table(pa.Table.from_pylist(self._buffers[name], schema))
                self._buffers[name] = []
        self._pending = 0


_PAYLOAD = {"items": ITEMS, "images": IMAGES}


def _item_row(entry: Entry, record: Record) -> dict[str, Any]:
    return {
        "item_id": entry.item_id,
        "rendered": entry.rendered,
        "instruction": entry.instruction,
        "text": entry.text,
        "image_id": None if entry.picture is None else entry.picture.image_id,
        "source": record.source,
    }


def _writer(uri: str, schema: pa.Schema) -> pq.ParquetWriter:
    # Pictures are compressed already, ids do not compress: no codec, no dictionary.
    fs, path = filesystem(uri)
    return pq.ParquetWriter(path, schema, filesystem=fs, compression="none", use_dictionary=False)
