"""/v1/embeddings as OpenAI has it, and /v1/rerank, /v2/rerank as Cohere and Jina have them."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Sequence

import numpy as np

from unime_ray.config import nearest
from unime_ray.config_serve import ServeConfig
from unime_ray.corpus.payload import Item
from unime_ray.serve.bundle import Checkpoint
from unime_ray.serve.content import make_item
from unime_ray.serve.errors import ApiError, StageDown, invalid
from unime_ray.serve.schemas import (
    ContentInput,
    Embedding,
    EmbeddingsAnswer,
    EmbeddingsRequest,
    EmbeddingsUsage,
    RerankAnswer,
    RerankRequest,
    RerankResult,
)
from unime_ray.serve.search import deadline_of
from unime_ray.serve.stages import EncoderStage, RerankerStage

LISTWISE_MAX = 10


class StandardApis:
    """Embeddings and reranking of content that comes with the request."""

    def __init__(
        self,
        encoder: EncoderStage,
        reranker: RerankerStage | None,
        config: ServeConfig,
        embedder: Checkpoint,
        reranker_name: str | None,
    ) -> None:
        self.encoder, self.reranker, self.config = encoder, reranker, config
        self.embedder, self.reranker_name = embedder, reranker_name

    async def embeddings(self, request: EmbeddingsRequest) -> EmbeddingsAnswer:
        """Raises: ApiError (a field is wrong), StageFailed."""
        if request.model != self.embedder.name:
            raise self._no_model(request.model, self.embedder.name)
        single = not isinstance(request.input, list)
        inputs = [request.input] if not isinstance(request.input, list) else request.input
        limit = self.config.limits.max_inputs
        if not 1 <= len(inputs) <= limit:
            raise invalid("input", f"{len(inputs)} inputs; 1 to {limit} are taken")
        deadline = deadline_of(request.deadline_ms, self.config)
        names = ["input"] if single else [f"input[{place}]" for place in range(len(inputs))]
        items = await asyncio.to_thread(self._items, inputs, names)
        encoded = await self.encoder.embed(items, deadline, self.embedder.revision)
        if encoded.revision != self.embedder.revision:
            raise StageDown("encoder", f"{self.embedder.name} is being loaded")
        for name, error in zip(names, encoded.errors, strict=True):
            if error is not None:
                raise invalid(name, error)
        vectors_ND = shortened(encoded.vectors, request.dimensions)
        data = [
            Embedding(index=place, embedding=encode_vector(vector, request.encoding_format))
            for place, vector in enumerate(vectors_ND)
        ]
        usage = EmbeddingsUsage(prompt_tokens=encoded.tokens, total_tokens=encoded.tokens)
        return EmbeddingsAnswer(data=data, model=self.embedder.name, usage=usage)

    async def rerank(self, request: RerankRequest, request_id: str, version: str) -> RerankAnswer:
        """Raises: ApiError (a field is wrong, no reranker is served), StageFailed."""
        if self.reranker is None or self.reranker_name is None:
            raise ApiError(404, "no_reranker", "model: no reranker is served; start with serve.reranker set", "model")
        if request.model not in (None, self.reranker_name):
            raise self._no_model(str(request.model), self.reranker_name)
        limit = self.config.limits.max_documents
        if not 1 <= len(request.documents) <= limit:
            raise invalid("documents", f"{len(request.documents)} documents; 1 to {limit} are taken")
        deadline = deadline_of(request.deadline_ms, self.config)
        started = time.perf_counter()
        names = ["query", *(f"documents[{place}]" for place in range(len(request.documents)))]
        query, *documents = await asyncio.to_thread(self._items, [request.query, *request.documents], names)
        mode = "listwise" if len(documents) <= LISTWISE_MAX else "pointwise"
        scores = await self.reranker.rerank_items(query, documents, mode, deadline)
        if mode == "listwise" and all(score is None for score in scores):
            # The list is too long for one prompt; each document alone may fit.
            mode = "pointwise"
            scores = await self.reranker.rerank_items(query, documents, mode, deadline)
        for name, score in zip(names[1:], scores, strict=True):
            if score is None:
                raise invalid(name, "does not fit into the reranker's context", "too_long")
        values = [score or 0.0 for score in scores]
        order = sorted(range(len(values)), key=lambda place: -values[place])[: request.top_n]
        results = [self._result(request, place, values[place]) for place in order]
        milliseconds = round((time.perf_counter() - started) * 1000, 2)
        return RerankAnswer(
            id=request_id,
            model=self.reranker_name,
            mode="listwise" if mode == "listwise" else "pointwise",
            results=results,
            meta={"api_version": {"version": version}, "milliseconds": milliseconds},
        )

    def _result(self, request: RerankRequest, place: int, score: float) -> RerankResult:
        given = request.documents[place]
        shown = {"text": given} if isinstance(given, str) else given.model_dump(exclude_none=True)
        return RerankResult(index=place, relevance_score=score, document=shown if request.return_documents else None)

    def _items(self, inputs: Sequence[str | ContentInput], names: Sequence[str]) -> list[Item]:
        items = []
        for given, name in zip(inputs, names, strict=True):
            if isinstance(given, str):
                items.append(make_item(given, None, self.config.limits, name))
            else:
                items.append(make_item(given.text, given.image, self.config.limits, f"{name}.text", f"{name}.image"))
        return items

    def _no_model(self, name: str, served: str) -> ApiError:
        return ApiError(404, "model_not_found", f"model: no model {name!r}{nearest(name, [served])}", "model")


def shortened(vectors_ND: np.ndarray, dimensions: int | None) -> np.ndarray:
    """The first `dimensions` numbers of each vector, again of unit norm.

    Raises:
        ApiError: the model has fewer.
    """
    if dimensions is None or dimensions == vectors_ND.shape[1]:
        return vectors_ND
    if dimensions > vectors_ND.shape[1]:
        raise invalid("dimensions", f"{dimensions}; the model has {vectors_ND.shape[1]}")
    cut = vectors_ND[:, :dimensions]
    return cut / np.maximum(np.linalg.norm(cut, axis=1, keepdims=True), 1e-12)


def encode_vector(vector_D: np.ndarray, encoding: str) -> list[float] | str:
    """Numbers, or the base64 of little-endian float32 as OpenAI's clients read it."""
    if encoding == "base64":
        return base64.b64encode(vector_D.astype("<f4").tobytes()).decode()
    return [float(value) for value in vector_D]
