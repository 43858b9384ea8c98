"""A small run whose corpus and run folder lie on S3; what it did is printed as one line of JSON.

Usage: python s3_driver.py BUCKET_URI MODEL_FOLDER
"""

from __future__ import annotations

import json
import sys
import time

import mining_run

from unime_ray.artifacts import Run, join
from unime_ray.cluster import connected
from unime_ray.config import RunConfig
from unime_ray.stages.duplicates import run_duplicates
from unime_ray.stages.embed import run_embed
from unime_ray.stages.ingest import run_ingest
from unime_ray.stages.judge import run_judge
from unime_ray.stages.retrieve import run_retrieve
from unime_ray.stages.select import run_select


def main(bucket: str, model: str) -> None:
    sources = [
        {"format": "jsonl", "path": join(bucket, "corpus", "train.jsonl"), "dataset": "d"},
        {"format": "webdataset", "path": join(bucket, "corpus", "*.tar"), "dataset": "d", "direction": "t2i"},
        {"format": "hf_dataset", "path": join(bucket, "corpus", "saved"), "dataset": "d"},
        {"format": "coco", "path": join(bucket, "corpus", "coco.json"), "dataset": "d", "direction": "i2t"},
    ]
    config = RunConfig.model_validate(
        {
            "run": join(bucket, "run"),
            "corpus": {"sources": sources, "rows_per_task": 4, "max_error_rate": 0.2},
            "embed": {"model": model},
            "judges": {"judge": {"model": model}},
            "duplicates": {"methods": ["phash"], "leak": "drop"},
        }
    )
    run = Run(config.run)
    run.check_writable()
    with connected():
        first, seconds = all_stages(run, config)
        again, seconds_again = all_stages(run, config)
    told = {
        "same": first == again,
        "seconds": [seconds, seconds_again],
        "rows": {one.key: one.require().rows for one in run.artifacts()},
        "rejects": run.artifact("rejects", "ingest").read(["source", "reason"]).to_pylist(),
        "negatives": run.artifact("hard_negatives", "judge").read().num_rows,
    }
    print(json.dumps(told))


def all_stages(run: Run, config: RunConfig) -> tuple[list[str], float]:
    """Fingerprints and creation times of what each stage left, and the seconds it all took."""
    clock = time.monotonic()
    manifests = [
        run_ingest(run, config),
        run_embed(run, config, load=mining_run.load_fake_embedder),
        run_duplicates(run, config),
        run_retrieve(run, config),
        run_judge(run, config, "judge", load=mining_run.load_fake_judge),
        run_select(run, config, "judge"),
    ]
    return [one.fingerprint + one.created_at for one in manifests], time.monotonic() - clock


if __name__ == "__main__":
    main(*sys.argv[1:])
