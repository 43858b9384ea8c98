"""A training run as a process of its own, to be killed: `python -m tests.distributed.drive ROOT NAME SECTION`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import ray

from unime_ray.artifacts import Run
from unime_ray.config import RunConfig
from unime_ray.train.embedder import run_train_embedder


def config_of(root: Path, name: str, section: dict) -> RunConfig:
    return RunConfig.model_validate(
        {"run": str(root / "run"), "embed": {"model": str(root / "model")}, "embedders": {name: section}}
    )


def main() -> None:
    root, name, section = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    run_train_embedder(Run(str(root / "run")), config_of(root, name, section), name)
    ray.shutdown()


if __name__ == "__main__":
    main()
