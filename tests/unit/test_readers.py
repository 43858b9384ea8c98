"""Readers: every format gives the same records, and every bad row a reason with its number."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unime_ray.config import Columns, CorpusConfig, Source
from unime_ray.corpus.files import corpus_root, shown_name
from unime_ray.corpus.readers import read_unit, work_units
from unime_ray.corpus.records import Record, Reject, Side
from unime_ray.errors import CorpusError

ROWS = [
    {"id": "1", "query_text": "a red, round thing", "query_image": "", "pos_text": "", "pos_image": "red.png"},
    {"id": "2", "query_text": "", "query_image": "blue.png", "pos_text": 'says "blue"\non two lines', "pos_image": ""},
    {"id": "3", "query_text": "grün ✅", "query_image": "", "pos_text": "green", "pos_image": ""},
]


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def write_csv(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0].keys(), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


def read_all(source: Source, rows_per_task: int = 512) -> list[Record | Reject]:
    units = work_units(source, rows_per_task)
    return [found for unit in units for found in read_unit(unit, source, CorpusConfig())]


def reasons(source: Source) -> dict[int, str]:
    return {found.row: found.reason for found in read_all(source) if isinstance(found, Reject)}


def content(found: Record | Reject) -> tuple:
    assert isinstance(found, Record), found
    return found.row, found.row_id, found.query, found.positives, found.relevances


@pytest.mark.parametrize("rows_per_task", [1, 2, 512])
@pytest.mark.parametrize("fmt", ["jsonl", "csv", "tsv", "parquet"])
def test_formats_agree_however_they_are_cut(tmp_path, fmt, rows_per_task):
    if fmt == "jsonl":
        write_jsonl(tmp_path / "pairs.jsonl", ROWS)
    elif fmt == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "pairs.parquet", row_group_size=1)
    else:
        write_csv(tmp_path / f"pairs.{fmt}", ROWS)
    source = Source(format=fmt.replace("tsv", "csv"), path=str(tmp_path / f"pairs.{fmt}"))
    found = read_all(source, rows_per_task)
    assert [content(one) for one in found] == [
        (1, "1", Side("a red, round thing"), (Side(None, str(tmp_path / "red.png")),), (1.0,)),
        (2, "2", Side(None, str(tmp_path / "blue.png")), (Side('says "blue"\non two lines'),), (1.0,)),
        (3, "3", Side("grün ✅"), (Side("green"),), (1.0,)),
    ]
    assert {(one.dataset, one.split, one.role) for one in found} == {("pairs", "train", "pairs")}


def test_parquet_as_hugging_face_writes_it(tmp_path):
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            "caption": pa.array([["one", "two"], ["three"]]),
            "image": pa.array([{"bytes": b"abc", "path": None}, {"bytes": None, "path": "x.png"}], image),
        }
    )
    pq.write_table(table, tmp_path / "hf.parquet")
    columns = Columns(query_image="image", pos_text="caption")
    source = Source(format="parquet", path=str(tmp_path / "hf.parquet"), columns=columns, pos_instruction="Find it.")
    first, second = read_all(source)
    assert first.query == Side(None, b"abc")
    assert first.positives == (Side("one", None, "Find it."), Side("two", None, "Find it."))
    assert first.relevances == (1.0, 1.0)
    assert second.query == Side(None, str(tmp_path / "x.png"))


def test_settings_of_the_row_win_over_the_source(tmp_path):
    rows = [
        {
            "query_text": "q",
            "pos_text": "p",
            "query_instruction": "Own.",
            "dataset": "d2",
            "split": "test",
            "relevance": 0.5,
        },
        {"query_text": "q", "pos_text": "p"},
    ]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    source = Source(format="jsonl", path=str(path), dataset="d1", query_instruction="General.", meta_task="vqa")
    own, general = read_all(source)
    assert (own.query.instruction, own.dataset, own.split, own.relevances) == ("Own.", "d2", "test", (0.5,))
    assert (general.query.instruction, general.dataset, general.split) == ("General.", "d1", "train")
    assert own.meta_task == "vqa"


def test_pool_rows_hold_one_item_with_the_instruction_of_positives(tmp_path):
    path = write_jsonl(tmp_path / "pool.jsonl", [{"text": "t", "image": "i.png"}, {"text": " "}])
    source = Source(format="jsonl", path=str(path), role="pool", image_root="/pictures", pos_instruction="Look.")
    good, bad = read_all(source)
    assert good.item == Side("t", "/pictures/i.png", "Look.") and good.query is None
    assert bad.reason == "item is empty: neither text nor picture"


def test_negatives_and_candidates_in_every_notation(tmp_path):
    row = {
        "query_text": "q",
        "pos_text": "p",
        "negatives": ["a", ["b", "b.png"], {"image": "c.png"}],
        "negative_scores": [0.1, 0.2, 0.3],
        "positive_score": 0.9,
        "candidates": ["p", "x"],
    }
    (found,) = read_all(Source(format="jsonl", path=str(write_jsonl(tmp_path / "x.jsonl", [row])), image_root="/r"))
    assert found.negatives == (Side("a"), Side("b", "/r/b.png"), Side(None, "/r/c.png"))
    assert (found.negative_scores, found.positive_score) == ((0.1, 0.2, 0.3), 0.9)
    assert found.candidates == (Side("p"), Side("x"))


BAD_LINES = [
    ('{"query_text": "q", "pos_text": ', "not valid JSON"),
    ("[1, 2]", "holds list, not an object"),
    ('{"query_text": 7, "pos_text": "p"}', "'query_text' is int, not text"),
    ('{"query_text": "q", "pos_image": 3}', "'pos_image' is int, not a path"),
    ('{"query_text": "", "query_image": null, "pos_text": "p"}', "query is empty: neither text nor picture"),
    ('{"query_text": "q", "pos_text": "  "}', "positive is empty"),
    ('{"anchor": "q", "pos_text": "p"}', "no 'query_text' or 'query_image'; it has anchor, pos_text"),
    ('{"query_text": "q", "pos_text": []}', "empty list"),
    ('{"query_text": "q", "pos_text": ["a", "b"], "pos_image": ["x.png"]}', "lists of 1 and 2 entries"),
    ('{"query_text": "q", "pos_text": "p", "relevance": 0}', "relevance is above 0"),
    ('{"query_text": "q", "pos_text": "p", "relevance": NaN}', "not a finite number"),
    ('{"query_text": "q", "pos_image": "https://example.org/x.png"}', "web address"),
    ('{"query_text": "q", "pos_text": "p", "negatives": "n"}', "'negatives' is str, not a list"),
    ('{"query_text": "q", "pos_text": "p", "negatives": ["n"], "negative_scores": [1.5]}', "outside"),
    ('{"query_text": "q", "pos_text": "p", "negatives": ["n"], "negative_scores": [0.5, 0.5]}', "1 negatives but 2"),
    ('{"query_text": "q", "pos_text": "p", "id": {"a": 1}}', "'id' is dict, not text"),
    ("[" * 100_000, "JSON"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_a_bad_line_is_rejected_with_its_number(tmp_path, line, reason):
    good = {"query_text": "q", "pos_text": "p"}
    source = Source(format="jsonl", path=str(write_jsonl(tmp_path / "x.jsonl", [good, line, good])))
    found = reasons(source)
    assert list(found) == [2] and reason in found[2]


def test_jsonl_survives_bytes_blank_lines_and_line_ends(tmp_path):
    good = b'{"query_text": "q", "pos_text": "p"}'
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\r\n\n" + b'{"query_text": "\xff\xfe"}\n' + good)
    found = read_all(Source(format="jsonl", path=str(path)), rows_per_task=1)
    assert [one.row for one in found] == [1, 3, 4]
    assert isinstance(found[1], Reject) and "UTF-8" in found[1].reason


def test_csv_rejects_ragged_rows_bad_bytes_and_open_quotes(tmp_path):
    path = tmp_path / "x.csv"
    head = b"query_text,pos_text\n"
    path.write_bytes(head + b"a,b\na,b,c\n\xff,b\na,b\n" + b'"' + b"x" * 140_000 + b"\n")
    source = Source(format="csv", path=str(path))
    found = reasons(source)
    assert "3 fields, the header 2" in found[2]
    assert "UTF-8" in found[3]
    assert "not valid CSV" in found[5]
    assert [one.row for one in read_all(source) if isinstance(one, Record)] == [1, 4]


def test_parquet_with_text_that_is_no_utf8(tmp_path):
    texts = pa.array([b"good", b"\xff\xfe", b"fine"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"query_text": texts, "pos_text": ["p"] * 3}), tmp_path / "x.parquet")
    assert reasons(Source(format="parquet", path=str(tmp_path / "x.parquet"))) == {2: "text is not valid UTF-8"}


def test_a_damaged_row_group_gives_one_reject_a_row(tmp_path):
    path = tmp_path / "x.parquet"
    table = pa.table({"query_text": [f"query {i}" * 50 for i in range(300)], "pos_text": ["p"] * 300})
    pq.write_table(table, path, row_group_size=100, compression="gzip", use_dictionary=False)
    data = bytearray(path.read_bytes())
    offset = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data[offset : offset + 40] = b"\x5a" * 40
    path.write_bytes(data)
    found = read_all(Source(format="parquet", path=str(path)), rows_per_task=100)
    assert [one.row for one in found] == list(range(1, 301))
    assert {one.row for one in found if isinstance(one, Reject)} == set(range(101, 201))
    assert next(one for one in found if isinstance(one, Reject)).reason.startswith("cannot be read: ")


@pytest.mark.parametrize("fmt", ["csv", "parquet"])
def test_a_mapped_column_must_be_there(tmp_path, fmt):
    path = tmp_path / f"x.{fmt}"
    if fmt == "csv":
        write_csv(path, [{"caption": "q", "pos_text": "p"}])
    else:
        pq.write_table(pa.table({"caption": ["q"], "pos_text": ["p"]}), path)
    source = Source(format=fmt, path=str(path), columns=Columns(query_text="captions"))
    with pytest.raises(CorpusError, match="no column 'captions'; did you mean 'caption'.*columns.query_text"):
        work_units(source, 10)


def test_files_of_folders_and_globs(tmp_path):
    for name in ("b/two.jsonl", "a/one.jsonl", "a/_hidden.jsonl", "a/.x/three.jsonl", "a/other.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / name, [{"query_text": "q", "pos_text": "p"}])
    folder = read_all(Source(format="jsonl", path=str(tmp_path)))
    assert [one.dataset for one in folder] == ["one", "two"]
    assert [one.dataset for one in read_all(Source(format="jsonl", path=f"{tmp_path}/*/t*.jsonl"))] == ["two"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.csv", b"", "the first line must name the columns"),
        ("x.parquet", b"PAR1 not really", "not a readable Parquet file"),
        ("x.jsonl.gz", b"\x1f\x8b", "unpack it first"),
    ],
)
def test_an_unreadable_file_names_itself(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    fmt = name.split(".")[1]
    with pytest.raises(CorpusError, match=message) as error:
        work_units(Source(format=fmt, path=str(tmp_path / name)), 10)
    assert name in str(error.value)


def test_a_missing_source_names_its_path(tmp_path):
    with pytest.raises(CorpusError, match="nowhere.jsonl: no such file"):
        work_units(Source(format="jsonl", path=str(tmp_path / "nowhere.jsonl")), 10)
    with pytest.raises(CorpusError, match="no files"):
        work_units(Source(format="jsonl", path=f"{tmp_path}/*.jsonl"), 10)


def test_records_name_their_file_under_the_folder_all_sources_share(tmp_path):
    (tmp_path / "pool").mkdir()
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "pool" / "a.jsonl", [{"text": "t"}])
    sources = (
        Source(format="jsonl", path=str(tmp_path / "train.jsonl")),
        Source(format="jsonl", path=str(tmp_path / "pool" / "*.jsonl"), role="pool"),
        Source(format="jsonl", path="s3://bucket/x.jsonl"),
    )
    corpus = CorpusConfig(sources=sources)
    names = [
        found.source
        for source in sources[:2]
        for unit in work_units(source, 9)
        for found in read_unit(unit, source, corpus)
    ]
    assert names == ["train.jsonl"] * 3 + ["pool/a.jsonl"]
    assert shown_name("s3://bucket/x.jsonl", corpus_root(corpus)) == "s3://bucket/x.jsonl"
