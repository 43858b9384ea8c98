"""`validate_corpus`: the verdict of ingest, without running it."""

from __future__ import annotations

import json

import pytest

from unime_ray.config import CorpusConfig, Source
from unime_ray.corpus.validate import validate_corpus
from unime_ray.errors import CorpusError


@pytest.fixture
def corpus(tmp_path, tiny_pictures) -> CorpusConfig:
    (tmp_path / "red.png").write_bytes(tiny_pictures["red"])
    rows = [{"id": str(n % 9), "query_text": f"q{n}", "pos_image": "red.png"} for n in range(10)]
    rows[4]["pos_image"] = "gone.png"
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "pool.jsonl").write_text('{"text": "x", "split": "test"}\n')
    pairs = Source(format="jsonl", path=str(tmp_path / "pairs.jsonl"))
    pool = Source(format="jsonl", path=str(tmp_path / "pool.jsonl"), role="pool")
    return CorpusConfig(sources=(pairs, pool), max_error_rate=0.2)


def test_counts_and_reasons(corpus):
    report = validate_corpus(corpus)
    assert report.rows == 11 and report.ok
    assert report.counts == {("pairs", "train", "pairs"): 8, ("pool", "test", "pool"): 1}
    assert [(one.row, one.reason.split(":")[1][:18]) for one in report.rejects[:1]] == [(5, " picture not found")]
    assert report.rejects[1].reason.startswith("duplicate id '0'")
    text = report.render()
    assert "11 rows read, 2 bad; corpus.max_error_rate is 20.0%" in text and "the corpus can be used" in text


def test_a_corpus_that_ingest_would_refuse(corpus):
    report = validate_corpus(corpus.model_copy(update={"max_error_rate": 0.1}))
    assert not report.ok and report.render().endswith("the corpus cannot be used")


def test_a_limit_reads_the_first_rows_of_each_source(corpus):
    report = validate_corpus(corpus, limit=3)
    assert report.rows == 4 and not report.rejects
    assert "at most 3 a source" in report.render()


def test_a_corpus_without_training_pairs_is_warned_of(corpus):
    sources = (corpus.sources[1],)
    assert "nothing to mine or train on" in validate_corpus(corpus.model_copy(update={"sources": sources})).render()


def test_a_missing_source_is_an_error(tmp_path):
    source = Source(format="csv", path=str(tmp_path / "gone.csv"))
    with pytest.raises(CorpusError, match="no such file"):
        validate_corpus(CorpusConfig(sources=(source,)))
