"""UniME-V2's published JSON: read as it is published, written so that reading it again gives the same ids."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest

from unime_ray.artifacts import Run, StageResult, run_stage
from unime_ray.config import CorpusConfig, Source
from unime_ray.corpus import unime_json
from unime_ray.corpus.lance_io import commit_fragments, write_fragments
from unime_ray.corpus.readers import read_unit, work_units
from unime_ray.corpus.records import Record, Reject, Side
from unime_ray.corpus.resolve import Resolver
from unime_ray.corpus.unime_json import export_unime_json
from unime_ray.errors import ArtifactError, CorpusError
from unime_ray.ids import image_id, item_id
from unime_ray.prompts import render
from unime_ray.schemas import HARD_NEGATIVES, IMAGES, ITEMS

# In the published shape, with our own content: both directions, a marker in the middle of a text, a repeated negative.
PUBLISHED = [
    {
        "query_text": "<|image_1|>\nRepresent the given image with a caption.",
        "query_image": "images/red.png",
        "pos_text": 'A red square – "très rouge".',
        "pos_image": "",
        "query_pos_scores": 0.9328,
        "hard_negatives": [["A blue square.", ""], ["A red circle.", ""], ["A red circle.", ""]],
        "hard_negatives_scores": [0.0421, 0.3775, 0.3775],
    },
    {
        "query_text": "Find a picture of something green.",
        "query_image": "",
        "pos_text": "<|image_1|>\nRepresent the given image.",
        "pos_image": "images/green.png",
        "query_pos_scores": 0.25,
        "hard_negatives": [["<|image_1|>\nRepresent the given image.", "images/red.png"]],
        "hard_negatives_scores": [0.125],
    },
]


@pytest.fixture
def published(tmp_path, tiny_pictures):
    (tmp_path / "images").mkdir()
    for name in ("red", "green"):
        (tmp_path / "images" / f"{name}.png").write_bytes(tiny_pictures[name])
    path = tmp_path / "example_data.json"
    path.write_text(json.dumps(PUBLISHED, indent=2, ensure_ascii=False))
    return Source(format="unime_json", path=str(path))


def read_all(source: Source, rows_per_task: int = 512) -> list[Record | Reject]:
    return [found for unit in work_units(source, rows_per_task) for found in read_unit(unit, source, CorpusConfig())]


@pytest.mark.parametrize("rows_per_task", [1, 512])
@pytest.mark.parametrize("read_bytes", [7, 2**20])
@pytest.mark.parametrize("start", ["", "\ufeff\n "])
def test_published_rows_become_pairs_with_scored_negatives(
    published, tmp_path, monkeypatch, rows_per_task, read_bytes, start
):
    monkeypatch.setattr(unime_json, "READ_BYTES", read_bytes)
    path = tmp_path / "example_data.json"
    path.write_text(start + path.read_text())
    first, second = read_all(published, rows_per_task)
    assert first.query == Side(
        "<|image_1|>\nRepresent the given image with a caption.", str(tmp_path / "images/red.png")
    )
    assert first.positives == (Side('A red square – "très rouge".'),)
    assert first.negatives == (Side("A blue square."), Side("A red circle."), Side("A red circle."))
    assert (first.positive_score, first.negative_scores) == (0.9328, (0.0421, 0.3775, 0.3775))
    assert second.positives[0].image == str(tmp_path / "images/green.png")
    assert [one.row for one in (first, second)] == [1, 2]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hard_negatives_scores": [0.5]}, "3 hard_negatives but 1 hard_negatives_scores"),
        ({"hard_negatives": [["a", "", "b"]]}, "hard_negatives[1] is list, not a text"),
        ({"hard_negatives": [["", ""]], "hard_negatives_scores": [0.5]}, "hard_negatives[1] is empty"),
        ({"query_pos_scores": "high"}, "'query_pos_scores' is 'high', not a number"),
        ({"query_pos_scores": 1.5}, "outside [0, 1]"),
        ({"pos_text": ""}, "positive is empty"),
    ],
)
def test_a_bad_row_is_rejected_with_its_number(published, change, reason):
    with open(published.path, "w") as stream:
        json.dump([PUBLISHED[1], PUBLISHED[0] | change, "text", PUBLISHED[1]], stream)
    found = read_all(published)
    assert [one.row for one in found] == [1, 2, 3, 4]
    assert reason in found[1].reason and "is str, not an object" in found[2].reason


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"query_text": "q"}', "not a JSON list; for one object a line use `format: jsonl`"),
        ('[{"query_text": "q"}, {"query_t', "row 2 is not valid JSON"),
        ('[{"query_text": "q"},', "ends after row 1 without its closing bracket"),
        ('[{"query_text": "q"}', "ends after row 1"),
        ("", "not a JSON list"),
    ],
)
def test_a_broken_file_is_refused_as_a_whole(tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(CorpusError, match=message):
        work_units(Source(format="unime_json", path=str(path)), 10)


def entries_of(source: Source) -> list[tuple]:
    """(ids of query, positive and negatives; scores) of every row."""
    resolver, found = Resolver(CorpusConfig()), []
    for record in read_all(source):
        resolved = resolver.resolve(record)
        negatives = [entry.item_id for entry in resolved.negatives]
        ids = (resolved.query.item_id, resolved.positives[0].item_id, negatives)
        found.append((*ids, record.positive_score, record.negative_scores))
    return found


def written_run(tmp_path, pictures) -> tuple[Run, list[dict]]:
    """A run with two rows of hard negatives, whose items have instructions, markers and pictures."""
    run = Run(str(tmp_path / "run"))
    red, green = pictures["red"], pictures["green"]
    sides = [
        (render("what is it?", True, "Look at <|image_1|> and answer."), red),
        (render(None, True), green),
        (render("Ein „rotes“ Ding", False, "Answer:"), None),
        (render("a green thing", False), None),
        (render("x", True), green),
    ]
    images = [None if data is None else image_id(data) for _, data in sides]
    ids = [item_id(text, image) for (text, _), image in zip(sides, images, strict=True)]
    blank, names = [None] * 5, ["s"] * 5
    items = pa.table([ids, [text for text, _ in sides], blank, blank, images, names], schema=ITEMS)
    pixels = pa.table([[image_id(red), image_id(green)], [red, green], [None] * 2, [16] * 2, [16] * 2], schema=IMAGES)
    for table, content, schema in (("items", items, ITEMS), ("images", pixels, IMAGES)):
        uri = run.artifact(table).data_uri
        commit_fragments(write_fragments(content.to_batches(), schema, uri), schema, uri)
    rows = [
        hard_negative(ids[0], ids[2], [ids[3], ids[4], ids[3]], 0.7, [0.1, 0.2, 0.1]),
        hard_negative(ids[3], ids[1], [ids[4]], 1 / 3, [2 / 3]),
    ]
    table = pa.Table.from_pylist(rows, HARD_NEGATIVES)
    artifact = run.artifact("hard_negatives", "judge")

    def build() -> StageResult:
        artifact.write(table, HARD_NEGATIVES)
        return StageResult(2)

    run_stage(artifact, stage="select", code_version=1, config={}, build=build)
    return run, table.to_pylist()


def hard_negative(query: bytes, positive: bytes, negatives: list[bytes], score: float, scores: list[float]) -> dict:
    return {
        "query_id": query,
        "positive_id": positive,
        "positive_score": score,
        "negative_ids": negatives,
        "negative_scores": scores,
        "negative_similarities": [0.5] * len(negatives),
        "negative_reasons": ["kept"] * len(negatives),
    }


def test_the_round_trip_keeps_ids_and_scores(tmp_path, tiny_pictures):
    run, rows = written_run(tmp_path, tiny_pictures)
    out = tmp_path / "out"
    assert export_unime_json(run, "judge", out) == 2
    found = entries_of(Source(format="unime_json", path=str(out / "hard_negatives.json")))
    assert [row[:3] for row in found] == [(row["query_id"], row["positive_id"], row["negative_ids"]) for row in rows]
    for row, (*_, positive_score, negative_scores) in zip(rows, found, strict=True):
        assert positive_score == row["positive_score"] and list(negative_scores) == row["negative_scores"]
    names = sorted(path.name for path in (out / "images").iterdir())
    assert names == sorted(f"{image_id(tiny_pictures[name]).hex()}.png" for name in ("red", "green"))


def test_the_published_rows_survive_reading_twice(published):
    once, again = entries_of(published), entries_of(published)
    assert once == again and len({row[0] for row in once}) == 2


def test_exporting_what_is_not_there_names_it(tmp_path):
    with pytest.raises(ArtifactError, match="hard_negatives/nobody"):
        export_unime_json(Run(str(tmp_path)), "nobody", tmp_path / "out")
