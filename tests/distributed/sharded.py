"""What one of two gloo ranks does to compare FSDP with DDP: `python -m tests.distributed.sharded ROOT RANK WORLD PORT
CASES OUT`. Rank 0 leaves the losses of each case in OUT; `CASES` maps a name to [section, checkpoint to start from,
checkpoint to stop at or null]."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.distributed.rank import join_ranks
from tests.distributed.scene import job_of, stepper_of
from unime_ray.config import EmbedderConfig
from unime_ray.train import embedder_objective, worker
from unime_ray.train.checkpoint import load_checkpoint, save_checkpoint
from unime_ray.train.log import StepLog
from unime_ray.train.loop import run_steps

IDENTITY = {"model": "m"}


class Stop(Exception):
    pass


def train(root: Path, name: str, section: dict[str, Any], start_from: str | None, stop: bool) -> list[float]:
    """Losses by step. Checkpoints go to `root/name`; with `stop`, the run ends at its first one."""
    config = EmbedderConfig.model_validate(section)
    job = job_of(root, config).model_copy(update={"artifact_uri": str(root / name)})
    setting = worker.prepare(job, config, torch.device("cpu"))
    objective = embedder_objective.make_objective(setting)
    stepper = stepper_of(objective, config)
    start = 0
    if start_from is not None:
        start = load_checkpoint(root / start_from, stepper.module, stepper.optimizer, IDENTITY)["step"]
    (root / name).mkdir(exist_ok=True)
    log = StepLog(str(root / name / "log.jsonl"), start)

    def save(done: int, metrics: dict[str, float]) -> None:
        folder = root / name if stepper.rank == 0 else None
        save_checkpoint(folder, stepper.module, stepper.optimizer, {"step": done}, IDENTITY)
        if stop:
            raise Stop

    try:
        run_steps(stepper, objective, start=start, position=setting.order.position, log=log, save=save)
        worker.export(stepper, setting, job)
    except Stop:
        pass
    if stepper.sharded:
        assert_split(stepper)
    return [line["loss"] for line in log.lines]


def assert_split(stepper: Any) -> None:
    """This rank holds half of the language model's weights and of the optimizer's moments, to one row."""
    weights = [weight for name, weight in stepper.module.named_parameters() if ".visual." not in name]
    moments = [value for state in stepper.optimizer.state.values() for value in state.values() if value.ndim]
    assert len(moments) == 2 * len(stepper.optimizer.state) > 0
    for tensors in (weights, moments):
        own, whole = (sum(t.numel() for t in found) for found in ([t.to_local() for t in tensors], tensors))
        assert abs(own / whole - 0.5) < 0.02


def main() -> None:
    root, rank, world, port, cases, out = sys.argv[1:]
    join_ranks(rank, world, port)
    found = {}
    for name, (section, start_from, stop) in json.loads(cases).items():
        found[name] = train(Path(root), name, section, start_from, stop)
        dist.barrier()
    if rank == "0":
        torch.save(found, out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
