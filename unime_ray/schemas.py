"""The tables of a run: one declared Arrow schema each, and the cast that holds a stage to it.

Ids are content hashes of 16 bytes, so equal items are one item. See `ids` for how they are made. Every stage casts
its input and its output to the schema declared here: an all-null column would otherwise become type `null` and the
folder would no longer read back as one table.
"""

from __future__ import annotations

import pyarrow as pa

from unime_ray.errors import ArtifactError

SCHEMA_VERSION = 1

ID = pa.binary(16)
IDS = pa.list_(ID)
FLOATS = pa.list_(pa.float32())


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


IMAGES = pa.schema(
    [
        _required("image_id", ID),
        pa.field("bytes", pa.large_binary()),  # encoded picture as it came in (or re-encoded by the image policy)
        pa.field("path", pa.string()),
        _required("width", pa.int32()),
        _required("height", pa.int32()),
    ]
)
ITEMS = pa.schema(
    [
        _required("item_id", ID),
        _required("rendered", pa.string()),
        pa.field("instruction", pa.string()),
        pa.field("text", pa.string()),
        pa.field("image_id", ID),
        _required("source", pa.string()),
    ]
)
QRELS = pa.schema(
    [
        _required("dataset", pa.string()),
        _required("split", pa.string()),
        _required("query_id", ID),
        _required("item_id", ID),
        _required("relevance", pa.float32()),
    ]
)
POOLS = pa.schema(
    [
        _required("dataset", pa.string()),
        _required("split", pa.string()),
        _required("item_id", ID),
    ]
)
EVAL_CANDIDATES = pa.schema(
    [
        _required("dataset", pa.string()),
        _required("split", pa.string()),
        _required("query_id", ID),
        _required("candidate_ids", IDS),
    ]
)
CANDIDATES = pa.schema(
    [
        _required("query_id", ID),
        _required("candidate_ids", IDS),
        _required("similarities", FLOATS),
        _required("positive_ids", IDS),
        _required("positive_similarities", FLOATS),
    ]
)
JUDGEMENTS = pa.schema(
    [
        _required("query_id", ID),
        _required("candidate_id", ID),
        _required("is_positive", pa.bool_()),
        pa.field("logit_yes", pa.float32()),
        pa.field("logit_no", pa.float32()),
        pa.field("score", pa.float32()),
        pa.field("error", pa.string()),
    ]
)
HARD_NEGATIVES = pa.schema(
    [
        _required("query_id", ID),
        _required("positive_id", ID),
        _required("positive_score", pa.float32()),
        _required("negative_ids", IDS),
        _required("negative_scores", FLOATS),
        _required("negative_similarities", FLOATS),
        _required("negative_reasons", pa.list_(pa.string())),
    ]
)
DUPLICATES = pa.schema(
    [
        pa.field("item_id", ID),  # of method `embedding`
        pa.field("image_id", ID),  # of method `phash`
        _required("group_id", ID),  # the smallest id of the group
        _required("method", pa.string()),
        _required("distance", pa.float32()),  # to the nearest member: bits of 64, or 1 - cosine
    ]
)
REJECTS = pa.schema(
    [
        _required("source", pa.string()),
        _required("row", pa.int64()),
        _required("stage", pa.string()),
        _required("reason", pa.string()),
    ]
)
METRICS = pa.schema(
    [
        _required("dataset", pa.string()),
        _required("split", pa.string()),
        pa.field("meta_task", pa.string()),
        _required("model", pa.string()),
        _required("stage", pa.string()),
        _required("metric", pa.string()),
        _required("value", pa.float64()),
        pa.field("low", pa.float64()),
        pa.field("high", pa.float64()),
        _required("queries", pa.int64()),
    ]
)

TABLES: dict[str, pa.Schema] = {
    "images": IMAGES,
    "items": ITEMS,
    "qrels": QRELS,
    "pools": POOLS,
    "eval_candidates": EVAL_CANDIDATES,
    "candidates": CANDIDATES,
    "judgements": JUDGEMENTS,
    "hard_negatives": HARD_NEGATIVES,
    "duplicates": DUPLICATES,
    "rejects": REJECTS,
    "metrics": METRICS,
}
"""Every table by name, but `embeddings`, whose width belongs to the model: see `embeddings_schema`."""


def embeddings_schema(dim: int, half: bool = False) -> pa.Schema:
    """Schema of `embeddings` for vectors of `dim` numbers, unit norm, float32 or (`half`) float16."""
    value = pa.float16() if half else pa.float32()
    return pa.schema([_required("item_id", ID), _required("embedding", pa.list_(value, dim))])


def teacher_schema(width: int) -> pa.Schema:
    """Schema of `teacher`: texts with a sentence embedder's vectors of `width` numbers, float32, unit norm."""
    vector = pa.field("vector", pa.list_(pa.float32(), width), nullable=False)
    return pa.schema([_required("text_id", ID), _required("text", pa.string()), vector])


def conform(table: pa.Table, schema: pa.Schema, name: str = "table") -> pa.Table:
    """`table` with exactly the columns, order and types of `schema`; nullable columns may be missing.

    Raises:
        ArtifactError: a required column is missing or holds nulls, a column is unknown, or a value does not fit.
    """
    unknown = sorted(set(table.column_names) - set(schema.names))
    if unknown:
        raise ArtifactError(f"{name}: unknown column {unknown[0]!r}; the schema has {', '.join(schema.names)}")
    columns = []
    for field in schema:
        if field.name not in table.column_names:
            if not field.nullable:
                raise ArtifactError(f"{name}: required column {field.name!r} is missing")
            columns.append(pa.nulls(table.num_rows, field.type))
            continue
        columns.append(_conform_column(table.column(field.name), field, name))
    return pa.Table.from_arrays(columns, schema=schema)


def _conform_column(column: pa.ChunkedArray, field: pa.Field, name: str) -> pa.ChunkedArray:
    try:
        column = column.cast(field.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ArtifactError(f"{name}: column {field.name!r} cannot be read as {field.type}: {error}") from error
    if not field.nullable and column.null_count:
        raise ArtifactError(f"{name}: required column {field.name!r} holds {column.null_count} nulls")
    return column
