"""One gloo rank as a process of its own: `python -m tests.distributed.rank ROOT RANK WORLD PORT CASES OUT`."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.distributed.scene import gradients
from unime_ray.config import EmbedderConfig, RerankerConfig

SECTIONS = {"embedder": EmbedderConfig, "reranker": RerankerConfig}


def join_ranks(rank: str, world: str, port: str) -> None:
    """Make this process one of `world` gloo ranks."""
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    dist.init_process_group("gloo")


def main() -> None:
    root, rank, world, port, cases, out = sys.argv[1:]
    faulthandler.dump_traceback_later(200)
    join_ranks(rank, world, port)
    found = {
        name: gradients(Path(root), SECTIONS[kind].model_validate(section))
        for name, (kind, section) in json.loads(cases).items()
    }
    if rank == "0":
        torch.save(found, out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
