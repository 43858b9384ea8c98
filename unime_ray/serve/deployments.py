"""The graph on Ray Serve: ingress -> encoder -> retriever -> reranker, each a deployment with resources of its own.

The ingress asks a stage for many requests at once (`coalesce`). The computing runs in one thread beside the replica's
event loop, so that the replica goes on answering. A request whose deadline has passed is not computed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from ray import serve
from ray.serve.config import BackpressureConfig
from ray.serve.handle import DeploymentHandle

from unime_ray.config_serve import StageConfig
from unime_ray.corpus.payload import Item
from unime_ray.errors import ConfigError
from unime_ray.serve.app import Stages, build_app
from unime_ray.serve.bundle import Bundle, choice_of, chosen
from unime_ray.serve.catalog import WHOLE, Found, Ref, Shard, Wanted
from unime_ray.serve.deadline import Deadline
from unime_ray.serve.engines import EncoderEngine, RerankerEngine
from unime_ray.serve.filling import fill, keep_fresh, reembed_all
from unime_ray.serve.gate import Gate
from unime_ray.serve.live import LiveLog
from unime_ray.serve.metrics import Meter, RayMeter
from unime_ray.serve.negatives import read_negatives
from unime_ray.serve.payloads import Payloads
from unime_ray.serve.remote import RemoteEncoder, RemoteReranker, RemoteRetriever
from unime_ray.serve.retriever import RetrieverEngine
from unime_ray.serve.shards import ShardedRetriever, retriever_names
from unime_ray.serve.stages import Encoded, IndexState, NewItem, Page, RetrieverStage
from unime_ray.serve.tasks import item_instructions, query_tasks
from unime_ray.serve.tracing import Traced, TracingMeter, otlp_tracer

HEALTH_SECONDS = 5.0
SHUTDOWN_SECONDS = 5.0
HELD = 3
"""Embedders an encoder holds at most: the retriever asks for the one before until its new index is whole."""
KEEP_SECONDS = 120.0
"""How long the index before a change goes on answering queries of its own revision."""


class Worker:
    """One thread that computes, beside the event loop."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)


class Change:
    """A change under way beside answering; the next one takes its place."""

    def __init__(self) -> None:
        self._task: asyncio.Task[None] | None = None

    async def start(self, change: Coroutine[Any, Any, None], wait: bool = False) -> None:
        """`wait`: for its end; what it raises is raised here."""
        if self._task is not None:
            self._task.cancel()
        self._task = asyncio.get_running_loop().create_task(change)
        if wait:
            await self._task

    def check(self) -> None:
        """Raise what ended the change, so that Ray replaces the replica."""
        if self._task is not None and self._task.done() and not self._task.cancelled():
            self._task.result()


def in_time(calls: Sequence[Any], compute: Callable[[Sequence[Any]], Sequence[Any]]) -> list[Any]:
    """`compute` of the calls whose deadline (the last of each) has not passed; None for the others."""
    due = [place for place, call in enumerate(calls) if not call[-1].passed()]
    answers: list[Any] = [None] * len(calls)
    for place, answer in zip(due, compute([calls[place] for place in due]) if due else [], strict=True):
        answers[place] = answer
    return answers


@serve.deployment
class Encoder:
    """Vectors of items, for a batch of requests at a time. Holds the current embedder and those before it."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle, self.current = bundle, ""
        self.engines: dict[str, EncoderEngine] = {}
        self.worker, self.change = Worker("encode"), Change()

    async def reconfigure(self, choice: dict[str, Any]) -> None:
        """Load the embedder `choice` names and switch to it; but for the first, answers go on meanwhile.

        Raises:
            ConfigError: the run has no such embedder.
        """
        bundle = await asyncio.to_thread(chosen, self.bundle, choice)
        await self.change.start(self._change_to(bundle), wait=not self.engines)

    async def _change_to(self, bundle: Bundle) -> None:
        revision = bundle.embedder.revision
        engine = self.engines.get(revision)
        if engine is None:
            engine = await asyncio.to_thread(EncoderEngine, bundle.embedder)
        others = {key: held for key, held in self.engines.items() if key != revision}
        kept = dict(list(others.items())[1 - HELD :])
        self.engines = kept | {revision: engine}
        self.bundle, self.current = bundle, revision

    async def embed(self, calls: list[tuple[list[Item], str | None, Deadline]]) -> list[Encoded | None]:
        """One answer per call; None: its deadline passed before its turn came."""
        return await self.worker.run(in_time, calls, self._compute)

    def _compute(self, calls: Sequence[tuple[list[Item], str | None, Deadline]]) -> list[Encoded]:
        # In this order: a change puts the new engine there before it names it.
        current = self.current
        engines = self.engines
        asked = [revision if revision in engines else current for _, revision, _ in calls]
        answers: dict[int, Encoded] = {}
        for revision in dict.fromkeys(asked):
            places = [place for place, each in enumerate(asked) if each == revision]
            encoded = engines[revision].embed_groups([calls[place][0] for place in places])  # type: ignore[index]
            answers |= dict(zip(places, encoded, strict=True))
        return [answers[place] for place in range(len(calls))]

    async def check_health(self) -> None:
        self.change.check()


@serve.deployment
class Retriever:
    """The index. While it serves, it follows what other replicas write and embeds what has no vector yet."""

    def __init__(self, bundle: Bundle, encoder: DeploymentHandle, shard: Shard = WHOLE) -> None:
        self.shard = shard
        self.bundle, self.encoder = bundle, RemoteEncoder(encoder, bundle.config.encoder)
        self.before: RetrieverEngine | None = None
        self.worker, self.change = Worker("retrieve"), Change()

    async def _open(self, bundle: Bundle) -> None:
        self.engine: RetrieverEngine = await asyncio.to_thread(RetrieverEngine, bundle, self.shard)
        self.bundle = bundle
        self._follow()

    def _follow(self) -> None:
        self._fresh = asyncio.get_running_loop().create_task(keep_fresh(self.engine, self.encoder))

    async def reconfigure(self, choice: dict[str, Any]) -> None:
        """Build the index `choice` asks for beside the one that serves, and switch over once it is whole; the first one
        answers while it fills.

        Raises:
            ConfigError: the run has no such embedder, or there is no such index.
        """
        bundle = await asyncio.to_thread(chosen, self.bundle, choice)
        if not hasattr(self, "engine"):
            await self._open(bundle)
        elif (bundle.embedder.revision, bundle.config.index) != (self.engine.revision, self.engine.config):
            await self.change.start(self._change_to(bundle))

    async def _change_to(self, bundle: Bundle) -> None:
        engine = await asyncio.to_thread(RetrieverEngine, bundle, self.shard)
        await fill(engine, self.encoder)
        self._fresh.cancel()  # from here on, live items are embedded for the new index alone
        await reembed_all(engine, self.encoder)
        self.bundle, self.before, self.engine = bundle, self.engine, engine
        self._follow()
        await asyncio.sleep(KEEP_SECONDS)
        self.before = None

    async def search(self, calls: list[tuple[np.ndarray, str, int, Wanted]]) -> list[list[tuple[Found, Item]] | str]:
        """Hits of each call; a string: the index holds another revision's vectors, namely those."""
        return await self.worker.run(self._compute, calls)

    def _compute(self, calls: Sequence[tuple[np.ndarray, str, int, Wanted]]) -> list[list[tuple[Found, Item]] | str]:
        engine, before = self.engine, self.before
        answers: list[list[tuple[Found, Item]] | str] = [engine.revision] * len(calls)
        for one in (engine, before) if before and before.revision != engine.revision else (engine,):
            places = [place for place, call in enumerate(calls) if call[1] == one.revision]
            if places:
                vectors = np.stack([calls[place][0] for place in places])
                found = one.search(vectors, [calls[p][2] for p in places], [calls[p][3] for p in places])
                for place, hits in zip(places, found, strict=True):
                    answers[place] = hits
        return answers

    async def write(self, items: list[NewItem], vectors_ND: np.ndarray, revision: str) -> tuple[list[str], int] | str:
        """(ids, version); a string as in `search`."""
        if revision != self.engine.revision:
            return self.engine.revision
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
        self.change.check()
        if self._fresh.done() and not self._fresh.cancelled():
            self._fresh.result()  # raises what ended it, so that Ray replaces the replica


@serve.deployment
class RerankerDeployment:
    """Scores of candidates, for a batch of requests at a time. Payload of indexed items is read here, not sent."""

    def __init__(self, bundle: Bundle) -> None:
        assert bundle.reranker is not None, "deployed only where there is one"
        self.engine: RerankerEngine | None = None
        self.payloads = Payloads(bundle.payload(), LiveLog(bundle.run), pictures=True)
        self.bundle, self.worker, self.change = bundle, Worker("rerank"), Change()

    async def reconfigure(self, choice: dict[str, Any]) -> None:
        """Load the reranker `choice` names and switch to it; but for the first, answers go on meanwhile.

        Raises:
            ConfigError: the run has no such reranker.
        """
        bundle = await asyncio.to_thread(chosen, self.bundle, choice)
        if bundle.reranker is None:
            raise ConfigError("user_config.reranker: this graph has one; deploy it anew to serve without")
        if self.engine is None or bundle.reranker != self.bundle.reranker:
            await self.change.start(self._change_to(bundle), wait=self.engine is None)

    async def _change_to(self, bundle: Bundle) -> None:
        assert bundle.reranker is not None, "asked for only with one"
        self.engine = await asyncio.to_thread(RerankerEngine, bundle.reranker)
        self.bundle = bundle

    async def check_health(self) -> None:
        self.change.check()

    async def score(self, calls: list[tuple[Item, list[Any], str, Deadline]]) -> list[list[float | None] | None]:
        """Scores of refs or items, per call; None: its deadline passed before its turn came."""
        return await self.worker.run(in_time, calls, self._compute)

    def _compute(self, calls: Sequence[tuple[Item, list[Any], str, Deadline]]) -> list[list[float | None]]:
        refs = [each for _, given, _, _ in calls for each in given if isinstance(each, Ref)]
        read = dict(zip(refs, self.payloads.items(refs), strict=True))
        groups = [
            (query, [read[each] if isinstance(each, Ref) else each for each in given], mode)
            for query, given, mode, _ in calls
        ]
        assert self.engine is not None, "Ray Serve configures a replica before it answers"
        return self.engine.score_groups(groups)


@serve.deployment
@serve.ingress()
class Ingress:
    """The HTTP interface. Holds no model; reads the run once for its tasks."""

    def __init__(
        self,
        bundle: Bundle,
        encoder: DeploymentHandle,
        retrievers: Sequence[DeploymentHandle],
        reranker: DeploymentHandle | None,
        digests: Sequence[bytes],
        hosts: Sequence[str] | None,
    ) -> None:
        self.bundle, self.digests, self.hosts = bundle, digests, hosts
        config = bundle.config
        self.tracer = otlp_tracer() if config.tracing else None
        self.meter: Meter = RayMeter() if self.tracer is None else TracingMeter(RayMeter(), self.tracer)
        shards = [RemoteRetriever(handle, config.retriever, self.meter) for handle in retrievers]
        retriever: RetrieverStage = shards[0] if len(shards) == 1 else ShardedRetriever(shards)
        self.stages = Stages(
            RemoteEncoder(encoder, config.encoder, self.meter),
            retriever,
            None if reranker is None else RemoteReranker(reranker, config.rerank, self.meter),
        )

    async def reconfigure(self, choice: dict[str, Any]) -> None:
        """Call the models by their new names; requests under way end with the old ones.

        Raises:
            ConfigError: the run has no such model.
        """
        bundle = await asyncio.to_thread(chosen, self.bundle, choice)
        if (bundle.embedder, bundle.reranker) != (self.bundle.embedder, self.bundle.reranker):
            self.bundle = bundle
            self._answers = await asyncio.to_thread(self._build)

    def __serve_build_asgi_app__(self) -> Any:
        self._answers = self._build()

        async def current(scope: Any, receive: Any, send: Any) -> None:
            await self._answers(scope, receive, send)

        return current

    def _build(self) -> Gate | Traced:
        payload = self.bundle.payload()
        ids = self.bundle.run.artifact("pools").read(["item_id"]).column(0).unique().to_pylist()
        step = max(1, len(ids) // 256)
        app = build_app(
            self.bundle,
            self.stages,
            query_tasks(self.bundle.run, payload),
            item_instructions(payload, ids[::step]),
            self.meter,
            self.digests,
            self.hosts,
            read_negatives(self.bundle.run, self.bundle.judge, payload),
        )
        return app if self.tracer is None else Traced(app, self.tracer)


def application(bundle: Bundle, digests: Sequence[bytes] = (), hosts: Sequence[str] | None = None) -> serve.Application:
    """The graph, bound and ready for `serve.run`."""
    config, models = bundle.config, choice_of(bundle)
    encoder = _deploy(Encoder, "encoder", config.encoder, models).bind(bundle)
    names = retriever_names(config)
    retrievers = [
        _deploy(Retriever, name, config.retriever, models).bind(bundle, encoder, Shard(place, len(names)))
        for place, name in enumerate(names)
    ]
    reranker = None
    if bundle.reranker is not None:
        reranker = _deploy(RerankerDeployment, "reranker", config.rerank, models).bind(bundle)
    ingress = _deploy(Ingress, "ingress", config.ingress, models)
    return ingress.bind(bundle, encoder, retrievers, reranker, tuple(digests), hosts)


def _deploy(deployment: Any, name: str, stage: StageConfig, models: dict[str, Any]) -> Any:
    return deployment.options(name=name, user_config=models, **_options(stage))


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
