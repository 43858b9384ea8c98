"""The part of a file that one worker reads."""

from __future__ import annotations

from dataclasses import dataclass

from unime_ray.config import Columns, Source, nearest
from unime_ray.errors import CorpusError

STAGE = "ingest"
"""What `rejects.stage` says of rows that readers refuse."""


@dataclass(frozen=True, slots=True)
class Unit:
    """`num_rows` rows of `file` from `first_row` (counted from 1) on; `start` and `stop` mean what the format says."""

    file: str
    start: int
    stop: int
    first_row: int
    num_rows: int


def check_columns(source: Source, present: list[str], file: str) -> None:
    """Raise unless every column that the config names on purpose is in the file's header.

    Defaults may be missing: most sources have no `query_instruction`, and none has all columns.

    Raises:
        CorpusError: names the key, the file and the nearest column there is.
    """
    for key in Columns.model_fields:
        name = getattr(source.columns, key)
        if key in source.columns.model_fields_set and name is not None and name not in present:
            raise CorpusError(f"{file}: no column {name!r}{nearest(name, present)} (corpus.sources.columns.{key})")
