"""The formats that others publish: WebDataset, MMEB, saved `datasets` folders, COCO and Flickr30k."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from unime_ray.config import Columns, CorpusConfig, Source
from unime_ray.corpus.readers import read_unit, work_units
from unime_ray.corpus.records import Record, Reject, Side
from unime_ray.corpus.validate import validate_corpus
from unime_ray.errors import CorpusError


def read_all(rows_per_task: int = 512, **source: object) -> list[Record | Reject]:
    made = Source(**{key: str(value) if isinstance(value, Path) else value for key, value in source.items()})
    units = work_units(made, rows_per_task)
    for one, after in zip(units, units[1:], strict=False):
        assert after.first_row == (one.first_row + one.num_rows if one.file == after.file else 1)
    return [found for unit in units for found in read_unit(unit, made, CorpusConfig())]


def shown(found: list[Record | Reject]) -> list[tuple]:
    """(dataset, query, positives) or (row, reason)."""
    return [
        (one.row, one.reason) if isinstance(one, Reject) else (one.dataset, one.query, one.positives) for one in found
    ]


def write_tar(path: Path, members: dict[str, bytes], **options: object) -> Path:
    with tarfile.open(path, "w", **options) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


SHARD = {
    "a/0.jpg": b"pic0",
    "a/0.txt": "grün".encode(),
    "a/1.json": b'{"caption": ["one", "two"]}',
    "a/1.png": b"pic1",
    "README": b"hello",
    "2.webp": b"pic2",
    "3.txt": b"alone",
    "4.txt": b"x" * 700,
    "4.jpg": b"y" * 1500,
}


@pytest.mark.parametrize("rows_per_task", [1, 2, 512])
@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_webdataset_pairs_by_key_in_both_directions(tmp_path, rows_per_task, tar_format):
    long = {f"{'d' * 120}/5.txt": b"long", f"{'d' * 120}/5.jpg": b"p"}
    write_tar(tmp_path / "s-0.tar", SHARD | long, format=tar_format)
    found = read_all(rows_per_task, format="webdataset", path=tmp_path, dataset="w")
    good = {one.row_id: shown([one])[0] for one in found if isinstance(one, Record)}
    assert good["a/0"] == ("w_i2t", Side(None, b"pic0"), (Side("grün"),))
    assert good["a/0#0"] == ("w_t2i", Side("grün"), (Side(None, b"pic0"),))
    assert good["a/1"][2] == (Side("one"), Side("two")) and good["a/1#1"][1] == Side("two")
    assert good["4#0"] == ("w_t2i", Side("x" * 700), (Side(None, b"y" * 1500),))
    assert f"{'d' * 120}/5" in good and len(good) == 2 + 3 + 2 + 2
    refused = {one.row: one.reason for one in found if isinstance(one, Reject)}
    assert sorted(refused) == [3, 4, 5]
    assert "'README' has 0 pictures" in refused[3] and "'2' has no caption" in refused[4]
    assert "'3' has 0 pictures" in refused[5]


def test_webdataset_one_direction_keeps_its_name_and_a_pool_has_its_items(tmp_path):
    path = write_tar(tmp_path / "s.tar", SHARD)
    t2i = [one for one in read_all(format="webdataset", path=path, direction="t2i") if isinstance(one, Record)]
    assert {one.dataset for one in t2i} == {"s"} and len(t2i) == 4
    pool = read_all(format="webdataset", path=path, direction="t2i", role="pool")
    assert [one.item for one in pool if isinstance(one, Record)][:2] == [Side(None, b"pic0"), Side(None, b"pic1")]


def test_webdataset_rows_name_pictures_of_their_own_sample_only(tmp_path):
    (tmp_path / "secret.png").write_bytes(b"secret")
    row = {"query_text": "q", "pos_image": ["p0.png", "P1.jpg"], "negatives": [["n", None], {"image": "n.png"}]}
    evil = {"query_text": "q", "pos_image": "../secret.png"}
    members = {
        "0.json": json.dumps(row).encode(),
        "0.p0.png": b"0",
        "0.p1.jpg": b"1",
        "0.n.png": b"n",
        "1.json": json.dumps(evil).encode(),
        "2.json": json.dumps(evil | {"pos_image": str(tmp_path / "secret.png")}).encode(),
        "3.json": b"[1]",
    }
    good, *bad = read_all(format="webdataset", path=write_tar(tmp_path / "r.tar", members))
    assert good.row_id is None and good.positives == (Side(None, b"0"), Side(None, b"1"))
    assert good.negatives == (Side("n"), Side(None, b"n"))
    assert "sample '1' has no member '../secret.png'; it has json" in bad[0].reason
    assert f"sample '2' has no member '{str(tmp_path)[:8]}" in bad[1].reason
    assert "member '3.json' holds list, not an object" in bad[2].reason


def test_webdataset_links_and_oversized_samples_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("unime_ray.corpus.tar.MAX_SAMPLE_BYTES", 1000)
    path = tmp_path / "s.tar"
    write_tar(path, {"0.jpg": b"x" * 1200, "0.txt": b"t"})
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("1.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    first, second = read_all(format="webdataset", path=path)
    assert "larger than 1000 bytes" in first.reason and "is a link" in second.reason


@pytest.mark.parametrize("rows_per_task", [1, 512])
def test_a_truncated_or_damaged_archive_is_refused_from_there_on(tmp_path, rows_per_task):
    path = write_tar(tmp_path / "s.tar", {f"{n}.{e}": e.encode() * 600 for n in range(3) for e in ("jpg", "txt")})
    whole = path.read_bytes()
    path.write_bytes(whole[: 6 * 2560 - 800])  # within the last member's content
    found = read_all(rows_per_task, format="webdataset", path=path, direction="i2t")
    assert [isinstance(one, Record) for one in found] == [True, True, False]
    assert found[2].reason == "sample '2': member '2.txt' is cut short: the archive ends within it"
    path.write_bytes(whole[:10240] + b"garbage!" * 64 + whole[10240 + 512 :])
    found = read_all(rows_per_task, format="webdataset", path=path, direction="i2t")
    assert [isinstance(one, Record) for one in found] == [True, True, False]
    assert found[2].reason.startswith("no readable tar header at byte 10240")
    path.write_bytes(b"no tar at all" * 100)
    (only,) = read_all(rows_per_task, format="webdataset", path=path)
    assert only.reason.startswith("no readable tar header at byte 0")
    path.write_bytes(b"")
    with pytest.raises(CorpusError, match="archive is empty"):
        read_all(format="webdataset", path=path)


TRAIN_ROW = {
    "qry": "<|image_1|>\nWhat is it?",
    "qry_image_path": "a/q.jpg",
    "pos_text": "a cat",
    "pos_image_path": "",
    "neg_text": "",
    "neg_image_path": "",
}


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_mmeb_training_rows(tmp_path, suffix):
    folder = tmp_path / "OK-VQA"
    folder.mkdir()
    path = folder / f"train-00000-of-00002.{suffix}"
    rows = [
        TRAIN_ROW,
        TRAIN_ROW | {"neg_text": "<|image_1|>\nno", "neg_image_path": "n.jpg"},
        TRAIN_ROW | {"qry": None},
    ]
    rows[2] = rows[2] | {"qry_image_path": None}
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain, with_negative, empty = read_all(format="mmeb_train", path=tmp_path, image_root="/m")
    assert shown([plain]) == [("OK-VQA", Side("<|image_1|>\nWhat is it?", "/m/a/q.jpg"), (Side("a cat"),))]
    assert plain.negatives == () and with_negative.negatives == (Side("<|image_1|>\nno", "/m/n.jpg"),)
    assert empty.reason == "query is empty: neither text nor picture"


def test_mmeb_evaluation_rows_bring_their_candidates(tmp_path):
    row = {"qry_text": "which?", "qry_img_path": "", "tgt_text": ["gold", "b"], "tgt_img_path": ["", "b.png"]}
    bad = [
        {"tgt_text": [], "tgt_img_path": []},
        {"tgt_text": ["", "b"], "tgt_img_path": ["", ""]},
        {"tgt_img_path": [""]},
        {"tgt_text": ["gold", ""], "tgt_img_path": ["", ""]},
    ]
    lines = [row, *(row | one for one in bad), {"question": "?"}]
    (tmp_path / "e.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    good, *refused = read_all(format="mmeb_eval", path=tmp_path / "e.jsonl", split="test")
    assert (good.split, good.positives, good.query) == ("test", (Side("gold"),), Side("which?"))
    assert good.candidates == (Side("gold"), Side("b", str(tmp_path / "b.png")))
    assert [one.reason for one in refused] == [
        "the candidate list is empty",
        "the candidate list lacks its gold: the first entry is empty",
        "'tgt_text' and 'tgt_img_path' are not two lists of the same length",
        "candidates[2] is empty: neither text nor picture",
        "the row has no 'qry_text'; it has question. Is it another format?",
    ]


def test_a_candidate_list_without_a_positive_is_refused(tmp_path):
    rows = [{"query_text": "q", "pos_text": "p", "candidates": ["p", "x"]}, {"query_text": "q", "pos_text": "p"}]
    rows.append(rows[1] | {"candidates": ["x", "y"]})
    (tmp_path / "e.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    source = Source(format="jsonl", path=str(tmp_path / "e.jsonl"), split="test")
    report = validate_corpus(CorpusConfig(sources=(source,), max_error_rate=0.5))
    assert [(one.row, one.reason) for one in report.rejects] == [
        (3, "the candidate list lacks its gold: none of its 2 entries is a positive of the row")
    ]


@pytest.mark.parametrize("rows_per_task", [1, 512])
def test_coco_captions(tmp_path, rows_per_task):
    content = {
        "images": [{"id": 7, "file_name": "7.jpg"}, {"id": 8, "file_name": "8.jpg"}, {"id": 9}],
        "annotations": [
            {"image_id": 7, "id": 1, "caption": " a dog "},
            {"image_id": 9, "id": 2, "caption": "x"},
            {"image_id": 7, "id": 3, "caption": "a pup"},
            {"image_id": 5, "id": 4, "caption": "x"},
        ],
    }
    (tmp_path / "captions_val.json").write_text(json.dumps(content))
    found = read_all(rows_per_task, format="coco", path=tmp_path / "captions_val.json", image_root="/c")
    seven = Side(None, "/c/7.jpg")
    assert shown(found) == [
        ("captions_val_i2t", seven, (Side("a dog"), Side("a pup"))),
        ("captions_val_t2i", Side("a dog"), (seven,)),
        ("captions_val_t2i", Side("a pup"), (seven,)),
        (2, "8: no caption for this picture"),
        (3, "image 9 has no `file_name`"),
        (4, "annotation 4 names image 5, which is not in `images`"),
    ]
    pool = read_all(format="coco", path=tmp_path / "captions_val.json", role="pool", direction="i2t", dataset="c")
    assert [one.item for one in pool if isinstance(one, Record)] == [Side("a dog"), Side("a pup")]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not valid JSON"),
        ("[]", "holds list, not an object"),
        ('{"images": []}', "no list of objects 'annotations'"),
        ('{"images": [], "annotations": [{"bbox": []}]}', "no annotation has a `caption`"),
    ],
)
def test_other_json_than_coco_captions_is_an_error(tmp_path, text, reason):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(CorpusError, match=reason):
        read_all(format="coco", path=tmp_path / "x.json")


def test_flickr30k_in_its_three_files(tmp_path):
    sentences = [{"raw": "A dog ."}, {"raw": "A pup ."}]
    images = [{"filename": "1.jpg", "sentences": sentences, "split": "test"}, {"filename": "2.jpg"}]
    (tmp_path / "k.json").write_text(json.dumps({"images": images, "dataset": "flickr30k"}))
    (tmp_path / "r.token").write_text("1.jpg#0\tA dog .\n1.jpg#1\tA pup .\nbroken\n")
    (tmp_path / "p.csv").write_text(
        "image_name| comment_number| comment\n1.jpg| 0| A dog .\n1.jpg| 1| A pup .\n2.jpg| x\n"
    )
    (tmp_path / "c.csv").write_text('image,caption\n1.jpg,A dog .\n1.jpg,"A pup ."\n2.jpg\n')
    reasons = []
    for name in ("k.json", "r.token", "p.csv", "c.csv"):
        row, bad = read_all(format="flickr30k", path=tmp_path / name, direction="i2t", dataset="f", image_root="/f")
        assert shown([row]) == [("f", Side(None, "/f/1.jpg"), (Side("A dog ."), Side("A pup .")))]
        assert row.split == ("test" if name == "k.json" else "train")
        reasons.append(bad.reason)
    assert reasons == [
        "entry 2 has no `filename` with `sentences`",
        "line 3 does not hold a picture and its caption",
        "line 4 does not hold a picture and its caption",
        "line 4 does not hold a picture and its caption",
    ]


def save_to_disk(folder: Path, tables: list[pa.Table]) -> None:
    """The layout of `datasets`' `save_to_disk`, by hand."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{len(tables):05d}.arrow" for number in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))


@pytest.mark.parametrize("rows_per_task", [1, 3, 512])
def test_a_saved_dataset(tmp_path, rows_per_task):
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pictures = pa.array([{"bytes": b"%d" % n, "path": None} for n in range(5)], image)
    table = pa.table({"image": pictures, "caption": [[f"c{n}", "d"] for n in range(5)], "other": [1] * 5})
    save_to_disk(tmp_path / "set", [table, table.slice(0, 1)])
    (tmp_path / "set" / "cache-1.arrow").write_bytes(b"left by map")
    columns = Columns(query_image="image", pos_text="caption")
    found = read_all(rows_per_task, format="hf_dataset", path=tmp_path / "set", columns=columns, dataset="h")
    assert [one.row for one in found] == [1, 2, 3, 4, 5, 1]
    assert shown(found)[4] == ("h", Side(None, b"4"), (Side("c4"), Side("d")))


def test_saved_datasets_that_cannot_be_read(tmp_path):
    table = pa.table({"query_text": ["q"] * 4, "pos_text": ["p"] * 4})
    save_to_disk(tmp_path / "dict" / "train", [table])
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(CorpusError, match=r"with the splits train, test; name each .* `path: .*dict/train`"):
        read_all(format="hf_dataset", path=tmp_path / "dict")
    file = tmp_path / "dict" / "train" / "data-00000-of-00001.arrow"
    with pytest.raises(CorpusError, match="no column 'querry'"):
        read_all(format="hf_dataset", path=file.parent, columns=Columns(query_text="querry"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(CorpusError, match="cut short or damaged"):
        read_all(format="hf_dataset", path=file.parent)
    file.write_bytes(b"something else")
    with pytest.raises(CorpusError, match="not an Arrow stream"):
        read_all(format="hf_dataset", path=file.parent)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"format": "jsonl", "direction": "i2t"}, "`direction` belongs to"),
        ({"format": "mmeb_train", "role": "pool"}, "`role: pool` cannot read it"),
        ({"format": "mmeb_eval"}, "set `split: test`"),
    ],
)
def test_settings_that_do_not_fit_the_format(settings, reason):
    with pytest.raises(ValidationError, match=reason):
        Source(path="x", **settings)


def test_a_dataset_as_the_real_package_saves_it(tmp_path, tiny_pictures):
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    pictures = [Image.open(io.BytesIO(tiny_pictures[name])) for name in ("red", "blue")]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    made = datasets.Dataset.from_dict({"image": pictures, "text": ["r", "b"]}, features=features)
    made.save_to_disk(str(tmp_path / "saved"))
    columns = Columns(query_text="text", pos_image="image")
    first, second = read_all(format="hf_dataset", path=tmp_path / "saved", columns=columns)
    assert first.query == Side("r") and second.query == Side("b")
    decoded = Image.open(io.BytesIO(second.positives[0].image))
    assert decoded.size == (16, 16) and decoded.convert("RGB").getpixel((3, 3)) == (0, 0, 255)
