"""Writers of corpora: one class a format. Each is given whole records, whose pictures are bytes.

    parquet       pairs.parquet and pool.parquet, pictures inside (or one file, if the path ends in .parquet)
    jsonl         pairs.jsonl, pool.jsonl and images/<hash>.<extension>
    webdataset    pairs-000000.tar ..., pool-000000.tar ..., one sample a row
    mmeb_train    <split>.jsonl in VLM2Vec's columns, one line a positive, with the first negative if there is one
    unime_json    <split>.json in UniME-V2's layout, one object a positive, with all negatives and their scores

Every one is read again by the format of the same name. The last two hold no pool rows: those are refused. A split whose
name is no plain file name (`../x`, `a/b`) goes to `split-<hash>`; its rows name it.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from unime_ray.artifacts import filesystem, join
from unime_ray.config import nearest
from unime_ray.corpus.images import extension
from unime_ray.corpus.records import Record, Side
from unime_ray.errors import ConfigError
from unime_ray.ids import image_id, show
from unime_ray.prompts import render

FLUSH_BYTES, FLUSH_ROWS = 32 * 2**20, 512
SHARD_BYTES, SHARD_ROWS = 512 * 2**20, 10_000
MAX_SPLITS = 100
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SIDE = pa.struct([("text", pa.string()), ("image", IMAGE), ("instruction", pa.string())])
_NAMES = [("id", pa.string()), ("dataset", pa.string()), ("split", pa.string())]
PAIRS = pa.schema(
    [
        *_NAMES,
        ("query_text", pa.string()),
        ("query_image", IMAGE),
        ("query_instruction", pa.string()),
        ("pos_text", pa.list_(pa.string())),
        ("pos_image", pa.list_(IMAGE)),
        ("pos_instruction", pa.list_(pa.string())),
        ("relevance", pa.list_(pa.float64())),
        ("negatives", pa.list_(SIDE)),
        ("negative_scores", pa.list_(pa.float64())),
        ("positive_score", pa.float64()),
        ("candidates", pa.list_(SIDE)),
    ]
)
POOL = pa.schema([*_NAMES, ("text", pa.string()), ("image", IMAGE), ("instruction", pa.string())])


class Writer:
    """Base of the writers: a context that closes what was opened. `write` takes one record."""

    def __init__(self, out: str) -> None:
        self.out = out
        self._open = ExitStack()
        self._streams: dict[str, Any] = {}

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.finish()
        self._open.close()

    def write(self, record: Record) -> None:
        raise TypeError(f"{type(self).__name__} writes no rows")

    def finish(self) -> None:
        """Write what is left."""

    def stream(self, name: str) -> Any:
        """The file `name` in the folder, opened once.

        Raises:
            ConfigError: too many are open, one a split.
        """
        if name not in self._streams:
            if len(self._streams) >= MAX_SPLITS:
                raise ConfigError(f"{self.out}: more than {MAX_SPLITS} splits, each a file; write parquet instead")
            fs, path = filesystem(join(self.out, *name.split("/")))
            fs.create_dir(path.rpartition("/")[0], recursive=True)
            self._streams[name] = self._open.enter_context(fs.open_output_stream(path))
        return self._streams[name]

    def close(self, name: str) -> None:
        """Close the file `name`: nothing more comes."""
        self._streams.pop(name).close()


class PictureFiles:
    """Writes each picture once as images/<hash>.<extension> and says under which name."""

    def __init__(self, out: str) -> None:
        self._out = out
        self._names: dict[bytes, str] = {}

    def of(self, side: Side) -> str | None:
        """The name of a side's picture."""
        return self.name(side.image) if isinstance(side.image, bytes) else None

    def name(self, data: bytes | None, key: bytes | None = None) -> str | None:
        """The name of a picture; `key` is its id, if that is known or not the hash of these bytes."""
        if data is None:
            return None
        key = image_id(data) if key is None else key
        if key not in self._names:
            name = f"images/{show(key)}.{extension(data)}"
            fs, path = filesystem(join(self._out, *name.split("/")))
            fs.create_dir(path.rpartition("/")[0], recursive=True)
            with fs.open_output_stream(path) as stream:
                stream.write(data)
            self._names[key] = name
        return self._names[key]


def row_of(record: Record, picture: Any) -> dict[str, Any]:
    """A record under the default names of columns; `picture(side)` is what stands for a side's picture."""

    def full(side: Side) -> dict[str, Any]:
        return {"text": side.text, "image": picture(side), "instruction": side.instruction}

    row: dict[str, Any] = {"id": record.row_id, "dataset": record.dataset, "split": record.split}
    if record.item is not None:
        return row | full(record.item)
    query, positives = record.query or Side(), record.positives
    row |= {"query_text": query.text, "query_image": picture(query), "query_instruction": query.instruction}
    row |= {
        "pos_text": [side.text for side in positives],
        "pos_image": [picture(side) for side in positives],
        "pos_instruction": [side.instruction for side in positives],
        "relevance": list(record.relevances),
        "negatives": [full(side) for side in record.negatives],
        "negative_scores": list(record.negative_scores),
        "positive_score": record.positive_score,
    }
    return row | {"candidates": None if record.candidates is None else [full(side) for side in record.candidates]}


class ParquetWriter(Writer):
    """Parquet in the Hugging Face layout; row groups are flushed at a bounded size."""

    def __init__(self, out: str) -> None:
        super().__init__(out)
        self._rows: dict[str, list[dict[str, Any]]] = {"pairs": [], "pool": []}
        self._files: dict[str, pq.ParquetWriter] = {}
        self._bytes = 0

    def write(self, record: Record) -> None:
        self._rows[record.role].append(row_of(record, _struct))
        self._bytes += sum(len(side.image) for side in record.sides() if isinstance(side.image, bytes))
        if self._bytes > FLUSH_BYTES or len(self._rows[record.role]) >= FLUSH_ROWS:
            self.finish()

    def finish(self) -> None:
        for role, rows in self._rows.items():
            if rows:
                self._file(role).write_table(pa.Table.from_pylist(rows, POOL if role == "pool" else PAIRS))
                self._rows[role] = []
        self._bytes = 0

    def _file(self, role: str) -> pq.ParquetWriter:
        if role not in self._files:
            single = self.out.partition("?")[0].endswith(".parquet")
            if single and self._files:
                raise ConfigError(f"{self.out}: pairs and pool rows have other columns; give a folder")
            uri = self.out if single else join(self.out, f"{role}.parquet")
            fs, path = filesystem(uri)
            fs.create_dir(path.rpartition("/")[0], recursive=True)
            made = pq.ParquetWriter(path, POOL if role == "pool" else PAIRS, filesystem=fs)
            self._files[role] = self._open.enter_context(made)
        return self._files[role]


def _struct(side: Side) -> dict[str, Any] | None:
    return {"bytes": side.image, "path": None} if isinstance(side.image, bytes) else None


class JsonlWriter(Writer):
    """JSON lines with the pictures beside them."""

    def __init__(self, out: str) -> None:
        super().__init__(out)
        self._pictures = PictureFiles(out)

    def write(self, record: Record) -> None:
        self._line(f"{record.role}.jsonl", row_of(record, self._pictures.of))

    def _line(self, name: str, row: dict[str, Any]) -> None:
        kept = {key: value for key, value in row.items() if value not in (None, [])}
        self.stream(name).write(json.dumps(kept, ensure_ascii=False).encode() + b"\n")


class MmebWriter(JsonlWriter):
    """VLM2Vec's training columns; an empty string is no picture."""

    def write(self, record: Record) -> None:
        _needs_pairs(record, "mmeb_train")
        negative = record.negatives[0] if record.negatives else Side()
        for place, positive in enumerate(record.positives):
            names = {"dataset": record.dataset, "split": record.split, "id": _part_id(record, place)}
            sides = (
                ("qry", "qry", record.query or Side()),
                ("pos_text", "pos", positive),
                ("neg_text", "neg", negative),
            )
            row: dict[str, Any] = {}
            for text, picture, side in sides:
                row |= {text: fused(side), f"{picture}_image_path": self._pictures.of(side) or ""}
            self._line(f"{split_file(record.split)}.jsonl", row | names)


class UnimeWriter(JsonlWriter):
    """UniME-V2's list of objects."""

    def write(self, record: Record) -> None:
        _needs_pairs(record, "unime_json")
        query, name = record.query or Side(), f"{split_file(record.split)}.json"
        for positive in record.positives:
            row = {
                "query_text": fused(query),
                "query_image": self._pictures.of(query) or "",
                "pos_text": fused(positive),
                "pos_image": self._pictures.of(positive) or "",
                "query_pos_scores": record.positive_score,
                "hard_negatives": [[fused(side), self._pictures.of(side) or ""] for side in record.negatives],
                "hard_negatives_scores": list(record.negative_scores),
                "dataset": record.dataset,
                "split": record.split,
            }
            started = name in self._streams
            self.stream(name).write((b",\n" if started else b"[\n") + json.dumps(row, ensure_ascii=False).encode())

    def finish(self) -> None:
        for stream in self._streams.values():
            stream.write(b"\n]\n")


class WebDatasetWriter(Writer):
    """Shards of samples: a JSON row, and its pictures as members that it names."""

    def __init__(self, out: str) -> None:
        super().__init__(out)
        self._shards: dict[str, _Shard] = {}

    def write(self, record: Record) -> None:
        shard = self._shards.get(record.role)
        if shard is None or shard.rows >= SHARD_ROWS or shard.size >= SHARD_BYTES:
            number = 0 if shard is None else shard.number + 1
            if shard is not None:
                self._end(shard)
            name = f"{record.role}-{number:06d}.tar"
            archive = tarfile.open(fileobj=self.stream(name), mode="w|")  # noqa: SIM115 - `_end` closes it
            shard = self._shards[record.role] = _Shard(number, name, archive)
        shard.add(record)

    def finish(self) -> None:
        for shard in self._shards.values():
            self._end(shard)

    def _end(self, shard: _Shard) -> None:
        shard.archive.close()
        self.close(shard.name)


class _Shard:
    def __init__(self, number: int, name: str, archive: tarfile.TarFile) -> None:
        self.number, self.name, self.archive = number, name, archive
        self.rows = self.size = 0

    def add(self, record: Record) -> None:
        members: dict[str, bytes] = {}

        def picture(side: Side) -> str | None:
            if not isinstance(side.image, bytes):
                return None
            name = f"{show(image_id(side.image))}.{extension(side.image)}"
            members[name] = side.image
            return name

        row = {key: value for key, value in row_of(record, picture).items() if value not in (None, [])}
        key = f"{self.rows:08d}"
        for name, data in [("json", json.dumps(row, ensure_ascii=False).encode()), *members.items()]:
            member = tarfile.TarInfo(f"{key}.{name}")
            member.size = len(data)
            self.archive.addfile(member, io.BytesIO(data))
            self.size += len(data)
        self.archive.members = []  # type: ignore[attr-defined]
        self.rows += 1


WRITERS: dict[str, type[Writer]] = {
    "parquet": ParquetWriter,
    "jsonl": JsonlWriter,
    "webdataset": WebDatasetWriter,
    "mmeb_train": MmebWriter,
    "unime_json": UnimeWriter,
}
"""Writer by `format`."""


def open_writer(fmt: str, out: str) -> Writer:
    """The writer of a format into the folder `out`.

    Raises:
        ConfigError: there is none.
    """
    if fmt not in WRITERS:
        raise ConfigError(f"format {fmt!r} cannot be written{nearest(fmt, WRITERS)}")
    return WRITERS[fmt](out)


def split_file(split: str) -> str:
    """A file name for a split, which the corpus may call what it likes; of its own for every split."""
    if PLAIN_NAME.fullmatch(split) and split != "rejects" and not split.startswith("split-"):
        return split
    return f"split-{hashlib.blake2b(split.encode(), digest_size=8).hexdigest()}"


def fused(side: Side) -> str:
    """Instruction and text as one, with the marker where the picture goes; empty for a side that is not there."""
    there = side.text is not None or side.image is not None
    return render(side.text, side.image is not None, side.instruction) if there else ""


def _part_id(record: Record, place: int) -> str | None:
    """Unique within the file, as ids must be."""
    if record.row_id is None or len(record.positives) == 1:
        return record.row_id
    return f"{record.row_id}#{place}"


def _needs_pairs(record: Record, fmt: str) -> None:
    if record.role == "pool":
        raise ConfigError(f"format `{fmt}` holds queries only, and the corpus has pool rows; add --pairs-only")
