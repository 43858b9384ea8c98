"""Two gloo workers on Ray Train: killed at any point and started again, they end with the same losses and weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from tests.distributed.drive import config_of
from tests.distributed.scene import NUM_QUERIES, SECTION
from unime_ray.artifacts import Run
from unime_ray.errors import TrainingError
from unime_ray.train.embedder import run_train_embedder
from unime_ray.train.log import read_log

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 24
"""So many that a worker killed a third of the way is killed at work."""
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


def wait_for(condition: Callable[[], Any], seconds: float = 1200.0) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def steps_done(scene: Path, name: str) -> int:
    lines = read_log(Run(str(scene / "run")).artifact("embedder", name).child("log.jsonl"))
    return lines[-1]["step"] if lines else 0


def start_driver(scene: Path, name: str) -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "tests.distributed.drive", str(scene), name, json.dumps(TWO_WORKERS)],
        cwd=REPOSITORY,
        env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"PYTHONPATH": path},
    )


def workers_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "RayTrainWorker" in " ".join(child.cmdline())]


def test_a_killed_worker_changes_nothing(scene, undisturbed):
    driver = start_driver(scene, "worker")
    try:
        wait_for(lambda: steps_done(scene, "worker") >= 7)
        workers_of(driver)[-1].send_signal(signal.SIGKILL)
        assert driver.wait(timeout=1200) == 0
    finally:
        driver.kill()
    found = outcome(scene, "worker")
    assert_same(found, undisturbed)
    assert found["manifest"].counts["resumed_at_step"] in range(3, STEPS, 3)


def test_a_killed_driver_goes_on_from_the_checkpoint(scene, undisturbed):
    driver = start_driver(scene, "driver")
    try:
        wait_for(lambda: steps_done(scene, "driver") >= 7)
    finally:
        driver.kill()
        driver.wait()
    assert Run(str(scene / "run")).artifact("embedder", "driver").manifest() is None
    run_train_embedder(Run(str(scene / "run")), config_of(scene, "driver", TWO_WORKERS), "driver")
    found = outcome(scene, "driver")
    assert_same(found, undisturbed)
    assert found["manifest"].counts["resumed_at_step"] in range(3, STEPS, 3)
    assert found["manifest"].counts["training_rows"] == NUM_QUERIES


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
