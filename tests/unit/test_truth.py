"""The truth table: who is what, and how relevant that is."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unime_ray.corpus.truth import Truth
from unime_ray.errors import CorpusError
from unime_ray.ids import image_id


@pytest.fixture
def folder(tmp_path, tiny_pictures):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "red.png").write_bytes(tiny_pictures["red"])
    items = {"kind": ["image", "text", "text"], "key": ["images/red.png", "red thing", "pink thing"]}
    pq.write_table(pa.table({**items, "hexcode": ["R", "R", "P"]}), tmp_path / "truth_items.parquet")
    truth = {"hexcode_a": ["R"], "hexcode_b": ["P"], "relevance": [0.4]}
    pq.write_table(pa.table(truth), tmp_path / "truth.parquet")
    return tmp_path


def test_the_picture_decides_then_the_exact_text(folder, tiny_pictures):
    truth = Truth.load(str(folder))
    red = image_id(tiny_pictures["red"])
    assert truth.concept(None, red) == truth.concept("pink thing", red) == truth.concept(" red thing\n", None) == "R"
    assert truth.concept("red", None) is None
    assert truth.concept("red thing", b"\0" * 16) is None
    assert truth.concept(None, None) is None


def test_relevance_is_symmetric_and_zero_for_strangers(folder):
    truth = Truth.load(str(folder))
    assert truth.relevance("R", "P") == truth.relevance("P", "R") == pytest.approx(0.4)
    assert truth.relevance("R", "R") == 1.0
    assert truth.relevance("R", "X") == truth.relevance(None, None) == 0.0


def test_missing_tables_and_pictures_are_named(folder, tmp_path):
    (folder / "images" / "red.png").unlink()
    with pytest.raises(CorpusError, match="truth_items.parquet: picture not found"):
        Truth.load(str(folder))
    (folder / "truth.parquet").unlink()
    with pytest.raises(CorpusError, match="truth"):
        Truth.load(str(folder))
