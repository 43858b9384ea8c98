"""The printed table of results stays readable however many arms there are."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pytest
from rich.console import Console

from unime_ray.artifacts import Manifest, Run, write_text
from unime_ray.evaluation import render_results
from unime_ray.schemas import METRICS

ARMS = ("base", "infonce", "unime_v2", "unime_v2_oracle", "unime_v1_stage1", "unime_v1")
TEST_SETS = ("emoji_i2t_compositions", "emoji_t2i_concepts", "mean")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(str(tmp_path))
    shared = {"split": "test", "meta_task": None, "stage": "retrieve", "metric": "hit@1", "queries": 50}
    rows = [
        shared | {"dataset": name, "model": arm, "value": number / 10, "low": 0.0, "high": 0.9}
        for name in TEST_SETS
        for number, arm in enumerate(ARMS)
    ]
    artifact = run.artifact("metrics")
    artifact.write(pa.Table.from_pylist(rows, schema=METRICS), METRICS)
    artifact.finish(Manifest(table="metrics", stage="evaluate", fingerprint="0", rows=len(rows)))
    write_text(artifact.child("arms.json"), json.dumps([{"name": arm, "stage": "retrieve"} for arm in ARMS]))
    return run


@pytest.mark.parametrize(("width", "tables"), [(200, 1), (80, 2), (60, 5)])
def test_arms_that_do_not_fit_go_into_further_tables_whole(run, width, tables):
    console = Console(width=width, file=io.StringIO())
    render_results(run, console)
    shown = console.file.getvalue()
    assert shown.count("hit@1, %") == shown.count(" base") == tables
    assert all(shown.count(f" {arm}") >= 1 for arm in ARMS)
    assert all(shown.count(name) == tables for name in TEST_SETS)
    assert "…" not in shown
