"""What was written to the index over the API: an append-only log in Lance, the truth that every index is derived from.

A row is a put or a delete of an id; the last row of an id counts. A write is acknowledged after Lance has committed it,
so that it is there after the process is killed. Row numbers never change: compaction merges files and keeps their
order. Each put carries its vector and the revision of the model that made it; one of another revision is not searched,
but embedded again.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa

from unime_ray.artifacts import Run, filesystem
from unime_ray.corpus.lance_io import lance_location, open_lance
from unime_ray.corpus.payload import Item

LOG = pa.schema(
    [
        pa.field("op", pa.string(), nullable=False),  # put, delete
        pa.field("id", pa.string(), nullable=False),
        pa.field("item_id", pa.binary(16)),
        pa.field("rendered", pa.string()),
        pa.field("text", pa.string()),
        pa.field("image_id", pa.binary(16)),
        pa.field("image", pa.large_binary()),
        pa.field("dataset", pa.string()),
        pa.field("split", pa.string()),
        pa.field("revision", pa.string()),
        pa.field("embedding", pa.list_(pa.float32())),
    ]
)
PUT, DELETE = "put", "delete"
LIGHT = [name for name in LOG.names if name not in ("image", "text", "rendered")]
COMPACT_EVERY = 200


@dataclass(frozen=True, slots=True)
class LogRow:
    """One row of the log without its payload. `row` is its number, for ever."""

    row: int
    op: str
    id: str
    item_id: bytes | None = None
    image_id: bytes | None = None
    dataset: str = ""
    split: str = ""
    revision: str = ""
    vector: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Put:
    """One item to write: `id` as its user calls it, its content, where it belongs and its vector."""

    id: str
    item: Item
    dataset: str
    split: str
    revision: str
    vector: np.ndarray


class LiveLog:
    """The log of one run. Several processes may append and read; each sees others' rows at its next `read_from`."""

    def __init__(self, run: Run) -> None:
        self.uri = run.child("serve", "live.lance")
        self._lock = threading.Lock()
        self._dataset: lance.LanceDataset | None = None
        self._appends = 0

    def append_puts(self, puts: Sequence[Put]) -> None:
        """Write items; they are durable when this returns."""
        rows = [
            {
                "op": PUT,
                "id": put.id,
                "item_id": put.item.item_id,
                "rendered": put.item.rendered,
                "text": put.item.text,
                "image_id": put.item.image_id,
                "image": put.item.image,
                "dataset": put.dataset,
                "split": put.split,
                "revision": put.revision,
                "embedding": put.vector.tolist(),
            }
            for put in puts
        ]
        self._append(pa.Table.from_pylist(rows, LOG))

    def append_deletes(self, ids: Sequence[str]) -> None:
        """Write deletions; they are durable when this returns."""
        self._append(pa.Table.from_pylist([{"op": DELETE, "id": name} for name in ids], LOG))

    def read_from(self, start: int) -> list[LogRow]:
        """The rows from number `start` on, without payload."""
        dataset = self._latest()
        if dataset is None:
            return []
        table = dataset.to_table(columns=LIGHT, offset=start) if dataset.count_rows() > start else None
        if table is None:
            return []
        rows = []
        for number, value in enumerate(table.to_pylist(), start):
            vector = value.pop("embedding")
            array = None if vector is None else np.asarray(vector, np.float32)
            rows.append(LogRow(row=number, vector=array, **{k: v for k, v in value.items() if v is not None}))
        return rows

    def items(self, rows: Sequence[int], pictures: bool = True) -> list[Item]:
        """The payload of put rows, in order; rows may repeat. `pictures` False: `image` is None."""
        if not rows:
            return []
        dataset = self._dataset if self._dataset is not None else self._latest()
        if dataset is None or max(rows) >= dataset.count_rows():
            dataset = self._latest()
        assert dataset is not None, f"{self.uri}: rows were handed out, so the log is there"
        unique = list(dict.fromkeys(rows))
        columns = ["item_id", "rendered", "text", "image_id", *(["image"] if pictures else [])]
        taken = dict(zip(unique, dataset.take(unique, columns=columns).to_pylist(), strict=True))
        return [Item(**{"image": None} | taken[row]) for row in rows]

    def _append(self, table: pa.Table) -> None:
        base, options = lance_location(self.uri)
        with self._lock:
            fs, path = filesystem(self.uri)
            fs.create_dir(str(Path(path).parent), recursive=True)
            self._dataset = lance.write_dataset(table, base, mode="append", storage_options=options)
            self._appends += 1
            if self._appends % COMPACT_EVERY == 0:
                self._dataset.optimize.compact_files()
                self._dataset = open_lance(self.uri)

    def _latest(self) -> lance.LanceDataset | None:
        """The dataset as last committed by anyone, or None if nothing was ever written."""
        with self._lock:
            if self._dataset is None:
                fs, path = filesystem(self.uri)
                if not fs.get_file_info(path).is_file and not fs.get_file_info(f"{path}/_versions").type:
                    return None
                self._dataset = open_lance(self.uri)
            elif self._dataset.latest_version != self._dataset.version:
                self._dataset = open_lance(self.uri)
            return self._dataset
