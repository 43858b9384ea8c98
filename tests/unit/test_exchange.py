"""A corpus written in another format and read again: the same items, pairs and candidates, by id."""

from __future__ import annotations

import hashlib
import json

import lance
import pyarrow as pa
import pytest

from unime_ray import cli, ids, prompts
from unime_ray.artifacts import Manifest, Run
from unime_ray.config import CorpusConfig, Source
from unime_ray.corpus.exchange import corpus_rows, only_pairs, run_rows, source_rows, write_corpus
from unime_ray.corpus.records import Record, Reject
from unime_ray.corpus.resolve import Resolver
from unime_ray.errors import ConfigError, CorpusError
from unime_ray.schemas import EVAL_CANDIDATES, HARD_NEGATIVES, IMAGES, ITEMS, POOLS, QRELS

GLOBS = {"parquet": "{}.parquet", "jsonl": "{}.jsonl", "webdataset": "{}-*.tar"}


@pytest.fixture
def corpus(tmp_path, tiny_pictures) -> CorpusConfig:
    for name in ("red", "blue", "green"):
        (tmp_path / f"{name}.png").write_bytes(tiny_pictures[name])
    pairs = [
        {"id": "1", "query_text": "rot ✅", "query_instruction": "Find.", "pos_image": ["red.png", "blue.png"]},
        {"id": "2", "query_text": "<|image_1|> what?", "query_image": "red.png", "pos_text": ["a", "b"]},
        {"id": "3", "query_text": "q", "pos_text": "p", "pos_instruction": "Say.", "split": "test"},
        {"id": "4", "query_text": "q4", "pos_text": "p4", "negatives": [["n", "green.png"], "m"]},
        {"id": "5", "query_text": "gone", "pos_image": "gone.png"},
    ]
    pairs[0]["relevance"] = [1.0, 0.5]
    pairs[2]["candidates"] = [{"text": "p", "instruction": "Say."}, {"image": "blue.png"}]
    pairs[3] |= {"negative_scores": [0.25, 0.125], "positive_score": 0.75}
    pool = [{"image": "green.png", "instruction": "Look."}, {"text": "a text"}]
    for name, rows in (("pairs", pairs), ("pool", pool)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = [
        Source(format="jsonl", path=str(tmp_path / f"{role}.jsonl"), role=role, dataset="d") for role in GLOBS_ROLES
    ]
    return CorpusConfig(sources=tuple(made))


GLOBS_ROLES = ("pairs", "pool")


def identified(rows, config: CorpusConfig | None = None) -> set[tuple]:
    """What identifies each row: its names and the ids of its sides."""
    found = set()
    for one in Resolver(config or CorpusConfig()).resolve_all(rows):
        assert not isinstance(one, Reject), one
        record = one.record
        sides = [
            tuple(entry.item_id for entry in side or ())
            for side in (one.positives, one.negatives, one.candidates, [e for e in (one.query, one.item) if e])
        ]
        numbers = (record.relevances, record.negative_scores, record.positive_score)
        found.add((record.dataset, record.split, record.row_id, *sides, *numbers))
    return found


def read(folder, fmt: str, role: str):
    return source_rows(Source(format=fmt, path=str(folder / GLOBS[fmt].format(role)), role=role))


@pytest.mark.parametrize("fmt", list(GLOBS))
def test_every_row_comes_back_with_its_ids(corpus, tmp_path, fmt):
    rows = list(corpus_rows(corpus))
    outcome = write_corpus(rows, fmt, str(tmp_path / "out"))
    assert (outcome.pairs, outcome.pool) == (4, 2)
    assert [one.reason.split(":")[:2] for one in outcome.rejects] == [["positive", " picture not found"]]
    expected = identified(row for row in rows if isinstance(row, Record))
    assert identified(row for role in GLOBS_ROLES for row in read(tmp_path / "out", fmt, role)) == expected


@pytest.mark.parametrize(("fmt", "name"), [("mmeb_train", "train.jsonl"), ("unime_json", "train.json")])
def test_formats_of_fused_texts_keep_item_ids(corpus, tmp_path, fmt, name):
    rows = [row for row in corpus_rows(corpus) if isinstance(row, Record)]
    with pytest.raises(ConfigError, match="--pairs-only"):
        write_corpus(rows, fmt, str(tmp_path / "pool"))
    assert write_corpus(only_pairs(rows), fmt, str(tmp_path / "out")).pairs == 4
    again = list(source_rows(Source(format=fmt, path=str(tmp_path / "out" / name))))

    def pairs(found) -> set[tuple]:
        return {(one[6][0], positive) for one in identified(found) for positive in one[3]}

    train = [row for row in rows if row.role == "pairs" and row.split == "train"]
    assert pairs(again) == pairs(train) and len(again) == 5
    (judged,) = [row for row in again if row.negatives]
    assert len(judged.negatives) == (2 if fmt == "unime_json" else 1)
    if fmt == "unime_json":
        assert (judged.positive_score, judged.negative_scores) == (0.75, (0.25, 0.125))


def hand_made_run(folder, picture: bytes) -> tuple[Run, dict[str, bytes]]:
    run, key, made = Run(str(folder)), ids.image_id(picture), {}
    items = []
    for name, text, instruction, image in (
        ("q", "q", "Find.", None),
        ("p", None, None, key),
        ("n", "n", None, None),
        ("t", "t", None, key),
    ):
        rendered = prompts.render(text, image is not None, instruction)
        made[name] = ids.item_id(rendered, image)
        items.append([made[name], rendered, instruction, text, image, "c.jsonl"])
    images = pa.table([[key], [picture], [None], [16], [16]], schema=IMAGES)
    lance.write_dataset(
        pa.table(list(map(list, zip(*items, strict=True))), schema=ITEMS), run.artifact("items").data_uri
    )
    lance.write_dataset(images, run.artifact("images").data_uri)
    rows = {
        "qrels": pa.table(
            [["d", "e"], ["train", "test"], [made["q"]] * 2, [made["p"], made["t"]], [1.0, 0.5]], schema=QRELS
        ),
        "pools": pa.table([["d"] * 2, ["train"] * 2, [made["p"], made["n"]]], schema=POOLS),
        "eval_candidates": pa.table([["e"], ["test"], [made["q"]], [[made["t"], made["n"]]]], schema=EVAL_CANDIDATES),
    }
    negatives = [[made["q"]], [made["p"]], [0.75], [[made["n"]]], [[0.25]], [[0.5]], [["cycle"]]]
    rows["hard_negatives"] = pa.table(negatives, schema=HARD_NEGATIVES)
    for table, content in rows.items():
        artifact = run.artifact(table, "j" if table == "hard_negatives" else None)
        artifact.write(content, content.schema)
        mark = hashlib.sha256(table.encode()).hexdigest()
        artifact.finish(Manifest(table=table, name=artifact.name, stage="ingest", fingerprint=mark))
    return run, made


def test_a_run_becomes_a_corpus_again(tmp_path, tiny_pictures):
    run, made = hand_made_run(tmp_path / "run", tiny_pictures["red"])
    outcome = write_corpus(run_rows(run, "j"), "parquet", str(tmp_path / "out"))
    assert (outcome.pairs, outcome.pool) == (2, 1)
    found = {
        one[:2]: one[3:]
        for role in GLOBS_ROLES
        for one in identified(read(tmp_path / "out", "parquet", role))
        if one[3]
    }
    q, p, n, t = (made[name] for name in "qpnt")
    assert found[("d", "train")] == ((p,), (n,), (), (q,), (1.0,), (0.25,), 0.75)
    assert found[("e", "test")] == ((t,), (), (t, n), (q,), (0.5,), (), None)
    (pool,) = identified(read(tmp_path / "out", "parquet", "pool"))
    assert pool[6] == (n,)


def test_the_commands(corpus, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(
        json.dumps({"run": str(tmp_path / "r"), "corpus": corpus.model_dump(mode="json") | {"max_error_rate": 0.2}})
    )
    exported = str(tmp_path / "tars")
    with pytest.raises(SystemExit) as done:
        cli.main(["export-corpus", exported, "--corpus", str(tmp_path / "c.yaml"), "--to", "webdataset"])
    assert done.value.code == 0 and (tmp_path / "tars" / "rejects.jsonl").read_text().count("\n") == 1
    with pytest.raises(SystemExit) as done:
        cli.main(
            ["import-corpus", f"{exported}/pairs-*.tar", "--from", "webdataset", "--to", str(tmp_path / "one.parquet")]
        )
    assert done.value.code == 0 and "wrote 4 rows" in capsys.readouterr().out
    again = source_rows(Source(format="parquet", path=str(tmp_path / "one.parquet")))
    pairs = (row for row in corpus_rows(corpus) if isinstance(row, Record) and row.role == "pairs")
    assert identified(again) == identified(pairs)
    for arguments, message in (
        (["import-corpus", "x", "--from", "webdatset", "--to", "y.parquet"], "corpus.sources.0.format"),
        (["import-corpus", "x", "--from", "csv", "-o", "splt=a", "--to", "y.parquet"], "did you mean 'split'"),
        (["export-corpus", "x", "--corpus", str(tmp_path / "c.yaml"), "--to", "coco"], "'coco' cannot be written"),
    ):
        with pytest.raises(SystemExit) as done:
            cli.main(arguments)
        assert done.value.code == 2 and message in capsys.readouterr().err


def test_too_many_rejects_are_an_error(corpus, tmp_path):
    from unime_ray.corpus.exchange import check_outcome

    outcome = write_corpus(corpus_rows(corpus), "jsonl", str(tmp_path / "out"))
    with pytest.raises(
        CorpusError, match=r"1 of 7 rows cannot be used; .*\n.*pairs.jsonl:5: positive: picture not found"
    ):
        check_outcome(outcome, 0.1, str(tmp_path / "rejects.jsonl"))
