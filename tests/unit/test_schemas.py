"""Schemas: a table is cast to its declaration, and what does not fit is named."""

from __future__ import annotations

import pyarrow as pa
import pytest

from unime_ray import ids
from unime_ray.errors import ArtifactError
from unime_ray.schemas import ITEMS, QRELS, TABLES, conform, embeddings_schema

A, B = b"a" * 16, b"b" * 16


def test_an_all_null_column_gets_its_declared_type():
    table = pa.table({"item_id": [A], "rendered": ["x"], "source": ["s"], "image_id": [None]})
    done = conform(table, ITEMS)
    assert done.schema == ITEMS
    assert done.column("image_id").null_count == 1


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"dataset": ["d"], "split": ["s"], "query_id": [A], "item_id": [B]}, "'relevance' is missing"),
        ({"dataset": ["d"], "extra": [1]}, "unknown column 'extra'"),
        ({"dataset": [None], "split": ["s"], "query_id": [A], "item_id": [B], "relevance": [1.0]}, "holds 1 nulls"),
        ({"dataset": ["d"], "split": ["s"], "query_id": [b"short"], "item_id": [B], "relevance": [1.0]}, "'query_id'"),
    ],
)
def test_misfits_are_named(columns, message):
    with pytest.raises(ArtifactError, match=message):
        conform(pa.table(columns), QRELS, "qrels")


def test_embeddings_have_the_width_of_the_model():
    schema = embeddings_schema(3)
    table = pa.table({"item_id": pa.array([A], pa.binary(16)), "embedding": pa.array([[0.0, 0.6, 0.8]])})
    assert conform(table, schema).schema == schema
    wrong = pa.table({"item_id": pa.array([A], pa.binary(16)), "embedding": pa.array([[1.0, 0.0]])})
    with pytest.raises(ArtifactError, match="embedding"):
        conform(wrong, schema)


def test_every_table_survives_an_empty_round_trip():
    for name, schema in TABLES.items():
        assert conform(schema.empty_table(), schema, name).schema == schema


def test_ids_tell_items_apart_by_text_and_picture():
    picture = ids.image_id(b"picture")
    made = {ids.item_id("a", None), ids.item_id("a", picture), ids.item_id("b", picture), ids.item_id("b", None)}
    assert len(made) == 4
    assert ids.item_id("a", picture) == ids.item_id("a", ids.image_id(b"picture"))
    assert len(ids.show(picture)) == 32
