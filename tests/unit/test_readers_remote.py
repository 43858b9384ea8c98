"""Sources behind a URI: the same rows as from a disk. The remote side is a folder behind another file system."""

from __future__ import annotations

import io
import json
import tarfile

import pyarrow.fs as pafs
import pytest

from unime_ray.config import CorpusConfig, Source
from unime_ray.corpus import captions as captions_module
from unime_ray.corpus import files
from unime_ray.corpus.validate import validate_corpus

QUERY = "?endpoint_override=localhost:9000"


@pytest.fixture
def bucket(tmp_path, tiny_pictures, monkeypatch):
    """`fake://bucket/...` is a local folder; every opened path is noted."""
    (tmp_path / "bucket" / "images").mkdir(parents=True)
    for name in ("red", "blue"):
        (tmp_path / "bucket" / "images" / f"{name}.png").write_bytes(tiny_pictures[name])
    rows = [
        {"query_text": f"{n}", "pos_image": f"images/{name}.png"}
        for n, name in enumerate(["red", "blue", "gone", "red"])
    ]
    for part in ("a", "b"):
        lines = (json.dumps(row | {"id": f"{part}{n}"}) + "\n" for n, row in enumerate(rows))
        (tmp_path / "bucket" / f"{part}.jsonl").write_text("".join(lines))
    images = [{"id": n, "file_name": f"{name}.png"} for n, name in enumerate(["red", "gone"])]
    captions = [{"image_id": n, "caption": f"c{n}"} for n in range(2)]
    (tmp_path / "bucket" / "images" / "coco.json").write_text(json.dumps({"images": images, "annotations": captions}))
    with tarfile.open(tmp_path / "bucket" / "shard.tar", "w") as archive:
        for name, data in (("0.png", tiny_pictures["red"]), ("0.txt", b"red"), ("1.txt", b"alone")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    opened: list[str] = []

    def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
        base, _, query = uri.partition("?")
        assert base.startswith("fake://") and "?" + query == QUERY, uri
        opened.append(base)
        return pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()), base.removeprefix("fake://")

    monkeypatch.setattr(files, "filesystem", filesystem)
    monkeypatch.setattr(captions_module, "filesystem", filesystem)
    return opened


@pytest.mark.parametrize("path", ["fake://bucket", "fake://bucket/*.jsonl", "fake://bucket/a.jsonl"])
def test_folders_globs_and_files_behind_a_uri(bucket, path):
    source = Source(format="jsonl", path=path + QUERY)
    report = validate_corpus(CorpusConfig(sources=(source,), max_error_rate=0.5))
    num_files = 1 if path.endswith("a.jsonl") else 2
    assert report.rows == 4 * num_files and report.ok
    assert [one.row for one in report.rejects] == [3] * num_files
    assert report.rejects[0].reason == f"positive: picture not found: fake://bucket/images/gone.png{QUERY}"
    assert bucket.count("fake://bucket/images/red.png") == num_files  # named twice in a file, read once


@pytest.mark.parametrize(
    ("fmt", "path", "reason"),
    [
        ("webdataset", "fake://bucket/*.tar", "sample '1' has 0 pictures"),
        (
            "coco",
            "fake://bucket/images/coco.json",
            "positive: picture not found: fake://bucket/images/gone.png" + QUERY,
        ),
    ],
)
def test_archives_and_annotation_files_behind_a_uri(bucket, fmt, path, reason):
    source = Source(format=fmt, path=path + QUERY, direction="t2i")
    report = validate_corpus(CorpusConfig(sources=(source,), max_error_rate=0.5), limit=None)
    assert report.rows == 2 and report.ok
    assert report.rejects[0].reason.startswith(reason)
