"""A run whose corpus and folder lie on S3 (moto's server): the stages up to hard negatives, then skipped all."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import mining_run
import pyarrow as pa
import pytest

from tests.s3_server import s3_bucket

pytest.importorskip("imagehash")


@pytest.fixture
def bucket(tiny_pictures):
    """(URI of a bucket that holds a corpus, environment of its users)."""
    with s3_bucket({f"corpus/{key}": data for key, data in corpus_files(tiny_pictures).items()}) as found:
        yield found


def corpus_files(pictures: dict[str, bytes]) -> dict[str, bytes]:
    files = {f"images/{name}.png": data for name, data in pictures.items()}
    rows = [
        {"query_text": f"q{n}", "pos_image": f"images/{name}.png"} for n, name in enumerate(["red", "blue", "gone"])
    ]
    files["train.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows).encode()
    shard = io.BytesIO()
    with tarfile.open(fileobj=shard, mode="w") as archive:
        for name in ("green", "yellow"):
            for suffix, data in (("png", pictures[name]), ("txt", name.encode())):
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    saved, table = io.BytesIO(), pa.table({"query_text": [f"s{n}" for n in range(9)], "pos_text": ["p"] * 9})
    with pa.ipc.new_stream(saved, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    images = [{"id": 1, "file_name": "images/black.png"}]
    coco = {"images": images, "annotations": [{"image_id": 1, "caption": "black"}]}
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
    return files | {
        "shard-0.tar": shard.getvalue(),
        "saved/data-00000-of-00001.arrow": saved.getvalue(),
        "saved/state.json": json.dumps(state).encode(),
        "coco.json": json.dumps(coco).encode(),
    }


@pytest.mark.slow
def test_mining_on_s3_and_again_without_work(bucket, tmp_path):
    uri, environment = bucket
    model = mining_run.model_folder(tmp_path / "model")
    driver = Path(__file__).parent / "s3_driver.py"
    paths = os.pathsep.join(filter(None, [str(driver.parent), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, str(driver), uri, model],
        env=environment | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    print(told["seconds"])
    assert told["same"] and told["negatives"] == told["rows"]["hard_negatives/judge"] > 0
    assert told["rows"]["images"] == 5 and told["rows"]["qrels"] == 2 + 2 + 9 + 1
    (reject,) = told["rejects"]
    assert reject["source"].startswith("s3://bucket/corpus/train.jsonl") and "gone.png" in reject["reason"]
