"""Corpora that mean ill, or are merely broken: a row is refused with its reason, a file with its name; nothing else."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from unime_ray.config import CorpusConfig, Source
from unime_ray.corpus import jsonl, tar, writers
from unime_ray.corpus.exchange import corpus_rows, source_rows, write_corpus
from unime_ray.corpus.files import read_picture, resolve_picture
from unime_ray.corpus.readers import work_units
from unime_ray.corpus.records import Record, Reject
from unime_ray.corpus.staging import read_staged, stage_unit
from unime_ray.errors import ConfigError, CorpusError, RejectedRow

GOOD = {"query_text": "q", "pos_text": "p"}


def staged(folder: Path, name: str, fmt: str = "jsonl") -> tuple[int, list[str]]:
    """(good rows, reasons of the others) as ingest's worker leaves them on the disk."""
    source = Source(format=fmt, path=str(folder / name))  # type: ignore[arg-type]
    corpus, good, reasons = CorpusConfig(sources=(source,)), 0, []
    for number, unit in enumerate(work_units(source, 512)):
        good += stage_unit(number, 0, unit, source, corpus, str(folder)).rows
        reasons += read_staged(str(folder), "rejects", number).column("reason").to_pylist()
    return good, reasons


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"id": "\ud800"}, "'id' holds half a surrogate pair at character 0"),
        ({"split": "te\ud800st"}, "'split' holds half a surrogate pair at character 2"),
        ({"split": "a\x1b[2Jb"}, "'split' holds a control character"),
        ({"dataset": "mean"}, "a dataset called 'mean'"),
        ({"dataset": "d" * 501}, "'dataset' has 501 characters; a name may have 500"),
        ({"pos_image": "\ud800.png"}, "picture's name holds half a surrogate pair"),
        ({"pos_image": "a\nb.png"}, "picture not found: .*a\\\\nb.png"),
        ({"pos_image": "x" * 5000}, "picture cannot be read"),
        ({"relevance": 10**400}, "'relevance' is an integer too large, not a finite number"),
        ({"relevance": 1e300}, "'relevance' is 1e\\+300, not a finite number"),
        ({"query_text": "", "\ud800": 1}, "query is empty"),
        ({"\ud800\x1b[31m": 1, "query_text": None}, "query is empty"),
    ],
)
def test_a_bad_row_is_refused_and_the_others_are_kept(tmp_path: Path, values: dict, reason: str) -> None:
    (tmp_path / "c.jsonl").write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD | values) + "\n")
    good, (found,) = staged(tmp_path, "c.jsonl")
    assert good == 1
    assert pa.array([found]) is not None and found.isprintable() and len(found) <= 1100
    assert re.search(reason, found), found


def test_a_reason_can_be_shown_whatever_it_quotes() -> None:
    shown = Reject("f", 1, "ingest", "bad \x1b[2J\ud800\n‮" + "x" * 5000).reason
    assert shown.startswith("bad \\x1b[2J\\ud800\\n\\u202ex") and len(shown) < 1100


def test_a_coco_picture_without_a_usable_id(tmp_path: Path) -> None:
    images = [{"id": [1], "file_name": "a.png"}, {"file_name": "b.png"}]
    content = {"images": images, "annotations": [{"image_id": [1], "caption": "x"}]}
    (tmp_path / "c.json").write_text(json.dumps(content))
    good, reasons = staged(tmp_path, "c.json", "coco")
    assert good == 0 and len(reasons) == 3 and "image 'a.png' has no `id`" in reasons[0]


@pytest.mark.parametrize("body", ['[{"x": ' + "9" * 5000 + "}]", "[" * 100_000 + "]" * 100_000])
def test_json_that_python_cannot_hold_names_its_row(tmp_path: Path, body: str) -> None:
    (tmp_path / "u.json").write_text(body)
    with pytest.raises(CorpusError, match=r"u.json: row 1 is not usable JSON"):
        staged(tmp_path, "u.json", "unime_json")


@pytest.mark.parametrize("fmt", ["jsonl", "csv"])
def test_a_line_without_end_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fmt: str) -> None:
    for module in (jsonl, sys.modules["unime_ray.corpus.csv"]):
        monkeypatch.setattr(module, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(jsonl, "READ_BYTES", 512)
    (tmp_path / f"c.{fmt}").write_text("query_text,pos_text\n" + "x" * 5000)
    with pytest.raises(CorpusError, match=r"line 2 is longer than 1000 bytes"):
        staged(tmp_path, f"c.{fmt}", fmt)


def test_a_saved_dataset_with_a_broken_state_says_so(tmp_path: Path) -> None:
    (tmp_path / "data.arrow").write_bytes(b"")
    for text in ("{", "[]"):
        (tmp_path / "state.json").write_text(text)
        with pytest.raises(CorpusError, match=r"state.json: .*save the dataset again"):
            work_units(Source(format="hf_dataset", path=str(tmp_path)), 512)


def test_a_file_name_that_is_no_text(tmp_path: Path) -> None:
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl"))).write_text("{}\n")
    with pytest.raises(CorpusError, match="not valid UTF-8; rename it"):
        work_units(Source(format="jsonl", path=str(tmp_path / "*.jsonl")), 512)


# --- pictures by name -------------------------------------------------------------------------------------------------


def test_what_is_no_file_is_no_picture(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (str(tmp_path / "pipe.png"), "/dev/zero", str(tmp_path)):
        with pytest.raises(RejectedRow, match="is no file"):
            read_picture(path, 1000)
    with pytest.raises(RejectedRow, match="max_source_bytes is 100"):
        read_picture("/proc/self/maps", 100)  # says that it has 0 bytes


def test_no_row_says_where_a_store_is() -> None:
    root = "s3://bucket/pictures?endpoint_override=store:9000"
    assert resolve_picture("s3://other/a.png", root) == "s3://other/a.png?endpoint_override=store:9000"
    assert resolve_picture("s3://other/a.png?endpoint_override=store:9000", root).count("?") == 1
    assert resolve_picture("gs://other/a.png", root) == "gs://other/a.png"
    assert resolve_picture("s3://other/a.png", "/data") == "s3://other/a.png"
    for below in ("/data", root):
        with pytest.raises(RejectedRow, match="settings of its own"):
            resolve_picture("s3://b/a.png?endpoint_override=169.254.169.254&scheme=http", below)


def test_a_name_below_a_uri_is_only_a_name() -> None:
    assert resolve_picture("./a?endpoint_override=x 1%.png", "s3://b/c?region=r") == (
        "s3://b/c/a%3Fendpoint_override%3Dx%201%25.png?region=r"
    )
    assert resolve_picture("a? 1%.png", "/data") == "/data/a? 1%.png"


# --- archives ---------------------------------------------------------------------------------------------------------


def member(kind: bytes, size: bytes, name: bytes = b"b.txt") -> bytes:
    head = bytearray(512)
    head[: len(name)] = name
    head[100:108], head[124:136], head[156:157], head[257:265] = b"0000644\0", size, kind, b"ustar\x0000"
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


def binary(size: int) -> bytes:
    return b"\x80" + size.to_bytes(11, "big") if size >= 0 else b"\xff" + (size % 256**11).to_bytes(11, "big")


@pytest.mark.parametrize("kind", [b"0", b"L", b"x", b"S"])
@pytest.mark.parametrize("size", [2**33, 2**62, 2**70, -512, -1024, -(2**62)])
def test_no_size_in_a_tar_header_is_believed(tmp_path: Path, kind: bytes, size: int) -> None:
    first = member(b"0", b"00000000003\0", b"a.txt") + b"abc".ljust(512, b"\0")
    (tmp_path / "t.tar").write_bytes(first + member(kind, binary(size)) + b"x" * 512 + bytes(1024))
    with tar.Archive(str(tmp_path / "t.tar")) as archive:
        found = list(archive.samples())
        assert found[0].key == "a" and archive.read(found[0], "txt") == b"abc"
    assert len(found) == 2 and found[1].problem is not None


def test_headers_within_headers_end(tmp_path: Path) -> None:
    pax = member(b"x", b"00000000017\0") + b"15 path=b.txt.\n".ljust(512, b"\0")
    (tmp_path / "t.tar").write_bytes(pax * 3000)
    with tar.Archive(str(tmp_path / "t.tar")) as archive:
        assert [sample.problem is not None for sample in archive.samples()] == [True]


def test_a_picture_named_often_is_read_once(tmp_path: Path, tiny_pictures: dict[str, bytes]) -> None:
    row = GOOD | {"negatives": [{"image": "n.png"}] * 100}
    parts = [(b"0.json", json.dumps(row).encode()), (b"0.n.png", tiny_pictures["red"])]
    blocks = [
        member(b"0", b"%011o\0" % len(data), name) + data.ljust(-(-len(data) // 512) * 512, b"\0")
        for name, data in parts
    ]
    (tmp_path / "t.tar").write_bytes(b"".join(blocks) + bytes(1024))
    (found,) = source_rows(Source(format="webdataset", path=str(tmp_path / "t.tar")))
    assert isinstance(found, Record) and len({id(side.image) for side in found.negatives}) == 1


# --- written corpora --------------------------------------------------------------------------------------------------

SPLITS = ("train", "../../out", "/abs", "a/b", "..", ".hidden", "_x", "rejects", "x" * 400, "Ünï", "split-1")


@pytest.mark.parametrize("fmt", ["mmeb_train", "unime_json"])
def test_no_split_leaves_the_folder_and_none_shares_a_file(tmp_path: Path, fmt: str) -> None:
    lines = (json.dumps(GOOD | {"query_text": split, "split": split}) + "\n" for split in SPLITS)
    (tmp_path / "c.jsonl").write_text("".join(lines))
    out = tmp_path / "here" / "out"
    rows = corpus_rows(CorpusConfig(sources=(Source(format="jsonl", path=str(tmp_path / "c.jsonl")),)))
    assert write_corpus(rows, fmt, str(out)).pairs == len(SPLITS)
    made = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    assert made - {Path("c.jsonl")} == {path.relative_to(tmp_path) for path in out.iterdir()}
    assert len(list(out.iterdir())) == len(SPLITS) and next(out.glob("train.*")).is_file()
    again = [one for one in source_rows(Source(format=fmt, path=str(out))) if isinstance(one, Record)]  # type: ignore[arg-type]
    assert {(one.split, one.query.text) for one in again if one.query} == {(split, split) for split in SPLITS}


def test_splits_do_not_open_files_without_end(tmp_path: Path) -> None:
    lines = (json.dumps(GOOD | {"split": f"s{n}"}) + "\n" for n in range(writers.MAX_SPLITS + 1))
    (tmp_path / "c.jsonl").write_text("".join(lines))
    rows = corpus_rows(CorpusConfig(sources=(Source(format="jsonl", path=str(tmp_path / "c.jsonl")),)))
    with pytest.raises(ConfigError, match="more than 100 splits"):
        write_corpus(rows, "mmeb_train", str(tmp_path / "out"))


def test_a_finished_shard_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writers, "SHARD_ROWS", 1)
    (tmp_path / "c.jsonl").write_text((json.dumps(GOOD) + "\n") * 3)
    rows = list(corpus_rows(CorpusConfig(sources=(Source(format="jsonl", path=str(tmp_path / "c.jsonl")),))))
    with writers.open_writer("webdataset", str(tmp_path / "out")) as writer:
        for row in rows:
            writer.write(row)  # type: ignore[arg-type]
        assert list(writer._streams) == ["pairs-000002.tar"]
    assert len(list(source_rows(Source(format="webdataset", path=str(tmp_path / "out"))))) == 3
