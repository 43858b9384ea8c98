"""Reading a source in parts: `work_units` cuts its files, `read_unit` streams the rows of one part.

A unit is a range of one file that a worker can read on its own: bytes of text files and archives, row groups of
Parquet. Cutting reads text files once (to find where rows begin), only the headers of archives and only the footers of
Parquet; no row is kept in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import pyarrow as pa

from unime_ray.config import CorpusConfig, Source
from unime_ray.corpus import coco, csv, flickr30k, hf_dataset, jsonl, mmeb, parquet, unime_json, webdataset
from unime_ray.corpus.captions import CaptionReader
from unime_ray.corpus.files import corpus_root, shown_name, source_files
from unime_ray.corpus.records import Record, Reject
from unime_ray.corpus.units import STAGE, Unit
from unime_ray.errors import CorpusError

FORMATS: dict[str, ModuleType | CaptionReader] = {
    "parquet": parquet,
    "jsonl": jsonl,
    "csv": csv,
    "unime_json": unime_json,
    "webdataset": webdataset,
    "mmeb_train": mmeb,
    "mmeb_eval": mmeb,
    "hf_dataset": hf_dataset,
    "coco": coco.READER,
    "flickr30k": flickr30k.READER,
}
"""Reader by `format`: what has `cut` and `read`, a module or a `CaptionReader`."""


def work_units(source: Source, rows_per_task: int) -> list[Unit]:
    """Cut the files of a source into units of about `rows_per_task` rows, in order.

    Raises:
        CorpusError: no files, an unreadable one, or `columns` names a column that a file's header does not have.
    """
    reader = FORMATS[source.format]
    return [unit for file in source_files(source) for unit in reader.cut(file, source, rows_per_task)]


def read_unit(unit: Unit, source: Source, corpus: CorpusConfig) -> Iterator[Record | Reject]:
    """Every row of a unit, as a record or as the reason why it is none. Files are named as `shown_name` does.

    A part of the file that cannot be read at all (a damaged row group, a disk error) gives one reject for each of its
    rows, so that the counts still add up.
    """
    row, name = unit.first_row - 1, shown_name(unit.file, corpus_root(corpus))
    try:
        for found in FORMATS[source.format].read(unit, source):
            row = found.row
            yield replace(found, source=name)
    except (OSError, pa.ArrowException, CorpusError) as error:
        reason = f"cannot be read: {' '.join(str(error).split())[:200]}"
        for lost in range(row + 1, unit.first_row + unit.num_rows):
            yield Reject(name, lost, STAGE, reason)
