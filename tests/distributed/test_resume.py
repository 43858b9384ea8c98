"""Two gloo workers on Ray Train: killed at any point and started again, they end with the same losses and weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from tests.distributed.drive import HELD, config_of, registered_step, wait_for
from tests.distributed.scene import NUM_QUERIES, SECTION
from tests.unit.test_training_loop import Training
from unime_ray.artifacts import Run
from unime_ray.errors import TrainingError
from unime_ray.train.checkpoint import FILE
from unime_ray.train.embedder import run_train_embedder
from unime_ray.train.launch import CHECKPOINTS
from unime_ray.train.log import StepLog, read_log

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 11
LAST_CHECKPOINT = HELD - HELD % 3
# Dropout on: the random numbers of a step must come back too.
TWO_WORKERS = SECTION | {
    "lora": {"rank": 4, "alpha": 8.0, "dropout": 0.1},
    "num_workers": 2,
    "steps": STEPS,
    "checkpoint_every": 3,
    "log_every": 1,
    "max_failures": 1,
}


@pytest.fixture(scope="module")
def undisturbed(scene: Path, ray_cluster: None) -> dict[str, Any]:
    """What a run that nothing happens to leaves."""
    run_train_embedder(Run(str(scene / "run")), config_of(scene, "undisturbed", TWO_WORKERS), "undisturbed")
    return outcome(scene, "undisturbed")


def outcome(scene: Path, name: str) -> dict[str, Any]:
    artifact = Run(str(scene / "run")).artifact("embedder", name)
    return {
        "losses": {line["step"]: line["loss"] for line in read_log(artifact.child("log.jsonl"))},
        "weights": load_file(artifact.child("adapter", "adapter_model.safetensors")),
        "manifest": artifact.require(),
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(found["losses"]) == list(range(1, STEPS + 1))
    assert found["losses"] == expected["losses"]
    for name, weight in expected["weights"].items():
        assert (found["weights"][name] == weight).all(), name


def start_driver(scene: Path, name: str, mode: str = "held", section: dict = TWO_WORKERS) -> subprocess.Popen[bytes]:
    (scene / "hold").touch()
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "tests.distributed.drive", str(scene), name, json.dumps(section), mode],
        cwd=REPOSITORY,
        env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"PYTHONPATH": path},
    )


def until_held(scene: Path, driver: subprocess.Popen[bytes], name: str) -> None:
    """Wait until training stands still at step `HELD` with its last checkpoint registered."""
    wait_for(lambda: driver.poll() is not None or registered_step(scene, name) == LAST_CHECKPOINT, 300)
    assert driver.poll() is None


def half_a_checkpoint(checkpoints: Path) -> None:
    """What a driver leaves that is killed while the newest checkpoint is being copied."""
    whole = next(checkpoints.glob(f"checkpoint_*/{FILE}")).read_bytes()
    newest = checkpoints / "checkpoint_2999-01-01_00-00-00.000000"
    newest.mkdir()
    (newest / FILE).write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_changes_nothing(scene, undisturbed, rank):
    """Rank 1 is killed before a step while rank 0 waits for it in an all-reduce, or rank 0 in that."""
    name = f"worker{rank}"
    driver = start_driver(scene, name)
    try:
        until_held(scene, driver, name)
        os.kill(int((scene / "pids" / str(rank)).read_text()), signal.SIGKILL)
        (scene / "hold").unlink()
        assert driver.wait(timeout=400) == 0
    finally:
        driver.kill()
    found = outcome(scene, name)
    assert_same(found, undisturbed)
    assert found["manifest"].counts["resumed_at_step"] == LAST_CHECKPOINT


def test_a_killed_driver_goes_on_from_the_checkpoint(scene, undisturbed):
    driver = start_driver(scene, "driver")
    try:
        until_held(scene, driver, "driver")
    finally:
        driver.kill()
        driver.wait()
    # Workers outlive their driver until Ray notices; let go now, they would train on beside the second attempt.
    workers = [int(path.read_text()) for path in (scene / "pids").iterdir()]
    wait_for(lambda: not any(map(psutil.pid_exists, workers)), 60)
    (scene / "hold").unlink()
    half_a_checkpoint(Path(Run(str(scene / "run")).artifact("embedder", "driver").child(CHECKPOINTS)))
    assert Run(str(scene / "run")).artifact("embedder", "driver").manifest() is None
    run_train_embedder(Run(str(scene / "run")), config_of(scene, "driver", TWO_WORKERS), "driver")
    found = outcome(scene, "driver")
    assert_same(found, undisturbed)
    assert found["manifest"].counts["resumed_at_step"] == LAST_CHECKPOINT
    assert found["manifest"].counts["training_rows"] == NUM_QUERIES


def test_a_node_that_comes_is_put_to_work_and_one_that_is_lost_ends_nothing(scene, tmp_path):
    """Elastic `num_workers`: one worker, then two, then one again give the losses of one process to rounding."""
    # Dropout is seeded by rank: with other ranks there would be other losses.
    section = TWO_WORKERS | {"lora": {"rank": 4, "alpha": 8.0}, "num_workers": [1, 2], "resize_check_seconds": 1.0}
    driver = start_driver(scene, "elastic", "elastic", section)
    try:
        assert driver.wait(timeout=600) == 0
    finally:
        driver.kill()
    found = outcome(scene, "elastic")
    assert (scene / "worlds-elastic").read_text().split() == ["1", "2", "1"]
    assert found["manifest"].counts["workers"] == 1
    assert found["manifest"].counts["resumed_at_step"] == LAST_CHECKPOINT
    assert list(found["losses"]) == list(range(1, STEPS + 1))
    expected = Training(scene, **section).run(StepLog(str(tmp_path / "log.jsonl"), 0))
    assert list(found["losses"].values()) == pytest.approx(expected, rel=1e-5)


def test_the_same_run_is_not_trained_again(scene, undisturbed):
    manifest = run_train_embedder(
        Run(str(scene / "run")), config_of(scene, "undisturbed", TWO_WORKERS | {"num_workers": 1}), "undisturbed"
    )
    assert manifest == undisturbed["manifest"]  # created_at included


def test_a_loss_that_is_not_finite_stops_at_once_and_names_its_queries(scene, undisturbed):
    bad = TWO_WORKERS | {"temperature": 1e-45, "max_failures": 5}
    with pytest.raises(TrainingError, match=r"step 1: the loss is nan at queries [0-9a-f]{32}"):
        run_train_embedder(Run(str(scene / "run")), config_of(scene, "bad", bad), "bad")
    assert Run(str(scene / "run")).artifact("embedder", "bad").manifest() is None
