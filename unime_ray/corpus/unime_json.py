"""UniME-V2's published hard-negative JSON (data/ of GaryGuTC/UniME-v2): one list of objects, read and written.

    {"query_text", "query_image" ("" if none), "pos_text", "pos_image", "query_pos_scores": float,
     "hard_negatives": [[text, image_path], ...], "hard_negatives_scores": [float, ...]}

Their texts fuse instruction and text and hold the marker `<|image_1|>`; `rendered` is exactly that, so what is
exported and read again keeps its ids. A file may be larger than memory: it is cut at object boundaries.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads

from unime_ray.artifacts import Run, filesystem
from unime_ray.config import Source
from unime_ray.corpus.files import folder_of, open_file
from unime_ray.corpus.payload import Item, PayloadStore
from unime_ray.corpus.records import Record, Reject
from unime_ray.corpus.rows import record_of, scores_of, sides_of
from unime_ray.corpus.units import STAGE, Unit
from unime_ray.corpus.writers import PictureFiles
from unime_ray.errors import CorpusError, RejectedRow

READ_BYTES = 2**20
MAX_OBJECT_CHARS = 2**26
UNIT_BYTES = 2**28
EXPORT_ROWS = 256
BLANK = " \t\r\n,"
DECODER = json.JSONDecoder()


def cut(file: str, source: Source, rows_per_task: int) -> Iterator[Unit]:
    """Units of whole objects, no more than `UNIT_BYTES` and an object; `start` and `stop` are byte offsets."""
    start, first_row, rows, stop = 0, 1, 0, 0
    for begin, stop in _spans(file):
        start = begin if not rows else start
        rows += 1
        if rows == rows_per_task or stop - start >= UNIT_BYTES:
            yield Unit(file, start, stop, first_row, rows)
            first_row, rows = first_row + rows, 0
    if rows:
        yield Unit(file, start, stop, first_row, rows)


def read(unit: Unit, source: Source) -> Iterator[Record | Reject]:
    """The rows of a unit."""
    with open_file(unit.file) as stream:
        stream.seek(unit.start)
        text = stream.read(unit.stop - unit.start).decode()
    at, number = 0, unit.first_row
    while at < len(text):
        row, at = DECODER.raw_decode(text, at)
        try:
            yield _record(row, number, source, unit.file)
        except RejectedRow as error:
            yield Reject(unit.file, number, STAGE, error.reason)
        at, number = _skip(text, at), number + 1


def _record(row: Any, number: int, source: Source, file: str) -> Record:
    if not isinstance(row, dict):
        raise RejectedRow(f"the entry is {type(row).__name__}, not an object {{...}}")
    root = source.image_root or folder_of(file)
    negatives = sides_of(row.get("hard_negatives") or [], "hard_negatives", source.pos_instruction, root)
    scores = scores_of(row.get("hard_negatives_scores") or [], "hard_negatives_scores")
    if scores and len(scores) != len(negatives):
        raise RejectedRow(f"{len(negatives)} hard_negatives but {len(scores)} hard_negatives_scores")
    positive_score = row.get("query_pos_scores")
    return replace(
        record_of(row, number, source, file),
        negatives=negatives,
        negative_scores=scores,
        positive_score=None if positive_score is None else scores_of([positive_score], "query_pos_scores")[0],
    )


def _spans(file: str) -> Iterator[tuple[int, int]]:
    """(first byte, byte after the last) of every object of the list.

    Raises:
        CorpusError: the file is no JSON list, is not UTF-8, or ends within it.
    """
    with open_file(file) as stream:
        window, row = _Window(stream, file), 0
        if window.peek() != "[":
            raise CorpusError(f"{file}: not a JSON list; for one object a line use `format: jsonl`")
        window.step(1)
        while (char := window.peek()) != "]":
            if not char:
                raise CorpusError(f"{file}: the JSON list ends after row {row} without its closing bracket: cut short?")
            row += 1
            yield window.value(row)


class _Window:
    """The part of a file that is being looked at; `offset` is the byte offset of the next character."""

    def __init__(self, stream: pa.NativeFile, file: str) -> None:
        self._stream, self._file = stream, file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at, self._ended = "", 0, False
        self.offset = 0
        self.peek()
        if self._text.startswith("\ufeff"):
            self.step(1)

    def peek(self) -> str:
        """The next character that is neither white space nor a comma, without taking it; empty at the end."""
        while True:
            self.step(_skip(self._text, self._at) - self._at)
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._more()

    def step(self, characters: int) -> None:
        """Take so many characters."""
        self.offset += len(self._text[self._at : self._at + characters].encode())
        self._at += characters

    def value(self, row: int) -> tuple[int, int]:
        """Take one JSON value; its first byte and the byte after its last."""
        start = self.offset
        while True:
            try:
                _, end = DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._ended or len(self._text) - self._at > MAX_OBJECT_CHARS:
                    raise CorpusError(f"{self._file}: row {row} is not valid JSON: {error.msg}") from error
            except (ValueError, RecursionError) as error:  # an integer too long to be one, or nested too deep
                raise CorpusError(f"{self._file}: row {row} is not usable JSON: {error}") from error
            else:
                if end < len(self._text) or self._ended:  # else a bare number might go on
                    self.step(end - self._at)
                    return start, self.offset
            self._more()

    def _more(self) -> None:
        """Look further; twice as far each time, so that a huge object is not parsed too often."""
        self._text, self._at = self._text[self._at :], 0
        chunk = self._stream.read(max(READ_BYTES, len(self._text)))
        self._ended = not chunk
        try:
            self._text += self._decoder.decode(chunk, final=self._ended)
        except UnicodeDecodeError as error:
            raise CorpusError(f"{self._file}: not valid UTF-8: {error.reason}") from error


def _skip(text: str, at: int) -> int:
    """The next position that holds neither white space nor a comma."""
    while at < len(text) and text[at] in BLANK:
        at += 1
    return at


def export_unime_json(run: Run, judge: str, out_dir: str | Path) -> int:
    """Write `hard_negatives/<judge>` as `out_dir`/hard_negatives.json with its pictures in `out_dir`/images.

    Returns:
        The number of rows written.

    Raises:
        ArtifactError: the run has no hard negatives of that judge.
    """
    table = run.artifact("hard_negatives", judge)
    table.require()
    store = PayloadStore(run.artifact("images").data_uri, run.artifact("items").data_uri)
    out = str(out_dir)
    target_fs, target = filesystem(out)
    target_fs.create_dir(target, recursive=True)
    fs, path = filesystem(table.data_uri)
    written, rows, pictures = 0, pads.dataset(path, filesystem=fs, format="parquet"), PictureFiles(out)
    with target_fs.open_output_stream(f"{target}/hard_negatives.json") as stream:
        stream.write(b"[")
        for batch in rows.to_batches(batch_size=EXPORT_ROWS):
            for row in _export_rows(batch, store, pictures):
                stream.write(b",\n" if written else b"\n")
                stream.write(json.dumps(row, ensure_ascii=False).encode())
                written += 1
        stream.write(b"\n]\n")
    return written


def _export_rows(batch: pa.RecordBatch, store: PayloadStore, pictures: PictureFiles) -> Iterator[dict[str, Any]]:
    rows = batch.to_pylist()
    ids = {row[key] for row in rows for key in ("query_id", "positive_id")}
    ids |= {negative for row in rows for negative in row["negative_ids"]}
    items = {item.item_id: item for item in store.items(sorted(ids))}

    def name(item: Item) -> str:
        return pictures.name(item.image, item.image_id) or ""

    for row in rows:
        query, positive = items[row["query_id"]], items[row["positive_id"]]
        yield {
            "query_text": query.rendered,
            "query_image": name(query),
            "pos_text": positive.rendered,
            "pos_image": name(positive),
            "query_pos_scores": row["positive_score"],
            "hard_negatives": [[items[one].rendered, name(items[one])] for one in row["negative_ids"]],
            "hard_negatives_scores": row["negative_scores"],
        }
