"""Load test of serving: requests a second and latency at 1, 8, 32, 64 clients, retrieve only and with rerank.

    python benchmarks/serve.py RUN --out serve.json [--seconds 20] [--clients 1 8 32 64] [--kill-every 30]

Ways of serving the same run's models, measured one after the other with the same queries (the run's own):
    graph        the deployments of `unime-ray serve`, each asked for many requests at once
    unbatched    the same deployments, one request a call
    sequence     one process that answers one request at a time, stage after stage, on all cores
Each client sends its next query when the one before has been answered (closed loop), from a process of its own.
`--kill-every S` then kills a replica of a stage in turn every S seconds under the load of 8 clients.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from serve_load import load, quality, wait_ready

from unime_ray.artifacts import Run
from unime_ray.cluster import connected
from unime_ray.config import RunConfig, load_config
from unime_ray.config_serve import LimitsConfig, ServeConfig, StageConfig
from unime_ray.corpus.payload import Item
from unime_ray.prompts import IMAGE_MARKER
from unime_ray.serve.bundle import Bundle, resolve_bundle
from unime_ray.serve.catalog import Found, Ref, Wanted
from unime_ray.serve.deadline import Deadline
from unime_ray.serve.stages import Encoded, IndexState

PORT = 8899
NUM_QUERIES = 256
NUM_JUDGED = 100
WARM_SECONDS = 3.0
PATIENT = LimitsConfig(deadline_ms=60_000, rerank_budget_ms=60_000)
"""Nothing is degraded for being late: the ways are to do the same work."""


class OneProcess:
    """The stages of one process: a lock lets one request compute at a time."""

    def __init__(self, bundle: Bundle) -> None:
        from unime_ray.serve.engines import EncoderEngine, RerankerEngine
        from unime_ray.serve.live import LiveLog
        from unime_ray.serve.payloads import Payloads
        from unime_ray.serve.retriever import RetrieverEngine

        self.encoder, self.index = EncoderEngine(bundle.embedder), RetrieverEngine(bundle)
        self.reranker = RerankerEngine(bundle.reranker) if bundle.reranker else None
        self.payloads = Payloads(bundle.payload(), LiveLog(bundle.run), pictures=True)
        self.lock = asyncio.Lock()

    async def _alone(self, function: Any, *arguments: Any) -> Any:
        async with self.lock:
            return await asyncio.to_thread(function, *arguments)

    async def embed(self, items: Sequence[Item], deadline: Deadline, revision: str | None = None) -> Encoded:
        return (await self._alone(self.encoder.embed_groups, [items]))[0]

    async def search(
        self, vector_D: np.ndarray, revision: str, k: int, wanted: Wanted, deadline: Deadline
    ) -> list[tuple[Found, Item]]:
        return (await self._alone(self.index.search, vector_D[None], [k], [wanted]))[0]

    async def rerank_refs(self, query: Item, refs: Sequence[Ref], deadline: Deadline) -> list[float | None]:
        assert self.reranker is not None, "bound only with a reranker"
        items = self.payloads.items(refs)
        return (await self._alone(self.reranker.score_groups, [(query, items, "listwise")]))[0]

    async def state(self, deadline: Deadline) -> IndexState:
        return self.index.state()


def serve_sequence(run: Run, config: RunConfig) -> None:
    """One process, one request at a time, under the same HTTP interface, until it is ended."""
    import uvicorn

    from unime_ray.serve.app import Stages, build_app
    from unime_ray.serve.metrics import NoMeter

    bundle = resolve_bundle(run, config, ServeConfig(limits=PATIENT))
    one = OneProcess(bundle)
    stages = Stages(one, one, one if bundle.reranker else None)  # type: ignore[arg-type]
    uvicorn.run(build_app(bundle, stages, [], {}, NoMeter()), port=PORT, log_level="warning", lifespan="off")


@contextlib.contextmanager
def sequence(root: str) -> Iterator[str]:
    # Its models may use every core; those of the graph's replicas use one each.
    environment = os.environ | {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    process = subprocess.Popen([sys.executable, __file__, root, "--serve-sequence"], env=environment)
    yield f"http://127.0.0.1:{PORT}"
    process.send_signal(signal.SIGINT)
    process.wait(30)


@contextlib.contextmanager
def graph(run: Run, config: RunConfig, settings: ServeConfig) -> Iterator[str]:
    """The deployments, on a Ray cluster of their own."""
    from ray import serve

    from unime_ray.serve.cli import serve_run

    with connected():
        serve_run(run, config, port=PORT, blocking=False, settings=settings)
        yield f"http://127.0.0.1:{PORT}"
        serve.shutdown()


def batched(rerankers: int) -> ServeConfig:
    """As `unime-ray serve` starts it, with so many replicas of the reranker."""
    stage = ServeConfig().rerank.model_copy(update={"min_replicas": rerankers, "max_replicas": rerankers})
    return ServeConfig(limits=PATIENT, rerank=stage)


def unbatched(settings: ServeConfig) -> ServeConfig:
    """The same, one request a call."""

    def single(stage: StageConfig) -> StageConfig:
        return stage.model_copy(update={"max_batch": 1, "batch_wait_ms": 0.0})

    stages = {name: single(getattr(settings, name)) for name in ("encoder", "retriever", "rerank")}
    return settings.model_copy(update=stages)


def run_queries(run: Run, bundle: Bundle) -> list[dict[str, Any]]:
    """Search bodies of the run's own queries, exactly as the models were trained to get them."""
    ids = run.artifact("qrels").read(["query_id"]).column(0).unique().to_pylist()
    return [_body(item) for item in bundle.payload().items(_spread(ids, NUM_QUERIES))]


def judged_queries(run: Run, bundle: Bundle) -> list[tuple[dict[str, Any], dict[str, float]]]:
    """Searches of test queries in their own pool, with the relevance of the items that answer them."""
    rows = [row for row in run.artifact("qrels").read().to_pylist() if row["split"] != "train"]
    found: dict[tuple[bytes, str, str], dict[str, float]] = {}
    for row in rows:
        key = (row["query_id"], row["dataset"], row["split"])
        found.setdefault(key, {})[row["item_id"].hex()] = row["relevance"]
    keys = _spread(sorted(found), NUM_JUDGED)
    items = bundle.payload().items([key[0] for key in keys])
    filters = [{"dataset": dataset, "split": split} for _, dataset, split in keys]
    return [
        ({**_body(item), "k": 10, "filter": where, "deadline_ms": 60_000}, found[key])
        for item, where, key in zip(items, filters, keys, strict=True)
    ]


def _body(item: Item) -> dict[str, Any]:
    text = item.rendered.replace(IMAGE_MARKER, "").strip()
    picture = {} if item.image is None else {"image": base64.b64encode(item.image).decode()}
    return {"text": text, "instruction": ""} | picture


def _spread(values: Sequence[Any], count: int) -> list[Any]:
    return list(values[:: max(1, len(values) // count)])[:count]


def kill_in_turn(every: float, stop: threading.Event) -> int:
    """Kill a replica of a stage every so many seconds until told to stop; how many were killed."""
    import ray

    killed = 0
    for stage in itertools.cycle(("reranker", "encoder", "retriever")):
        if stop.wait(every):
            break
        for each in ray.util.list_named_actors(all_namespaces=True):
            if each["name"].startswith("SERVE_REPLICA") and f"#{stage}#" in each["name"]:
                ray.kill(ray.get_actor(each["name"], namespace=each["namespace"]))
                killed += 1
                break
    return killed


def measure(address: str, queries: list[dict[str, Any]], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    results = []
    for rerank in (False, True):
        bodies = [{**body, "rerank": rerank, "k": 10, "deadline_ms": 60_000} for body in queries]
        asyncio.run(load(address, bodies, 16, WARM_SECONDS))
        for clients in arguments.clients:
            result = {"rerank": rerank, **asyncio.run(load(address, bodies, clients, arguments.seconds))}
            print(json.dumps(result), flush=True)
            results.append(result)
    return results


def under_kills(address: str, queries: list[dict[str, Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    bodies = [{**body, "k": 10, "deadline_ms": 60_000} for body in queries]
    stop, killed = threading.Event(), []
    killer = threading.Thread(target=lambda: killed.append(kill_in_turn(arguments.kill_every, stop)))
    killer.start()
    result = asyncio.run(load(address, bodies, 8, arguments.kill_seconds))
    stop.set()
    killer.join()
    return {"killed_replicas": killed[0], "seconds": arguments.kill_seconds, **result}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--out", type=Path, default=Path("serve.json"))
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--ways", nargs="+", default=["graph", "unbatched", "sequence"])
    parser.add_argument("--rerankers", type=int, default=len(os.sched_getaffinity(0)), help="replicas of the reranker")
    parser.add_argument("--kill-every", type=float, default=0.0)
    parser.add_argument("--kill-seconds", type=float, default=600.0)
    parser.add_argument("--quality", action="store_true", help="nDCG@10 of test queries with and without reranking")
    parser.add_argument("--serve-sequence", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    run = Run(arguments.run)
    config = load_config(run.child("config.yaml"))
    if arguments.serve_sequence:
        serve_sequence(run, config)
        return
    bundle = resolve_bundle(run, config, ServeConfig())
    queries = run_queries(run, bundle)
    settings = batched(arguments.rerankers)
    report: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)), "command": sys.argv, "ways": {}}
    for way in arguments.ways:
        chosen = unbatched(settings) if way == "unbatched" else settings
        with sequence(arguments.run) if way == "sequence" else graph(run, config, chosen) as address:
            wait_ready(address)
            print(way, flush=True)
            report["ways"][way] = measure(address, queries, arguments)
            if way == "graph" and arguments.quality:
                report["ndcg@10"] = quality(address, judged_queries(run, bundle))
                print(json.dumps(report["ndcg@10"]), flush=True)
            if way == "graph" and arguments.kill_every:
                report["kills"] = under_kills(address, queries, arguments)
                print(json.dumps(report["kills"]), flush=True)
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
