"""VLM2Vec's rows (MMEB), in Parquet or JSON lines. Texts fuse instruction and text and hold the marker `<|image_1|>`.

    mmeb_train   qry, qry_image_path, pos_text, pos_image_path, neg_text, neg_image_path     (a negative is optional)
    mmeb_eval    qry_text, qry_img_path, tgt_text [..], tgt_img_path [..]                    (the gold comes first)

An empty string is no picture. `columns` maps only `id`, `dataset` and `split`. Files named like shards
(`test-00000-of-00001.parquet`) belong to the dataset that their folder is named after.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from unime_ray.config import Columns, Source
from unime_ray.corpus import jsonl, parquet
from unime_ray.corpus.files import SUFFIXES, folder_of, stem
from unime_ray.corpus.records import Record, Reject
from unime_ray.corpus.rows import record_of
from unime_ray.corpus.units import Unit
from unime_ray.errors import RejectedRow

TRAIN = ("qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path")
EVAL = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")
SHARD = re.compile(r"-\d+-of-\d+$")


def cut(file: str, source: Source, rows_per_task: int) -> Iterator[Unit]:
    """Units as those of the file's own format."""
    return _reader(file).cut(file, _plain(source, file), rows_per_task)


def read(unit: Unit, source: Source) -> Iterator[Record | Reject]:
    """The rows of a unit."""
    names = {*TRAIN, *EVAL, source.columns.id, source.columns.dataset, source.columns.split}
    plain, make = _plain(source, unit.file), _eval_record if source.format == "mmeb_eval" else _train_record
    return _reader(unit.file).read(unit, plain, make=make, names=names)


def _reader(file: str) -> ModuleType:
    return jsonl if file.partition("?")[0].lower().endswith(SUFFIXES["jsonl"]) else parquet


def _plain(source: Source, file: str) -> Source:
    """The source with default columns, but for those that every format may map."""
    kept = {key: getattr(source.columns, key) for key in source.columns.model_fields_set & {"id", "dataset", "split"}}
    name = folder_of(file).partition("?")[0].rpartition("/")[2] if SHARD.search(stem(file)) else None
    return source.model_copy(update={"columns": Columns(**kept), "dataset": source.dataset or name or None})


def _train_record(row: Mapping[str, Any], number: int, source: Source, file: str) -> Record:
    _check(row, TRAIN[:4])
    negative = [row.get("neg_text"), row.get("neg_image_path")]
    found = _common(row, source) | {
        "query_text": row.get("qry"),
        "query_image": row.get("qry_image_path"),
        "pos_text": row.get("pos_text"),
        "pos_image": row.get("pos_image_path"),
        "negatives": [negative] if any(_filled(value) for value in negative) else [],
    }
    return record_of(found, number, source, file)


def _eval_record(row: Mapping[str, Any], number: int, source: Source, file: str) -> Record:
    _check(row, EVAL)
    texts, pictures = (row.get(name) for name in EVAL[2:])
    if not isinstance(texts, list) or not isinstance(pictures, list) or len(texts) != len(pictures):
        raise RejectedRow("'tgt_text' and 'tgt_img_path' are not two lists of the same length")
    if not texts:
        raise RejectedRow("the candidate list is empty")
    if not _filled(texts[0]) and not _filled(pictures[0]):
        raise RejectedRow("the candidate list lacks its gold: the first entry is empty")
    found = _common(row, source) | {
        "query_text": row.get("qry_text"),
        "query_image": row.get("qry_img_path"),
        "pos_text": texts[0],
        "pos_image": pictures[0],
        "candidates": [list(pair) for pair in zip(texts, pictures, strict=True)],
    }
    return record_of(found, number, source, file)


def _common(row: Mapping[str, Any], source: Source) -> dict[str, Any]:
    names = (source.columns.id, source.columns.dataset, source.columns.split)
    return {name: row[name] for name in names if name is not None and name in row}


def _check(row: Mapping[str, Any], names: tuple[str, ...]) -> None:
    missing = [name for name in names if name not in row]
    if len(missing) == len(names) or missing[:1] == [names[0]]:
        keys = ", ".join(str(key) for key in list(row)[:12])
        raise RejectedRow(f"the row has no {missing[0]!r}; it has {keys}. Is it another format?")


def _filled(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_filled(value.get(key)) for key in ("bytes", "path"))
    return bool(value.strip() if isinstance(value, str) else value)
