"""What one training worker does: load, adapt, go on from the last checkpoint, train, and (rank 0) save the model.

Runs inside Ray Train; `launch` starts it.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import ray.train
import ray.train.torch
import ray.train.v2._internal.execution.context
import torch
from torch import Tensor, nn

from unime_ray.artifacts import filesystem, join, local_folder, remove
from unime_ray.config import TrainConfig
from unime_ray.corpus.payload import PayloadStore
from unime_ray.models.backbone import Backbone
from unime_ray.models.lora import apply_lora, merge_and_save
from unime_ray.train.checkpoint import load_checkpoint, save_checkpoint, trainable_state
from unime_ray.train.collate import SegmentStore
from unime_ray.train.data import BatchOrder, RowFile
from unime_ray.train.job import TrainingJob
from unime_ray.train.log import LOG, StepLog
from unime_ray.train.loop import Objective, Stepper, run_steps
from unime_ray.train.text_data import open_rows
from unime_ray.train.trackers import Trackers


@dataclass(frozen=True)
class Setting:
    """What an objective is made of."""

    backbone: Backbone
    adapted: nn.Module
    """The backbone's model with its adapters, as `apply_lora` gave it."""
    examples: RowFile
    order: BatchOrder
    store: SegmentStore
    config: TrainConfig


def work(
    job: TrainingJob, section: type[TrainConfig], make_objective: Callable[[Setting], Objective[Any]]
) -> dict[str, Any]:
    """Train on this rank. Rank 0's return value is what the manifest counts.

    Raises:
        TrainingError: see `run_steps` and `load_checkpoint`.
    """
    config = section.model_validate(job.section)
    # Ray Train logs every report under its file's name, which `LoggingConfig` does not reach.
    logging.getLogger(ray.train.v2._internal.execution.context.__file__).setLevel(logging.WARNING)
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(config.cpus_per_worker)))
    setting = prepare(job, config, device)
    objective = make_objective(setting)
    stepper = Stepper(objective, config, use_gpu=device.type != "cpu")
    start = _resume(stepper, job)

    def save(done: int, metrics: dict[str, float]) -> None:
        _report(stepper, setting.order, job, done, metrics)

    with Trackers(job.artifact_uri, config, start) if stepper.rank == 0 else nullcontext() as trackers:
        log = StepLog(join(job.artifact_uri, LOG), start, trackers) if stepper.rank == 0 else None
        run_steps(stepper, objective, start=start, position=setting.order.position, log=log, save=save)
    export(stepper, setting, job)
    return _counts(stepper, setting, log, start)


def prepare(job: TrainingJob, config: TrainConfig, device: torch.device) -> Setting:
    """Backbone with adapters, rows, order and payload."""
    # What is to be sharded moves to the device part by part, since it need not fit there whole.
    backbone, adapted = _adapted(job, config, torch.device("cpu") if config.strategy == "fsdp" else device)
    if config.feature_cache_mb is not None:
        backbone.limit_feature_cache(config.feature_cache_mb << 20)
    if config.gradient_checkpointing:
        backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
    examples = open_rows(job.examples_uri)
    order = BatchOrder(len(examples), config.batch_queries, config.seed)
    store = SegmentStore(PayloadStore(job.images_uri, job.items_uri), backbone)
    return Setting(backbone, adapted, examples, order, store, config)


def _adapted(job: TrainingJob, config: TrainConfig, device: torch.device) -> tuple[Backbone, nn.Module]:
    # With adapters the frozen weights may be half precision; all-weights training keeps float32 and autocasts.
    dtype = config.dtype if config.lora.rank else "float32"
    backbone = Backbone.load(
        local_folder(job.model), revision=job.revision, dtype=dtype, device=device, pixels=job.pixels
    )
    torch.manual_seed(config.seed)
    return backbone, apply_lora(backbone.model, config.lora)


def _resume(stepper: Stepper, job: TrainingJob) -> int:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        where = checkpoint.path
        return load_checkpoint(Path(folder), stepper.module, stepper.optimizer, job.identity, where)["step"]


def _report(stepper: Stepper, order: BatchOrder, job: TrainingJob, done: int, metrics: dict[str, float]) -> None:
    """Hand a checkpoint to Ray Train. All ranks must call it; only here, since a report waits for the controller's
    next poll: the progress line reads `log.jsonl` instead."""
    epoch, batch = order.position(done)
    position = {"step": done, "epoch": epoch, "batch": batch}
    if stepper.rank != 0:
        save_checkpoint(None, stepper.module, stepper.optimizer, position, job.identity)
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory(prefix="unime-ray-checkpoint-") as folder:
        save_checkpoint(Path(folder), stepper.module, stepper.optimizer, position, job.identity)
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def export(stepper: Stepper, setting: Setting, job: TrainingJob) -> None:
    """Rank 0 writes the trained model; all ranks must call it, since a sharded one is put together by all."""
    backbone, adapted = setting.backbone, setting.adapted
    if stepper.sharded:
        weights = trainable_state(stepper.module, keep=stepper.rank == 0)
        if stepper.rank == 0:
            backbone, adapted = _put_together(job, setting.config, weights)
    if stepper.rank == 0:
        _save_model(backbone, adapted, job.artifact_uri)


def _put_together(job: TrainingJob, config: TrainConfig, weights: dict[str, Tensor]) -> tuple[Backbone, nn.Module]:
    """The base checkpoint in this process's memory, with the trained weights (names as the training module's)."""
    backbone, adapted = _adapted(job, config, torch.device("cpu"))
    with torch.no_grad():
        for name, weight in backbone.model.named_parameters(prefix="model"):
            if name in weights:
                weight.copy_(weights[name])
    return backbone, adapted


def _save_model(backbone: Backbone, adapted: nn.Module, artifact_uri: str) -> None:
    """Merged checkpoint to `model/`, adapter (if there is one) to `adapter/`, on whatever storage the run is on."""
    with tempfile.TemporaryDirectory(prefix="unime-ray-model-") as folder:
        merge_and_save(adapted, backbone, Path(folder) / "model", Path(folder) / "adapter")
        for part in sorted(Path(folder).iterdir()):
            target = join(artifact_uri, part.name)
            remove(target)
            fs, path = filesystem(target)
            fs.create_dir(path, recursive=True)
            pafs.copy_files(str(part), path, source_filesystem=pafs.LocalFileSystem(), destination_filesystem=fs)


def _counts(stepper: Stepper, setting: Setting, log: StepLog | None, start: int) -> dict[str, Any]:
    lines = log.lines if log is not None else []
    tail = lines[-max(1, len(lines) // 10) :]
    return {
        "steps": len(lines),
        "resumed_at_step": start,
        "training_rows": len(setting.examples),
        "epochs": round(setting.config.steps / setting.order.batches_per_epoch, 3),
        "trainable_parameters": sum(weight.numel() for weight in stepper.weights),
        "parameters": sum(weight.numel() for weight in stepper.module.parameters()),
        "workers": stepper.world,
        "first_loss": lines[0]["loss"] if lines else None,
        "final_loss": sum(line["loss"] for line in tail) / len(tail) if tail else None,
        "training_seconds": log.seconds if log is not None else None,
        "queries_per_second": _mean_rate(lines, "queries_per_second"),
        "items_per_second": _mean_rate(lines, "items_per_second"),
    }


def _mean_rate(lines: list[dict[str, Any]], name: str) -> float | None:
    seconds = sum(line["step_seconds"] for line in lines)
    return round(sum(line[name] * line["step_seconds"] for line in lines) / seconds, 2) if seconds else None
