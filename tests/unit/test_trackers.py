"""TensorBoard and Weights & Biases (offline) as they are: what a training step tells them can be read back."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate import PartialState

from unime_ray.config import TrainConfig
from unime_ray.errors import ConfigError
from unime_ray.train import job
from unime_ray.train.launch import progress_numbers
from unime_ray.train.log import StepLog, read_log
from unime_ray.train.trackers import FOLDER, Trackers


@pytest.fixture(autouse=True)
def on_cpu() -> None:
    """accelerate's trackers ask which process this is; whoever asks first settles the device for the session."""
    PartialState(cpu=True)


def records_of(log: bytes) -> Iterator[bytes]:
    """The records of a `.wandb` file, a LevelDB log after a header of 7 bytes: blocks of 32 KiB, in them chunks of
    (checksum, length, whole/first/middle/last) and data."""
    at, parts = 7, b""
    while at + 7 <= len(log):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        length, kind = struct.unpack("<HB", log[at + 4 : at + 7])
        parts += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


def line(step: int, loss: float) -> dict[str, float]:
    return {"step": step, "loss": loss, "epoch": 0, "queries_per_second": 2.0 * step}


def config(*trackers: str) -> TrainConfig:
    return TrainConfig.model_validate({"tracker": trackers})


def test_tensorboard_has_each_step_once_also_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, steps in ((0, (1, 2, 3, 4)), (2, (3, 4, 5))):
        with Trackers(str(tmp_path), config("tensorboard"), start) as trackers:
            log = StepLog(str(tmp_path / "log.jsonl"), start, trackers)
            for step in steps:
                log.add(line(step, loss=step + 10 * start))
            log.flush(force=True)
    found = EventAccumulator(str(tmp_path / FOLDER / "tensorboard")).Reload()
    events = found.Scalars("train/loss")
    assert [(event.step, event.value) for event in events] == [(1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0), (5, 25.0)]
    assert "train/queries_per_second" in found.Tags()["scalars"] and "train/epoch" not in found.Tags()["scalars"]
    assert [entry["step"] for entry in read_log(str(tmp_path / "log.jsonl"))] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_wandb_offline_leaves_a_run_to_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole when `Trackers` end, on an object store too, whose copy is all that remains: wandb's service writes the
    file after `finish` has returned, now and then."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    as_object_store(tmp_path, monkeypatch)
    steps, wait, copy = [], wandb.teardown, Trackers.sync
    monkeypatch.setattr(wandb, "teardown", lambda: (wait(), steps.append("waited")))
    monkeypatch.setattr(Trackers, "sync", lambda self: (copy(self), steps.append("copied")))
    for name in ("one", "two"):
        with Trackers(f"s3://bucket/{name}", config("wandb"), 0) as trackers:
            for step in (1, 2, 3):
                trackers.log(line(step, loss=0.5 * step))
        (written,) = (tmp_path / name / FOLDER).glob("wandb/offline-run-*/*.wandb")
        losses = []
        for data in records_of(written.read_bytes()):
            history = Record.FromString(data).history
            items = {item.key or "/".join(item.nested_key): item.value_json for item in history.item}
            if "train/loss" in items:
                losses.append((history.step.num, float(items["train/loss"])))
        assert losses == [(1, 0.5), (2, 1.0), (3, 1.5)], name
    assert steps == ["waited", "copied"] * 2


def as_object_store(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses `s3://bucket/...` are kept in `folder`, by a file system that is not the local one."""
    import pyarrow.fs as pafs

    from unime_ray.train import trackers as module

    store = pafs.SubTreeFileSystem(str(folder), pafs.LocalFileSystem())
    monkeypatch.setattr(module, "filesystem", lambda uri: (store, uri.removeprefix("s3://bucket/")))


def test_on_an_object_store_files_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_object_store(tmp_path, monkeypatch)
    with Trackers("s3://bucket/model", config("tensorboard"), 0) as trackers:
        trackers.log(line(1, 0.5))
        trackers.sync()
        assert list(tmp_path.glob("model/trackers/tensorboard/events*"))
        local = trackers.folder
    assert not local.exists()


def test_a_library_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"tracker: wandb is not installed; pip install 'unime-ray\[wandb\]'"):
        job.check_trackers(["wandb"])


def test_the_progress_line_says_loss_rates_and_memory() -> None:
    recent = [{"loss": 1.0, "queries_per_second": 2.0, "tokens_per_second": 300.0, "memory_mb": 1024}] * 2
    assert progress_numbers(recent) == "loss 1.0000  2.0 queries/s  300 tokens/s  1.0 GB"
