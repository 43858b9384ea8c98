"""The graph on Ray Serve: ingress -> encoder -> retriever -> reranker, each a deployment with resources of its own.

Each stage batches what has come in while the batch before computed; the computing itself runs in one thread beside the
replica's event loop, so that the replica goes on answering. A request whose deadline has passed is not computed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from ray import serve
from ray.serve.config import BackpressureConfig
from ray.serve.handle import DeploymentHandle

from unime_ray.config_serve import StageConfig
from unime_ray.corpus.payload import Item
from unime_ray.serve.app import Stages, build_app
from unime_ray.serve.bundle import Bundle
from unime_ray.serve.catalog import Found, Ref, Wanted
from unime_ray.serve.deadline import Deadline
from unime_ray.serve.engines import EncoderEngine, RerankerEngine
from unime_ray.serve.filling import keep_fresh
from unime_ray.serve.live import LiveLog
from unime_ray.serve.metrics import RayMeter
from unime_ray.serve.remote import RemoteEncoder, RemoteReranker, RemoteRetriever
from unime_ray.serve.retriever import RetrieverEngine, fetch
from unime_ray.serve.stages import Encoded, IndexState, NewItem, Page
from unime_ray.serve.tasks import item_instructions, query_tasks

HEALTH_SECONDS = 5.0
MAX_BATCH = 32
SHUTDOWN_SECONDS = 5.0


class Worker:
    """One thread that computes, beside the event loop."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)


@serve.deployment
class Encoder:
    """Vectors of items, batched over requests."""

    def __init__(self, bundle: Bundle) -> None:
        self.engine = EncoderEngine(bundle.embedder)
        self.worker = Worker("encode")
        _set_batching(self._embed, bundle.config.encoder)

    async def embed(self, items: list[Item], deadline: Deadline) -> Encoded | None:
        """None: the deadline passed before its turn came."""
        return await self._embed((items, deadline))

    @serve.batch(max_batch_size=MAX_BATCH)
    async def _embed(self, calls: list[tuple[list[Item], Deadline]]) -> list[Encoded | None]:
        due = [place for place, (_, deadline) in enumerate(calls) if not deadline.passed()]
        encoded = await self.worker.run(self.engine.embed_groups, [calls[place][0] for place in due])
        answers: list[Encoded | None] = [None] * len(calls)
        for place, answer in zip(due, encoded, strict=True):
            answers[place] = answer
        return answers


@serve.deployment
class Retriever:
    """The index. While it serves, it follows what other replicas write and embeds what has no vector yet."""

    async def __init__(self, bundle: Bundle, encoder: DeploymentHandle) -> None:  # type: ignore[misc]
        self.engine: RetrieverEngine = await asyncio.to_thread(RetrieverEngine, bundle)
        self.worker = Worker("retrieve")
        _set_batching(self._search, bundle.config.retriever)
        self._fresh = asyncio.get_running_loop().create_task(keep_fresh(self.engine, RemoteEncoder(encoder)))

    async def search(
        self, vector_D: np.ndarray, revision: str, k: int, wanted: Wanted
    ) -> list[tuple[Found, Item]] | None:
        """None: the index holds another revision's vectors."""
        return None if revision != self.engine.revision else await self._search((vector_D, k, wanted))

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=0)
    async def _search(self, calls: list[tuple[np.ndarray, int, Wanted]]) -> list[list[tuple[Found, Item]]]:
        vectors = np.stack([vector for vector, _, _ in calls])
        ks, wanted = [k for _, k, _ in calls], [each for _, _, each in calls]
        return await self.worker.run(self.engine.search, vectors, ks, wanted)

    async def write(self, items: list[NewItem], vectors_ND: np.ndarray, revision: str) -> tuple[list[str], int] | None:
        if revision != self.engine.revision:
            return None
        return await asyncio.to_thread(self.engine.write, items, vectors_ND)

    async def delete(self, name: str) -> int | None:
        return await asyncio.to_thread(self.engine.delete, name)

    async def get(self, name: str) -> tuple[Ref, Item] | None:
        return await asyncio.to_thread(self.engine.get, name)

    async def page(self, start: int, limit: int, wanted: Wanted) -> Page:
        return await asyncio.to_thread(self.engine.page, start, limit, wanted)

    async def picture(self, name: str) -> tuple[bytes, bytes] | None:
        return await asyncio.to_thread(self.engine.picture, name)

    async def state(self) -> IndexState:
        return self.engine.state()

    async def check_health(self) -> None:
        if self._fresh.done():
            self._fresh.result()  # raises what ended it, so that Ray replaces the replica


@serve.deployment
class RerankerDeployment:
    """Scores of candidates, batched over requests. Payload of indexed items is read here, not sent."""

    def __init__(self, bundle: Bundle) -> None:
        assert bundle.reranker is not None, "deployed only where there is one"
        self.engine = RerankerEngine(bundle.reranker)
        self.payload, self.live = bundle.payload(), LiveLog(bundle.run)
        self.worker = Worker("rerank")
        _set_batching(self._score, bundle.config.rerank)

    async def score(
        self, query: Item, candidates: list[Any], mode: str, deadline: Deadline
    ) -> list[float | None] | None:
        """Scores of refs or items; None: the deadline passed before its turn came."""
        return await self._score((query, candidates, mode, deadline))

    @serve.batch(max_batch_size=MAX_BATCH)
    async def _score(self, calls: list[tuple[Item, list[Any], str, Deadline]]) -> list[list[float | None] | None]:
        due = [place for place, call in enumerate(calls) if not call[3].passed()]
        scored = await self.worker.run(self._compute, [calls[place][:3] for place in due])
        answers: list[list[float | None] | None] = [None] * len(calls)
        for place, values in zip(due, scored, strict=True):
            answers[place] = values
        return answers

    def _compute(self, calls: Sequence[tuple[Item, list[Any], str]]) -> list[list[float | None]]:
        return self.engine.score_groups([(query, self._items(given), mode) for query, given, mode in calls])

    def _items(self, candidates: list[Any]) -> list[Item]:
        return fetch(self.payload, self.live, candidates) if isinstance(candidates[0], Ref) else candidates


@serve.deployment
@serve.ingress()
class Ingress:
    """The HTTP interface. Holds no model; reads the run once for its tasks."""

    def __init__(
        self,
        bundle: Bundle,
        encoder: DeploymentHandle,
        retriever: DeploymentHandle,
        reranker: DeploymentHandle | None,
        digests: Sequence[bytes],
        hosts: Sequence[str] | None,
    ) -> None:
        self.bundle, self.digests, self.hosts = bundle, digests, hosts
        remote_reranker = None if reranker is None else RemoteReranker(reranker)
        self.stages = Stages(RemoteEncoder(encoder), RemoteRetriever(retriever), remote_reranker)

    def __serve_build_asgi_app__(self) -> Any:
        payload = self.bundle.payload()
        ids = self.bundle.run.artifact("pools").read(["item_id"]).column(0).unique().to_pylist()
        step = max(1, len(ids) // 256)
        return build_app(
            self.bundle,
            self.stages,
            query_tasks(self.bundle.run, payload),
            item_instructions(payload, ids[::step]),
            RayMeter(),
            self.digests,
            self.hosts,
        )


def application(bundle: Bundle, digests: Sequence[bytes] = (), hosts: Sequence[str] | None = None) -> serve.Application:
    """The graph, bound and ready for `serve.run`."""
    config = bundle.config
    encoder = Encoder.options(name="encoder", **_options(config.encoder)).bind(bundle)  # type: ignore[attr-defined]
    retriever = Retriever.options(name="retriever", **_options(config.retriever)).bind(bundle, encoder)  # type: ignore[attr-defined]
    reranker = None
    if bundle.reranker is not None:
        reranker = RerankerDeployment.options(name="reranker", **_options(config.rerank)).bind(bundle)  # type: ignore[attr-defined]
    ingress = Ingress.options(name="ingress", **_options(config.ingress))  # type: ignore[attr-defined]
    return ingress.bind(bundle, encoder, retriever, reranker, tuple(digests), hosts)


def _options(stage: StageConfig) -> dict[str, Any]:
    """A deployment's options; its queue is bounded, and a full one answers 429."""
    options: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": stage.num_cpus, "num_gpus": stage.num_gpus},
        "max_ongoing_requests": stage.max_ongoing,
        "max_queued_requests": stage.max_queued,
        "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=1.0),
        "health_check_period_s": HEALTH_SECONDS,
        "graceful_shutdown_timeout_s": SHUTDOWN_SECONDS,
    }
    if stage.max_replicas > stage.min_replicas:
        scaling = {"min_replicas": stage.min_replicas, "max_replicas": stage.max_replicas}
        return options | {"autoscaling_config": scaling}
    return options | {"num_replicas": stage.min_replicas}


def _set_batching(method: Any, stage: StageConfig) -> None:
    method.set_max_batch_size(stage.max_batch)
    method.set_batch_wait_timeout_s(stage.batch_wait_ms / 1000)
