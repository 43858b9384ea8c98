"""From one row of a source, a mapping of column to value, to a `Record`: the same for Parquet, JSONL and CSV.

Nothing is opened here: values are checked for their types and laid out, pictures become bytes or resolved paths.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from unime_ray.config import Source
from unime_ray.corpus.files import check_unicode, folder_of, resolve_picture, stem
from unime_ray.corpus.records import Record, Side
from unime_ray.errors import RejectedRow

NESTED = ("negatives", "negative_scores", "positive_score", "candidates")
"""Columns of fixed name that a pairs row may have besides those that `columns` maps."""

MEAN = "mean"
"""What results call the mean over datasets: no dataset may be called so."""
MAX_NAME_CHARS = 500
"""Of an id, a dataset's or a split's name."""
LARGEST = 3.4e38
"""What float32, as which numbers are stored, still holds."""

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
"""A terminal would obey them, and a name is printed in many places."""

MakeRecord = Callable[[Mapping[str, Any], int, Source, str], Record]
"""How a format makes a record: (row, its number from 1, source, file); raises RejectedRow. See `record_of`."""


def record_of(row: Mapping[str, Any], number: int, source: Source, file: str) -> Record:
    """The record of row `number` (from 1) of `file`.

    Raises:
        RejectedRow: a value has the wrong type, a side is empty, or lists do not fit together.
    """
    columns = source.columns
    common: dict[str, Any] = {
        "source": file,
        "row": number,
        "role": source.role,
        "dataset": _name(row, columns.dataset) or source.dataset or stem(file),
        "split": _name(row, columns.split) or source.split,
        "meta_task": source.meta_task,
        "row_id": _row_id(row, columns.id),
    }
    if common["dataset"] == MEAN:
        raise RejectedRow(f"a dataset called {MEAN!r}: results have the mean under this name; set `dataset`")
    root = source.image_root or folder_of(file)
    if source.role == "pool":
        fallback = source.pos_instruction
        names = (columns.text, columns.image, columns.instruction)
        item = _side([_value(row, name) for name in names], names, fallback, root)
        return Record(**common, item=_filled(item, "item", names, row))
    names = (columns.query_text, columns.query_image, columns.query_instruction)
    query = _side([_value(row, name) for name in names], names, source.query_instruction, root)
    positives = _positives(row, source, root)
    return Record(
        **common,
        query=_filled(query, "query", names, row),
        positives=positives,
        relevances=_relevances(row, columns.relevance, len(positives)),
        **_nested(row, source, root),
    )


def _positives(row: Mapping[str, Any], source: Source, root: str) -> tuple[Side, ...]:
    """One positive, or one per entry where text or picture is a list (several captions of a picture)."""
    columns = source.columns
    names = (columns.pos_text, columns.pos_image, columns.pos_instruction)
    values = [_value(row, name) for name in names]
    lengths = {len(value) for value in values if isinstance(value, list)}
    if len(lengths) > 1:
        raise RejectedRow(f"lists of {' and '.join(map(str, sorted(lengths)))} entries in {_columns(names)}")
    count = lengths.pop() if lengths else 1
    if count == 0:
        raise RejectedRow(f"no positive: {_columns(names)} holds an empty list")
    spread = [value if isinstance(value, list) else [value] * count for value in values]
    sides = (_side(entry, names, source.pos_instruction, root) for entry in zip(*spread, strict=True))
    return tuple(_filled(side, "positive", names, row) for side in sides)


def _relevances(row: Mapping[str, Any], name: str | None, count: int) -> tuple[float, ...]:
    value = _value(row, name)
    if value is None:
        return (1.0,) * count
    values = [_number(entry, str(name)) for entry in (value if isinstance(value, list) else [value] * count)]
    if len(values) != count:
        raise RejectedRow(f"{name!r} has {len(values)} entries for {count} positives")
    if min(values) <= 0:
        raise RejectedRow(
            f"{name!r} is {min(values)}; a positive's relevance is above 0 (others belong into `negatives`)"
        )
    return tuple(values)


def _nested(row: Mapping[str, Any], source: Source, root: str) -> dict[str, Any]:
    """`negatives` with their scores and `candidates`, if the row has them."""
    negatives = sides_of(row.get("negatives") or [], "negatives", source.pos_instruction, root)
    scores = scores_of(row.get("negative_scores") or [], "negative_scores")
    positive_score = row.get("positive_score")
    candidates = row.get("candidates")
    if scores and len(scores) != len(negatives):
        raise RejectedRow(f"{len(negatives)} negatives but {len(scores)} negative_scores")
    return {
        "negatives": negatives,
        "negative_scores": scores,
        "positive_score": None if positive_score in (None, "") else scores_of([positive_score], "positive_score")[0],
        "candidates": sides_of(candidates, "candidates", source.pos_instruction, root) if candidates else None,
    }


def sides_of(entries: Any, name: str, instruction: str | None, root: str) -> tuple[Side, ...]:
    """Sides from a list of texts, `[text, picture]` pairs or `{text, image, instruction}` mappings.

    Raises:
        RejectedRow: an entry has another shape or is empty.
    """
    if not isinstance(entries, list):
        raise RejectedRow(f"{name!r} is {_kind(entries)}, not a list")
    sides = []
    for position, entry in enumerate(entries, 1):
        where = (f"{name}[{position}]",) * 3
        if isinstance(entry, str):
            entry = [entry, None]
        if isinstance(entry, Mapping):
            values: Sequence[Any] = [entry.get(key) for key in ("text", "image", "instruction")]
        elif isinstance(entry, (list, tuple)) and len(entry) == 2:
            values = [*entry, None]
        else:
            raise RejectedRow(f"{where[0]} is {_kind(entry)}, not a text, a [text, picture] pair or a mapping")
        sides.append(_filled(_side(values, where, instruction, root), where[0], (), {}))
    return tuple(sides)


def scores_of(values: Any, name: str) -> tuple[float, ...]:
    """Judge scores, each in [0, 1].

    Raises:
        RejectedRow: not a list of numbers in that range.
    """
    if not isinstance(values, list):
        raise RejectedRow(f"{name!r} is {_kind(values)}, not a list")
    scores = tuple(_number(value, name) for value in values)
    if any(not 0.0 <= score <= 1.0 for score in scores):
        raise RejectedRow(f"{name!r} holds a score outside [0, 1]")
    return scores


def _side(values: Sequence[Any], names: Sequence[str | None], default: str | None, root: str) -> Side:
    """A side from its (text, picture, instruction); `names` are what these are called in a reason."""
    return Side(
        text=_text(values[0], names[0]),
        image=_image(values[1], names[1], root),
        instruction=_text(values[2], names[2]) or default,
    )


def _filled(side: Side, what: str, names: Sequence[str | None], row: Mapping[str, Any]) -> Side:
    if side.text is not None or side.image is not None:
        return side
    looked = [name for name in names[:2] if name is not None]
    if looked and not any(name in row for name in looked):
        keys = ", ".join(str(key) for key in list(row)[:12])
        raise RejectedRow(f"{what} is empty: the row has no {_columns(looked)}; it has {keys}. Set `columns`")
    raise RejectedRow(f"{what} is empty: neither text nor picture")


def _value(row: Mapping[str, Any], name: str | None) -> Any:
    return None if name is None else row.get(name)


def _text(value: Any, name: str | None) -> str | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, str):
        raise RejectedRow(f"{name!r} is {_kind(value)}, not text")
    return value.strip()


def _image(value: Any, name: str | None, root: str) -> bytes | str | None:
    """Encoded bytes, or a resolved path. Hugging Face's struct holds either."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if value is None or value == "" or value == b"":
        return None
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return resolve_picture(value, root)
    raise RejectedRow(f"{name!r} is {_kind(value)}, not a path, bytes or struct<bytes, path>")


def _name(row: Mapping[str, Any], name: str | None) -> str | None:
    """What a dataset or a split is called."""
    value = _label(row, name)
    if CONTROL.search(value or ""):
        raise RejectedRow(f"{name!r} holds a control character")
    return value


def _label(row: Mapping[str, Any], name: str | None) -> str | None:
    value = _text(_value(row, name), name)
    if value is not None and len(value) > MAX_NAME_CHARS:
        raise RejectedRow(f"{name!r} has {len(value)} characters; a name may have {MAX_NAME_CHARS}")
    check_unicode(value or "", repr(name))
    return value


def _row_id(row: Mapping[str, Any], name: str | None) -> str | None:
    value = _value(row, name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _label(row, name)


def _number(value: Any, name: str) -> float:
    """A finite float; CSV gives numbers as text."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError as error:
            raise RejectedRow(f"{name!r} is {value[:40]!r}, not a number") from error
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RejectedRow(f"{name!r} is {_kind(value)}, not a finite number")
    if not -LARGEST <= value <= LARGEST:  # neither is a NaN
        shown = "an integer too large" if isinstance(value, int) else str(value)
        raise RejectedRow(f"{name!r} is {shown}, not a finite number")
    return float(value)


def _columns(names: Sequence[str | None]) -> str:
    return " or ".join(repr(name) for name in names if name is not None)


def _kind(value: Any) -> str:
    return f"{value}" if isinstance(value, float) else type(value).__name__
