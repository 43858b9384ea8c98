"""The HTTP interface: routes, and every error in the one JSON shape. What routes do is in the modules they call."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from unime_ray import __version__
from unime_ray.serve.bundle import Bundle
from unime_ray.serve.catalog import Wanted
from unime_ray.serve.deadline import Deadline
from unime_ray.serve.errors import ApiError, StageFailed
from unime_ray.serve.gate import Gate
from unime_ray.serve.items import Items
from unime_ray.serve.metrics import Meter
from unime_ray.serve.negatives import Negatives
from unime_ray.serve.page import render_page
from unime_ray.serve.schemas import (
    EmbeddingsAnswer,
    EmbeddingsRequest,
    ErrorAnswer,
    GroupInfo,
    HealthAnswer,
    InfoAnswer,
    ItemAnswer,
    ItemDeleteAnswer,
    ItemsAnswer,
    ItemsWriteAnswer,
    ItemsWriteRequest,
    Kind,
    ModelCard,
    ModelsAnswer,
    NegativesAnswer,
    ReadyAnswer,
    RerankAnswer,
    RerankRequest,
    SearchAnswer,
    SearchRequest,
    TaskInfo,
)
from unime_ray.serve.search import Searcher, names_content
from unime_ray.serve.stages import EncoderStage, RerankerStage, RetrieverStage
from unime_ray.serve.standard import StandardApis
from unime_ray.serve.tasks import Task

log = logging.getLogger("ray.serve.unime")

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer} for status in (400, 401, 404, 413, 415, 421, 422, 429, 500, 503, 504)
}
STATE_MS = 2_000
FOREVER = "private, max-age=31536000, immutable"
ItemId = Annotated[str, Path(min_length=1, max_length=200)]
QueryId = Annotated[str, Path(pattern="^[0-9a-f]{32}$", description="`query_id` of a search's answer.")]
Text = Annotated[str | None, Query(max_length=500)]


@dataclass(frozen=True)
class Stages:
    """What is behind the ingress."""

    encoder: EncoderStage
    retriever: RetrieverStage
    reranker: RerankerStage | None


def build_app(
    bundle: Bundle,
    stages: Stages,
    tasks: Sequence[Task],
    item_instructions: Mapping[str, str],
    meter: Meter,
    digests: Sequence[bytes] = (),
    hosts: Sequence[str] | None = None,
    negatives: Negatives | None = None,
) -> Gate:
    """The ASGI application. `digests`: of the API keys; `hosts`: Host headers taken (None: any); `negatives`: of the
    run's training queries."""
    config, reranker = bundle.config, bundle.reranker.name if bundle.reranker else None
    searcher = Searcher(
        stages.encoder,
        stages.retriever,
        stages.reranker,
        tasks,
        config,
        reranker,
        meter,
        tuple(item_instructions.values()),
    )
    standard = StandardApis(stages.encoder, stages.reranker, config, bundle.embedder, reranker)
    items = Items(stages.encoder, stages.retriever, item_instructions, config, meter)
    # No /docs page: it loads its code from another host.
    app = FastAPI(title="unime-ray", version=__version__, docs_url=None, redoc_url=None, responses=ERRORS)
    _errors(app)
    _search_routes(app, searcher)
    _negative_routes(app, negatives, tuple(item_instructions.values()))
    _standard_routes(app, standard, bundle)
    _item_routes(app, items)
    _service_routes(app, bundle, stages, tasks, negatives is not None)
    return Gate(app, config.limits, meter, digests, hosts)


def _search_routes(app: FastAPI, searcher: Searcher) -> None:
    @app.post("/v1/search", tags=["search"], operation_id="search", response_model=SearchAnswer)
    async def search(body: SearchRequest, request: Request) -> Response:
        """Retrieve by text, picture or both, then rerank."""
        answer = await searcher.search(body, _request_id(request))
        # Written by pydantic at once: validating our own answer again would cost as much as retrieving it.
        return Response(answer.model_dump_json(), media_type="application/json")


def _negative_routes(app: FastAPI, negatives: Negatives | None, item_instructions: Sequence[str]) -> None:
    @app.get("/v1/negatives/{query_id}", tags=["search"], operation_id="negatives")
    async def of_query(query_id: QueryId) -> NegativesAnswer:
        """The hard negatives that a training query was given, with the judge's scores."""
        if negatives is None:
            return NegativesAnswer(query_id=query_id, judge=None, positives=[], negatives=[])
        return await asyncio.to_thread(negatives.of, bytes.fromhex(query_id), item_instructions)


def _standard_routes(app: FastAPI, standard: StandardApis, bundle: Bundle) -> None:
    created = int(time.time())

    @app.post("/v1/embeddings", tags=["models"], operation_id="embeddings")
    async def embeddings(body: EmbeddingsRequest) -> EmbeddingsAnswer:
        """OpenAI's embeddings; an input may also be `{"text": ..., "image": ...}`."""
        return await standard.embeddings(body)

    @app.post("/v1/rerank", tags=["models"], operation_id="rerank_v1")
    async def rerank(body: RerankRequest, request: Request) -> RerankAnswer:
        """Cohere's and Jina's rerank; query and documents may also be `{"text": ..., "image": ...}`."""
        return await standard.rerank(body, _request_id(request), "1")

    @app.post("/v2/rerank", tags=["models"], operation_id="rerank_v2")
    async def rerank_v2(body: RerankRequest, request: Request) -> RerankAnswer:
        """The same under Cohere's second address."""
        return await standard.rerank(body, _request_id(request), "2")

    @app.get("/v1/models", tags=["models"], operation_id="models")
    async def models() -> ModelsAnswer:
        """The models that answer here."""
        served: list[tuple[Any, Literal["embed", "rerank"]]] = [(bundle.embedder, "embed")]
        served += [(bundle.reranker, "rerank")] if bundle.reranker else []
        return ModelsAnswer(
            data=[
                ModelCard(id=each.name, created=created, owned_by="unime-ray", task=task, revision=each.revision)
                for each, task in served
            ]
        )


def _item_routes(app: FastAPI, items: Items) -> None:
    @app.post("/v1/items", tags=["items"], operation_id="write_items")
    async def write(body: ItemsWriteRequest) -> ItemsWriteAnswer:
        """Add items, or replace those whose id is there. Durable and searchable when this answers."""
        return await items.write(body)

    @app.get("/v1/items", tags=["items"], operation_id="list_items")
    async def page(
        cursor: Annotated[int, Query(ge=0, le=2**53)] = 0,
        limit: Annotated[int, Query(ge=1, le=200)] = 50,
        dataset: Text = None,
        split: Text = None,
        kind: Kind | None = None,
    ) -> ItemsAnswer:
        """Items in the order of the index; `next_cursor` goes on."""
        return await items.page(cursor, limit, Wanted(dataset, split, kind))

    @app.get("/v1/items/{id}", tags=["items"], operation_id="get_item")
    async def get(id: ItemId) -> ItemAnswer:
        """One item."""
        return await items.get(id)

    @app.delete("/v1/items/{id}", tags=["items"], operation_id="delete_item")
    async def delete(id: ItemId) -> ItemDeleteAnswer:
        """Take an item out of the index; the run's own files stay as they are."""
        return await items.delete(id)

    @app.get(
        "/v1/items/{id}/image",
        tags=["items"],
        operation_id="item_image",
        response_class=Response,
        responses={200: {"content": {"image/*": {}}}, 304: {"description": "Unchanged"}},
    )
    async def image(
        id: ItemId,
        request: Request,
        v: Annotated[str | None, Query(max_length=32, description="Version; makes the answer cacheable.")] = None,
        size: Annotated[int | None, Query(ge=16, le=2048, description="At most size*size pixels.")] = None,
    ) -> Response:
        """An item's picture."""
        body, media, tag = await items.picture(id, v, size)
        kept = FOREVER if names_content(v, tag.strip('"')) else "private, no-cache"
        headers = {"ETag": tag, "Cache-Control": kept}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(body, media_type=media, headers=headers | {"Content-Security-Policy": "default-src 'none'"})


def _service_routes(app: FastAPI, bundle: Bundle, stages: Stages, tasks: Sequence[Task], hard_negatives: bool) -> None:
    config = bundle.config
    reranker = bundle.reranker.name if bundle.reranker else None

    @app.get("/health", tags=["service"], operation_id="health")
    async def health() -> HealthAnswer:
        """The ingress answers."""
        return HealthAnswer()

    @app.get("/ready", tags=["service"], operation_id="ready", responses={503: {"model": ReadyAnswer}})
    async def ready(response: Response) -> ReadyAnswer:
        """The whole pool is indexed under the served embedder (503 while it is not)."""
        try:
            state = await stages.retriever.state(Deadline.after_ms(STATE_MS))
        except StageFailed:
            response.status_code = 503
            return ReadyAnswer(ready=False, indexed=0, expected=0, reranker=reranker)
        response.status_code = 200 if state.ready else 503
        return ReadyAnswer(ready=state.ready, indexed=state.indexed, expected=state.expected, reranker=reranker)

    @app.get("/v1/info", tags=["service"], operation_id="info")
    async def info() -> InfoAnswer:
        """What is served: models, items, tasks, groups to filter by."""
        state = await stages.retriever.state(Deadline.after_ms(STATE_MS))
        groups = [GroupInfo(dataset=d, split=s, items=count) for (d, s), count in state.groups.items()]
        return InfoAnswer(
            embedder=bundle.embedder.name,
            embedder_revision=bundle.embedder.revision,
            reranker=reranker,
            items=state.indexed,
            live_items=state.live,
            index=state.built,
            k=config.k,
            max_k=config.limits.max_k,
            rerank_top_k=config.rerank_top_k,
            hard_negatives=hard_negatives,
            tasks=[TaskInfo(name=t.name, query=t.kind, instruction=t.instruction) for t in tasks],  # type: ignore[arg-type]
            groups=groups,
        )

    html, policy = render_page()

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(html, headers={"Content-Security-Policy": policy, "Cache-Control": "no-cache"})

    @app.get("/favicon.ico", include_in_schema=False)
    async def favicon() -> Response:
        return Response(status_code=204)


# --- errors -----------------------------------------------------------------------------------------------------------


def _errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return _json(request, error)

    @app.exception_handler(StageFailed)
    async def stage_failed(request: Request, error: StageFailed) -> JSONResponse:
        log.warning("%s: %s", _request_id(request), error)
        return _json(request, error.as_api_error())

    @app.exception_handler(RequestValidationError)
    async def not_valid(request: Request, error: RequestValidationError) -> JSONResponse:
        return _json(request, _first_problem(error))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        codes = {400: "not_json", 404: "no_such_path", 405: "method_not_allowed"}
        return _json(
            request, ApiError(error.status_code, codes.get(error.status_code, "http_error"), str(error.detail))
        )

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        log.error("%s: unexpected error", _request_id(request), exc_info=error)
        reason = "something broke here; the server's log has the request id"
        return _json(request, ApiError(500, "internal_error", reason))


def _first_problem(error: RequestValidationError) -> ApiError:
    """The field that is wrong, by its path in the request. Of the branches of a union, the one that got furthest."""
    problems = [(_place(problem), problem) for problem in error.errors()]
    where, problem = max(problems, key=lambda pair: (pair[1]["type"] == "extra_forbidden", len(pair[0])))
    if problem["type"] == "json_invalid":
        return ApiError(400, "not_json", f"body: not valid JSON ({problem.get('ctx', {}).get('error', '')})", "body")
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).lstrip(".") or "body"
    unknown = problem["type"] == "extra_forbidden"
    reason = "unknown field" if unknown else problem["msg"]
    return ApiError(422, "unknown_field" if unknown else "invalid_value", f"{param}: {reason}", param)


def _place(problem: Mapping[str, Any]) -> list[str | int]:
    """The path of a problem without what pydantic adds for unions."""
    names = ("body", "query", "path", "str", "ContentInput")
    parts = [part for part in problem["loc"] if part not in names]
    return [part for part in parts if isinstance(part, int) or not part.startswith(("list[", "function-after["))]


def _json(request: Request, error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(_request_id(request)), status_code=error.status, headers=error.headers())


def _request_id(request: Request) -> str:
    return str(request.scope.get("state", {}).get("request_id", ""))
