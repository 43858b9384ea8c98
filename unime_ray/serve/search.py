"""Search: encode the query, retrieve, let the reranker put the best few in order. Knows stages, but no Ray and no HTTP.

When the reranker is late, overloaded or down, the answer is the retrieval order, marked `degraded`; a failing encoder
or retriever fails the search. Nothing waits longer than the request's deadline.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Sequence

from unime_ray.config import nearest
from unime_ray.config_serve import ServeConfig
from unime_ray.corpus.payload import Item
from unime_ray.ids import show
from unime_ray.serve.agree import AgreeingEncoder
from unime_ray.serve.breaker import Breaker
from unime_ray.serve.catalog import Found, Wanted
from unime_ray.serve.content import make_item
from unime_ray.serve.deadline import Deadline
from unime_ray.serve.errors import ApiError, StageDown, StageFailed, invalid
from unime_ray.serve.metrics import Meter
from unime_ray.serve.schemas import SearchAnswer, SearchHit, SearchRequest, Timings
from unime_ray.serve.stages import Encoded, EncoderStage, RerankerStage, RetrieverStage
from unime_ray.serve.tasks import Task, caption, kind_of

Hit = tuple[Found, Item]
VERSION_CHARS = 16
"""Of a picture's id, in its address."""


class Watch:
    """Milliseconds of each stage, as they pass."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._started = self._last = time.perf_counter()
        self.laps = {"prepare": 0.0, "encode": 0.0, "retrieve": 0.0, "rerank": 0.0}

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.laps[stage] = round((now - self._last) * 1000, 2)
        self._last = now
        self._meter.stage(stage, self.laps[stage])

    def timings(self) -> Timings:
        return Timings(**self.laps, total=round((time.perf_counter() - self._started) * 1000, 2))


class Searcher:
    """The two-stage graph as one call. `reranker_name` is what answers call the reranker."""

    def __init__(
        self,
        encoder: EncoderStage,
        retriever: RetrieverStage,
        reranker: RerankerStage | None,
        tasks: Sequence[Task],
        config: ServeConfig,
        reranker_name: str | None,
        meter: Meter,
        item_instructions: Collection[str] = (),
    ) -> None:
        self.item_instructions = item_instructions
        self.encoder, self.retriever, self.reranker = AgreeingEncoder(encoder), retriever, reranker
        self.tasks, self.config, self.meter = tasks, config, meter
        self.reranker_name = reranker_name
        self.breaker = Breaker()

    async def search(self, request: SearchRequest, request_id: str) -> SearchAnswer:
        """Raises: ApiError (a field is wrong), StageFailed (the encoder or retriever did not answer)."""
        watch, limits = Watch(self.meter), self.config.limits
        k = request.k if request.k is not None else self.config.k
        if k > limits.max_k:
            raise invalid("k", f"{k}; at most {limits.max_k} results are given")
        deadline = deadline_of(request.deadline_ms, self.config)
        query, task = await self._prepare(request)
        watch.lap("prepare")
        reranks = request.rerank and self.reranker is not None
        wanted = Wanted(request.filter.dataset, request.filter.split, request.filter.kind)
        depth = max(k, self.config.rerank_top_k) if reranks else k

        async def retrieve(encoded: Encoded) -> list[Hit]:
            if encoded.errors[0] is not None:
                raise invalid("text" if query.image is None else "image", encoded.errors[0])
            watch.lap("encode")
            return await self.retriever.search(encoded.vectors[0], encoded.revision, depth, wanted, deadline)

        encoded, hits = await self.encoder.embed_for([query], deadline, retrieve)
        watch.lap("retrieve")
        scores, reason = await self._scores(query, hits, deadline) if reranks else (None, None)
        if reranks:
            watch.lap("rerank")
        if reason is not None:
            self.meter.degraded(reason)
        return SearchAnswer(
            request_id=request_id,
            query_id=show(query.item_id),
            results=ranked(hits, scores, self.item_instructions)[:k],
            reranked=scores is not None,
            degraded=reason is not None,
            degraded_reason=reason,
            task=None if task is None else task.name,
            rendered_query=query.rendered,
            embedder=encoded.model,
            reranker=self.reranker_name if scores is not None else None,
            timings_ms=watch.timings(),
        )

    async def _prepare(self, request: SearchRequest) -> tuple[Item, Task | None]:
        """Pictures are decoded beside the event loop; words alone are not worth the way to a thread."""
        if request.image is None:
            return self.query_item(request)
        return await asyncio.to_thread(self.query_item, request)

    def query_item(self, request: SearchRequest) -> tuple[Item, Task | None]:
        """The query with the instruction it asks for, or that of the task it fits."""
        kind = kind_of(request.text and request.text.strip(), request.image)
        task = self._task(request.task, kind)
        instruction = request.instruction
        if instruction is None and task is not None:
            instruction = task.instruction
        elif instruction is not None:
            task = None
        if not (request.text or "").strip() and request.image is None:
            # Before rendering: an instruction alone is no query.
            raise invalid("text", "empty; give some text, or a picture in `image`", "empty")
        return make_item(request.text, request.image, self.config.limits, instruction=instruction), task

    def _task(self, name: str | None, kind: str) -> Task | None:
        if name is not None:
            found = [task for task in self.tasks if task.name == name]
            if not found:
                raise invalid("task", f"no task {name!r}{nearest(name, [task.name for task in self.tasks])}")
            return next((task for task in found if task.kind == kind), found[0])
        return next((task for task in self.tasks if task.kind == kind), None)

    async def _scores(
        self, query: Item, hits: Sequence[Hit], deadline: Deadline
    ) -> tuple[list[float | None] | None, str | None]:
        """(scores of the first few hits, None), or (None, why there are none)."""
        assert self.reranker is not None, "asked for only where there is one"
        head = [found.ref for found, _ in hits[: self.config.rerank_top_k]]
        if len(head) < 2:
            return [1.0] * len(head), None
        if not self.breaker.allows():
            return None, StageDown.reason
        try:
            budget = deadline.at_most_ms(self.config.limits.rerank_budget_ms)
            scores = await self.reranker.rerank_refs(query, head, budget)
        except StageFailed as failure:
            self.breaker.failed()
            return None, failure.reason
        self.breaker.succeeded()
        return (None, "too_long") if all(score is None for score in scores) else (scores, None)


def ranked(
    hits: Sequence[Hit], scores: Sequence[float | None] | None, item_instructions: Collection[str] = ()
) -> list[SearchHit]:
    """The answer's results: the scored head by score (ties and unscored ones in retrieval order), then the rest."""
    places = list(range(len(hits)))
    score_of = dict(enumerate(scores or []))
    head = [place for place in places if score_of.get(place) is not None]
    head.sort(key=lambda place: -(score_of[place] or 0.0))
    order = head + [place for place in places if score_of.get(place) is None]
    results = []
    for rank, place in enumerate(order, 1):
        found, item = hits[place]
        results.append(
            SearchHit(
                id=found.ref.id,
                rank=rank,
                retrieval_rank=place + 1,
                similarity=round(found.similarity, 6),
                rerank_score=score_of.get(place),
                text=item.text,
                caption=caption(item.text, item_instructions),
                image_url=image_url(found.ref.id, item.image_id),
                dataset=found.ref.dataset,
                split=found.ref.split,
            )
        )
    return results


def image_url(name: str, image: bytes | None) -> str | None:
    """Where an item's picture is; the content's id in it lets browsers keep it for ever."""
    return None if image is None else f"/v1/items/{name}/image?v={image.hex()[:VERSION_CHARS]}"


def names_content(version: str | None, image: str) -> bool:
    """Whether the `version` in a picture's address is that of the picture (id, hex): what is there never changes."""
    return version is not None and len(version) >= VERSION_CHARS and image.startswith(version)


def deadline_of(milliseconds: int | None, config: ServeConfig) -> Deadline:
    """The request's deadline from now.

    Raises:
        ApiError: it asks for more than `max_deadline_ms`.
    """
    limits = config.limits
    if milliseconds is not None and milliseconds > limits.max_deadline_ms:
        raise ApiError(
            422, "invalid_value", f"deadline_ms: {milliseconds}; at most {limits.max_deadline_ms}", "deadline_ms"
        )
    return Deadline.after_ms(milliseconds if milliseconds is not None else limits.deadline_ms)
