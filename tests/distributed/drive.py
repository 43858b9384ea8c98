"""A training run as a process of its own, to be disturbed: `python -m tests.distributed.drive ROOT NAME SECTION SCENE`.

SCENE `held`: the last rank stops before step `HELD` while `ROOT/hold` exists, its sisters at the next all-reduce.
SCENE `elastic`: a cluster with room for one worker, which stops; a node joins, two workers go on and stop; the node is
lost, and one goes on. Each rank leaves its process id in `ROOT/pids`, and rank 0 of each start the number of workers in
`ROOT/worlds-NAME`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
import ray.train

from unime_ray.artifacts import Run, read_text
from unime_ray.config import RunConfig
from unime_ray.train import embedder
from unime_ray.train.launch import CHECKPOINTS, SNAPSHOT

HELD = 8
ALONE_UNTIL, TWO_UNTIL = 4, 7
"""Where workers of the elastic run wait for the cluster to change, by how many they are."""
CLUSTER: dict[str, Any] = {"include_dashboard": False, "object_store_memory": 100 * 2**20}


def config_of(root: Path, name: str, section: dict) -> RunConfig:
    return RunConfig.model_validate(
        {"run": str(root / "run"), "embed": {"model": str(root / "model")}, "embedders": {name: section}}
    )


def registered_step(root: Path, name: str) -> int:
    """Step of the newest checkpoint that Ray Train would go on from.

    A worker's report is taken in only when the controller next asks all workers, up to half a second and perhaps
    several steps later; a worker killed before that starts over, however many steps its log has.
    """
    text = read_text(Run(str(root / "run")).artifact("embedder", name).child(CHECKPOINTS, SNAPSHOT))
    try:
        newest = json.loads(text)["latest_checkpoint_result"] if text else None
    except json.JSONDecodeError:  # being written
        return 0
    return newest["metrics"]["step"] if newest else 0


def wait_for(condition: Callable[[], Any], seconds: float) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def stopping(root: Path, name: str, scene: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The embedder's training worker, which stops where its scene says."""

    def stops(step: int, rank: int, world: int) -> bool:
        if scene == "held":
            return step == HELD and rank == world - 1 and (root / "hold").exists()
        return (step, world) in ((ALONE_UNTIL, 1), (TWO_UNTIL, 2))

    def work(job: dict[str, Any]) -> dict[str, Any]:
        from unime_ray.train.embedder import train_worker
        from unime_ray.train.embedder_objective import EmbedderObjective

        load = EmbedderObjective.load

        def stopping_load(self: Any, step: int, rank: int, world: int) -> Any:
            (root / "pids").mkdir(exist_ok=True)
            (root / "pids" / str(rank)).write_text(str(os.getpid()))
            while stops(step, rank, world):
                time.sleep(0.05)
            return load(self, step, rank, world)

        EmbedderObjective.load = stopping_load  # type: ignore[method-assign]
        context = ray.train.get_context()
        if context.get_world_rank() == 0:
            with open(root / f"worlds-{name}", "a") as worlds:
                print(context.get_world_size(), file=worlds)
        return train_worker(job)

    return work


def train_on_an_elastic_cluster(root: Path, name: str, train: Callable[[], Any]) -> None:
    """A node with room for one worker; a second one comes once the first worker waits, and is lost again.

    Nodes can be started in the main thread only, so training is in another.
    """
    from ray._common.utils import reset_ray_address
    from ray.cluster_utils import Cluster

    # How long Ray Train waits for the place of a worker whose node is lost before it asks again what there is.
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "5"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **CLUSTER})
    reset_ray_address()  # or other programs of this machine would take the cluster for theirs
    ray.init(address=cluster.address, log_to_driver=False)
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(train)

        def reached(step: int) -> bool:
            return training.done() or registered_step(root, name) >= step

        wait_for(lambda: reached(ALONE_UNTIL - ALONE_UNTIL % 3), 120)
        node = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
        wait_for(lambda: reached(TWO_UNTIL - TWO_UNTIL % 3), 240)
        cluster.remove_node(node, allow_graceful=False)
        training.result()


def main() -> None:
    root, name, section, scene = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), sys.argv[4]
    embedder.train_worker = stopping(root, name, scene)

    def train() -> None:
        embedder.run_train_embedder(Run(str(root / "run")), config_of(root, name, section), name)

    if scene == "elastic":
        train_on_an_elastic_cluster(root, name, train)
    else:
        ray.init(address="local", num_cpus=4, log_to_driver=False, **CLUSTER)
        train()
    ray.shutdown()


if __name__ == "__main__":
    main()
