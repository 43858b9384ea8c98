"""A driver of its own for the tests that kill one: `mining_driver.py RUN MODEL STAGE...`, on two logical CPUs.

Two actors of one CPU each leave nothing over, so this also shows that a stage does not wait for itself.
"""

from __future__ import annotations

import signal
import sys

import ray
from mining_run import load_fake_embedder, load_fake_judge, settings

from unime_ray.artifacts import Run
from unime_ray.stages.embed import run_embed
from unime_ray.stages.judge import run_judge
from unime_ray.stages.retrieve import run_retrieve


def main(root: str, model: str, *stages: str) -> None:
    # A shell that runs the tests in the background has its children ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run = Run(root)
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20)
    actors = {"num_actors": 2, "num_cpus": 1.0}
    config = settings(
        run,
        embed={"model": model, "rows_per_batch": 6, "resources": actors},
        retrieve={"top_k": 12},
        judges={"tiny": {"model": model, "queries_per_batch": 2, "resources": actors}},
    )
    for stage in stages:
        if stage == "embed":
            manifest = run_embed(run, config, load=load_fake_embedder)
        elif stage == "retrieve":
            manifest = run_retrieve(run, config)
        else:
            manifest = run_judge(run, config, "tiny", load=load_fake_judge)
        print(f"{stage}: {manifest.rows} rows")


if __name__ == "__main__":
    main(*sys.argv[1:])
