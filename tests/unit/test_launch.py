"""Before any worker starts: what is refused, and which checkpoints are kept, without Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import ray

from tests.distributed.drive import config_of
from tests.distributed.scene import SECTION
from unime_ray.artifacts import Artifact, Run
from unime_ray.config import TrainConfig
from unime_ray.errors import ConfigError, TrainingError, UnimeError
from unime_ray.train import launch
from unime_ray.train.embedder import run_train_embedder


class Started(Exception):
    """Workers would start now."""


@pytest.fixture(autouse=True)
def no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(*_: Any) -> None:
        raise Started

    monkeypatch.setattr(launch, "fit", fit)


def train(scene: Path, **changes: Any) -> Artifact:
    run = Run(str(scene / "run"))
    run_train_embedder(run, config_of(scene, "e", SECTION | changes), "e")
    return run.artifact("embedder", "e")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_negatives": 4}, TrainingError, "query [0-9a-f]{32} has 3 hard negatives, training wants 4"),
        ({"num_workers": [1, 7]}, TrainingError, "7 workers share a batch of 6 queries"),
        ({"judge": "imported"}, UnimeError, "no source of the corpus brings hard negatives"),
        ({"loss": "infonce", "start_from": None, "model": "/nowhere"}, UnimeError, "/nowhere"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_any_worker_starts(scene, changes, error, message):
    with pytest.raises(error, match=message):
        train(scene, **changes)


def test_a_tracker_that_is_not_installed_is_refused(scene, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="tracker: wandb is not installed"):
        train(scene, tracker=["wandb"])


def test_checkpoints_outlive_a_kill_but_not_another_config(scene):
    artifact = Run(str(scene / "run")).artifact("embedder", "e")
    kept = Path(artifact.child(launch.CHECKPOINTS, "checkpoint_1"))
    for changes, survives in (({}, True), ({"num_workers": 2, "max_failures": 9}, True), ({"steps": 7}, False)):
        with pytest.raises(Started):
            train(scene)
        kept.mkdir(parents=True, exist_ok=True)
        with pytest.raises(Started):
            train(scene, **changes)
        assert kept.exists() == survives, changes


def snapshot(artifact: Artifact, text: str) -> Path:
    folder = Path(artifact.child(launch.CHECKPOINTS))
    (folder / "checkpoint_1").mkdir(parents=True, exist_ok=True)
    (folder / launch.SNAPSHOT).write_text(text)
    return folder


def test_a_list_of_checkpoints_that_cannot_be_used_is_dropped_with_them(tmp_path):
    artifact = Run(str(tmp_path)).artifact("embedder", "e")
    known = {"ray_version": ray.__version__, "checkpoint_results": [{"checkpoint_dir_name": "checkpoint_1"}]}
    gone = {"checkpoint_results": [{"checkpoint_dir_name": name} for name in ("checkpoint_1", "checkpoint_2")]}
    for text, usable in (
        (json.dumps(known), True),
        (json.dumps(known)[:40], False),
        ("", False),
        (json.dumps(known | {"ray_version": "1.0"}), False),
        (json.dumps(known | gone), False),
    ):
        folder = snapshot(artifact, text)
        launch._drop_unusable_snapshot(artifact)
        assert folder.exists() == usable, text


def test_workers_that_can_never_have_room_are_refused(caplog):
    section = TrainConfig(num_workers=(2, 9), cpus_per_worker=2.5)
    launch.check_room(section, {"CPU": 5.0}, can_grow=False)
    with pytest.raises(ConfigError, match="2 training workers need 5 CPUs, the cluster has 4; lower num_workers or"):
        launch.check_room(section, {"CPU": 4.0}, can_grow=False)
    with pytest.raises(ConfigError, match="1 training workers need 1 GPUs, the cluster has 0"):
        launch.check_room(TrainConfig(use_gpu=True), {"CPU": 4.0}, can_grow=False)
    assert not caplog.records
    launch.check_room(section, {"CPU": 4.0}, can_grow=True)
    assert "waiting until it grows" in caplog.text
