"""Ingest as a whole, on a local Ray: the right tables, every bad row accounted for, redone only when it should be."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from unime_ray.artifacts import Artifact, Run
from unime_ray.config import CorpusConfig, RunConfig, Source
from unime_ray.corpus.lance_io import open_lance
from unime_ray.corpus.payload import PayloadStore
from unime_ray.errors import CorpusError
from unime_ray.ids import image_id, item_id
from unime_ray.stages.ingest import run_ingest

pytestmark = pytest.mark.usefixtures("ray_cluster")
COLORS = ("red", "green", "blue", "yellow", "purple", "orange")


@pytest.fixture
def corpus(tmp_path, tiny_pictures) -> Path:
    """Six pictures; training pairs both ways, a pool with one more picture, and a test split with its own pool."""
    folder = tmp_path / "corpus"
    (folder / "images").mkdir(parents=True)
    for name, data in tiny_pictures.items():
        (folder / "images" / f"{name}.png").write_bytes(data)
    there = [{"id": f"t{c}", "query_text": f"a {c} square", "pos_image": f"images/{c}.png"} for c in COLORS]
    back = [{"id": f"i{c}", "query_image": f"images/{c}.png", "pos_text": f"a {c} square"} for c in COLORS]
    write(folder / "train.jsonl", there + back)
    write(folder / "pool.jsonl", [{"image": f"images/{c}.png"} for c in ("red", "black")])
    write(folder / "test.jsonl", [{"query_text": "grey", "pos_image": "images/gray.png"}])
    write(folder / "test_pool.jsonl", [{"image": "images/gray.png"}, {"image": "images/black.png"}])
    return folder


def write(path: Path, rows: list) -> None:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def config_of(folder: Path, **settings: object) -> RunConfig:
    def source(name: str, **more: object) -> Source:
        return Source(format="jsonl", path=str(folder / name), dataset="colors", **more)

    pool, test = source("pool.jsonl", role="pool"), source("test.jsonl", split="test")
    sources = (source("train.jsonl"), pool, test, source("test_pool.jsonl", role="pool", split="test"))
    return RunConfig(corpus=CorpusConfig(sources=sources, rows_per_task=5, **settings))


def rows_of(artifact: Artifact) -> list[dict]:
    return artifact.read().to_pylist()


def tables(run: Run) -> dict[str, list]:
    """Every table of the run, sorted by its first columns."""
    found: dict[str, list] = {}
    for table in ("images", "items"):
        found[table] = open_lance(run.artifact(table).data_uri).to_table().to_pylist()
    for table in ("qrels", "pools"):
        found[table] = rows_of(run.artifact(table))
    return {name: sorted(rows, key=repr) for name, rows in found.items()}


def test_pairs_and_pools_become_tables_of_distinct_items(corpus, tmp_path, tiny_pictures):
    run = Run(str(tmp_path / "run"))
    manifest = run_ingest(run, config_of(corpus))
    pictures = {name: image_id(tiny_pictures[name]) for name in (*COLORS, "black", "gray")}
    shown = {name: item_id("<|image_1|>\n", image) for name, image in pictures.items()}
    said = {color: item_id(f"a {color} square", None) for color in COLORS}
    found = tables(run)
    assert sorted(row["image_id"] for row in found["images"]) == sorted(pictures.values())
    assert {(row["width"], row["height"]) for row in found["images"]} == {(16, 16)}
    assert sorted(row["item_id"] for row in found["items"]) == sorted(
        [*shown.values(), *said.values(), item_id("grey", None)]
    )
    expected = {("train", said[c], shown[c]) for c in COLORS} | {("train", shown[c], said[c]) for c in COLORS}
    expected |= {("test", item_id("grey", None), shown["gray"])}
    assert {(row["split"], row["query_id"], row["item_id"]) for row in found["qrels"]} == expected
    train = {row["item_id"] for row in found["pools"] if row["split"] == "train"}
    assert train == {*shown.values(), *said.values()} - {shown["gray"]}  # every positive, the pool, and nothing of test
    test = {row["item_id"] for row in found["pools"] if row["split"] == "test"}
    assert test == {shown["gray"], shown["black"]}
    assert len(found["pools"]) == len(train) + len(test)
    assert manifest.counts["rows"] == 17 and manifest.counts["rejected"] == 0 and manifest.rows == 15
    assert manifest.counts["pairs"] == {"colors/train": 12, "colors/test": 1}
    assert manifest.counts["pool_rows"] == {"colors/train": 2, "colors/test": 2}
    store = PayloadStore(run.artifact("images").data_uri, run.artifact("items").data_uri)
    assert store.items([shown["blue"]])[0].image == tiny_pictures["blue"]
    assert not (tmp_path / "run" / ".ingest" / "units").exists()


BAD_ROWS = [
    ('{"query_text": "q", "pos_image": "images/gone.png"}', "positive: picture not found: "),
    ('{"query_text": "q", "pos_image": "images/cut.png"}', "positive: picture is corrupt or truncated"),
    ('{"query_text": "q", "pos_image": "images/text.png"}', "positive: not a picture in a known format"),
    ('{"query_text": "", "pos_text": "p"}', "query is empty"),
    ('{"query_text": "q", "pos_text": 3}', "'pos_text' is int, not text"),
    ('{"id": "tred", "query_text": "q", "pos_text": "p"}', "duplicate id 'tred'"),
    (
        '{"query_text": "' + "q" * 600 + '", "pos_text": "p"}',
        "query: text has 600 characters; corpus.max_text_chars is 500",
    ),
    ('{"query_text": "half \\ud83d", "pos_text": "p"}', "query: text holds half a surrogate pair"),
    ('{"query_text": "<|image_1|> where?", "pos_text": "p"}', "query: the text holds the image marker"),
    ('{"query_text": "q", "pos_text": "p", "negatives": ["n", "p"]}', "negative 2 is the row's own positive"),
    ("{not json", "not valid JSON"),
]


@pytest.fixture
def broken(corpus, tiny_pictures) -> Path:
    """The corpus with eleven bad rows after its twelve good training rows."""
    (corpus / "images" / "cut.png").write_bytes(tiny_pictures["red"][:50])
    (corpus / "images" / "text.png").write_text("not found")
    with (corpus / "train.jsonl").open("a") as stream:
        stream.writelines(line + "\n" for line, _ in BAD_ROWS)
    return corpus


def test_every_bad_row_has_its_line_in_rejects(broken, tmp_path):
    run = Run(str(tmp_path / "run"))
    manifest = run_ingest(run, config_of(broken, max_error_rate=0.5, max_text_chars=500))
    rejects = rows_of(run.artifact("rejects", "ingest"))
    assert [row["row"] for row in rejects] == list(range(13, 13 + len(BAD_ROWS)))
    for row, (_, reason) in zip(rejects, BAD_ROWS, strict=True):
        assert row["reason"].startswith(reason), row
        assert row["source"] == "train.jsonl" and row["stage"] == "ingest"
    assert manifest.counts["rejected"] == len(BAD_ROWS)
    assert manifest.rows == 15  # nothing of a bad row is left behind
    assert len(tables(run)["images"]) == 8


def test_too_many_bad_rows_fail_and_leave_the_rejects(broken, tmp_path):
    run = Run(str(tmp_path / "run"))
    with pytest.raises(CorpusError) as error:
        run_ingest(run, config_of(broken, max_text_chars=500))
    message = str(error.value)
    assert "11 of 28 rows cannot be used (39.3%; corpus.max_error_rate is 5.0%)" in message
    assert message.count("\n  train.jsonl:") == 10 and f"(files under {broken})" in message
    assert run.artifact("rejects", "ingest").data_uri in message
    assert len(rows_of(run.artifact("rejects", "ingest"))) == len(BAD_ROWS)
    assert run.artifact("items").manifest() is None
    repaired = run_ingest(run, config_of(broken, max_error_rate=0.5, max_text_chars=500))
    assert repaired.counts["rejected"] == len(BAD_ROWS)


def stamp(run: Run, table: str = "items") -> tuple[str, float]:
    manifest = run.artifact(table).require()
    return manifest.fingerprint, os.stat(Path(run.artifact(table).data_uri)).st_mtime


def test_the_same_corpus_is_not_read_twice(corpus, tmp_path, monkeypatch):
    run = Run(str(tmp_path / "run"))
    first = run_ingest(run, config_of(corpus))
    monkeypatch.setattr("unime_ray.stages.ingest._stage", lambda *_: pytest.fail("read again"))
    assert run_ingest(run, config_of(corpus)) == first


def test_a_changed_source_is_noticed_and_only_its_tables_change(corpus, tmp_path):
    run = Run(str(tmp_path / "run"))
    run_ingest(run, config_of(corpus))
    before = {table: stamp(run, table) for table in ("items", "images", "qrels", "pools")}
    write(corpus / "pool.jsonl", [{"image": f"images/{c}.png"} for c in ("red", "black", "gray")])
    run_ingest(run, config_of(corpus))
    changed = {table for table in before if stamp(run, table)[0] != before[table][0]}
    assert changed == {"pools"}  # the picture was known from the test split
    assert stamp(run, "items")[1] == before["items"][1]  # and the payload was not written again


def test_a_changed_or_repaired_picture_is_noticed(corpus, tmp_path, tiny_pictures):
    run = Run(str(tmp_path / "run"))
    (corpus / "images" / "black.png").unlink()
    run_ingest(run, config_of(corpus, max_error_rate=0.5))
    assert len(rows_of(run.artifact("rejects", "ingest"))) == 2
    (corpus / "images" / "black.png").write_bytes(tiny_pictures["black"])
    assert run_ingest(run, config_of(corpus, max_error_rate=0.5)).counts["rejected"] == 0
    assert rows_of(run.artifact("rejects", "ingest")) == []
    (corpus / "images" / "red.png").write_bytes(tiny_pictures["black"])
    run_ingest(run, config_of(corpus, max_error_rate=0.5))
    assert image_id(tiny_pictures["red"]) not in {row["image_id"] for row in tables(run)["images"]}


def test_a_corpus_that_moved_keeps_its_fingerprints(corpus, tmp_path):
    one, two = Run(str(tmp_path / "one")), Run(str(tmp_path / "two"))
    run_ingest(one, config_of(corpus))
    moved = corpus.rename(tmp_path / "elsewhere")
    run_ingest(two, config_of(moved))
    for table in ("items", "images", "qrels", "pools"):
        assert stamp(one, table)[0] == stamp(two, table)[0]


def test_published_negatives_and_candidate_lists_come_along(corpus, tmp_path):
    row = {"query_text": "q", "pos_text": "p", "query_pos_scores": 0.5}
    published = [row | {"hard_negatives": [["n", ""], ["m", ""]], "hard_negatives_scores": [0.25, 0.125]}]
    (corpus / "v2.json").write_text(json.dumps(published))
    write(corpus / "eval.jsonl", [{"query_text": "e", "pos_text": "x", "candidates": ["x", "y"]}])
    sources = (
        Source(format="unime_json", path=str(corpus / "v2.json")),
        Source(format="jsonl", path=str(corpus / "eval.jsonl"), split="test"),
    )
    run = Run(str(tmp_path / "run"))
    run_ingest(run, RunConfig(corpus=CorpusConfig(sources=sources)))
    known = {text: item_id(text, None) for text in "qpnmexy"}
    (imported,) = rows_of(run.artifact("hard_negatives", "imported"))
    assert (imported["query_id"], imported["positive_id"], imported["positive_score"]) == (known["q"], known["p"], 0.5)
    assert imported["negative_ids"] == [known["n"], known["m"]] and imported["negative_scores"] == [0.25, 0.125]
    assert imported["negative_reasons"] == ["imported"] * 2 and imported["negative_similarities"] == [None] * 2
    (listed,) = rows_of(run.artifact("eval_candidates"))
    assert listed["query_id"] == known["e"] and listed["candidate_ids"] == [known["x"], known["y"]]
    assert sorted(row["item_id"] for row in tables(run)["items"]) == sorted(known.values())
    pool = {row["item_id"] for row in tables(run)["pools"] if row["split"] == "train"}
    assert pool == {known[text] for text in "pnm"}
    run_ingest(run, config_of(corpus))  # a corpus that brings neither takes them away
    assert run.artifact("eval_candidates").manifest() is None
    assert run.artifact("hard_negatives", "imported").manifest() is None


def test_a_corpus_of_texts_alone(tmp_path):
    write(tmp_path / "t.jsonl", [{"query_text": f"q{n}", "pos_text": f"p{n}"} for n in range(3)])
    run = Run(str(tmp_path / "run"))
    sources = (Source(format="jsonl", path=str(tmp_path / "t.jsonl")),)
    assert run_ingest(run, RunConfig(corpus=CorpusConfig(sources=sources))).rows == 6
    assert open_lance(run.artifact("images").data_uri).count_rows() == 0
    store = PayloadStore(run.artifact("images").data_uri, run.artifact("items").data_uri)
    assert store.items([item_id("q1", None)])[0].text == "q1"


def test_a_corpus_without_rows_is_an_error(tmp_path):
    (tmp_path / "t.jsonl").write_text("\n\n")
    sources = (Source(format="jsonl", path=str(tmp_path / "t.jsonl")),)
    with pytest.raises(CorpusError, match="hold no rows"):
        run_ingest(Run(str(tmp_path / "run")), RunConfig(corpus=CorpusConfig(sources=sources)))


@pytest.mark.parametrize("moment", ["_check_share", "commit_fragments", "_write_eval_candidates", "remember"])
def test_an_ingest_cut_short_starts_over(corpus, tmp_path, monkeypatch, moment):
    """Nothing cleans up after an interrupt here, so the disk is as after a kill; the same call then finishes."""
    write(corpus / "test.jsonl", [{"query_text": "e", "pos_text": "x", "candidates": ["x", "y"]}])
    run, clean = Run(str(tmp_path / "run")), Run(str(tmp_path / "clean"))

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(f"unime_ray.stages.ingest.{moment}", cut)
        run_ingest(run, config_of(corpus))
    assert list(Path(run.root, ".ingest", "units").iterdir())
    run_ingest(run, config_of(corpus))
    run_ingest(clean, config_of(corpus))
    assert tables(run) == tables(clean)
    assert rows_of(run.artifact("eval_candidates")) == rows_of(clean.artifact("eval_candidates"))


def test_items_lie_in_the_order_of_the_corpus(corpus, tmp_path):
    """However many units they came from: an embed scan reads them and their pictures in sequence."""
    write(corpus / "long.jsonl", [{"text": f"text {n}"} for n in range(40)])
    source = Source(format="jsonl", path=str(corpus / "long.jsonl"), role="pool")
    run = Run(str(tmp_path / "run"))
    started = time.monotonic()
    manifest = run_ingest(run, RunConfig(corpus=CorpusConfig(sources=(source,), rows_per_task=3)))
    texts = open_lance(run.artifact("items").data_uri).to_table(columns=["text"]).column(0).to_pylist()
    assert texts == [f"text {n}" for n in range(40)]
    assert 0 < manifest.seconds <= time.monotonic() - started
