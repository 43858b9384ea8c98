"""Requests and answers over HTTP. Strict: a field that is unknown or of another type is refused by name.

/v1/embeddings has OpenAI's shape (pictures as Jina's `{"image": ...}` objects), /v1/rerank and /v2/rerank Cohere's and
Jina's; /v1/search and /v1/items are this server's own.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictStr, model_validator

Kind = Literal["text", "image"]
Name = Annotated[str, Field(max_length=500)]
"""Of a model, a task, a dataset or a split."""
MAX_LIST = 65_536
"""Entries of any list; `serve.limits` says how many are taken. What is wrong is told of the first bad entry alone: a
reason each for millions would be more than memory holds."""
MAX_FIELDS = 50


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, data: Any) -> Any:
        if isinstance(data, dict) and len(data) > MAX_FIELDS:  # each unknown one would be an error of its own
            raise ValueError(f"{len(data)} fields, most of them unknown")
        return data


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetail(Answer):
    message: str
    type: str
    param: str | None
    code: str | None
    request_id: str


class ErrorAnswer(Answer):
    error: ErrorDetail


# --- search -----------------------------------------------------------------------------------------------------------


class Filter(Request):
    """Only items of this dataset, split and kind."""

    dataset: Name | None = None
    split: Name | None = None
    kind: Kind | None = Field(None, description="`image`: items with a picture; `text`: items without.")


class SearchRequest(Request):
    text: str | None = None
    image: str | None = Field(None, description="A picture as base64 or a data: URL.")
    instruction: str | None = Field(None, description="Put before the text; replaces the task's instruction.")
    task: Name | None = Field(
        None, description="One of the tasks in /v1/info (default: the first that fits the query)."
    )
    k: Annotated[int, Field(ge=1)] | None = None
    rerank: bool = True
    filter: Filter = Field(default_factory=lambda: Filter.model_validate({}))
    deadline_ms: Annotated[int, Field(ge=1)] | None = None


class SearchHit(Answer):
    id: str
    rank: int = Field(description="Position in this answer, from 1.")
    retrieval_rank: int = Field(description="Position by similarity alone, from 1.")
    similarity: float = Field(description="Cosine of the query's and the item's vectors.")
    rerank_score: float | None = Field(description="Share of the reranker's vote; null if it did not see the item.")
    text: str | None
    caption: str | None = Field(description="The text without the instruction that the run's items share.")
    image_url: str | None
    dataset: str
    split: str


class Timings(Answer):
    """Milliseconds."""

    prepare: float
    encode: float
    retrieve: float
    rerank: float
    total: float


class SearchAnswer(Answer):
    request_id: str
    query_id: str = Field(description="Hash of the query's content: what the run's tables call it.")
    results: list[SearchHit]
    reranked: bool
    degraded: bool = Field(description="The reranker was asked for but did not answer: this is the retrieval order.")
    degraded_reason: str | None
    task: str | None
    rendered_query: str = Field(description="The exact text the models got.")
    embedder: str
    reranker: str | None
    timings_ms: Timings


class NegativeItem(Answer):
    id: str
    caption: str | None
    image_url: str | None
    judge_score: float = Field(description="The judge's probability of Yes.")
    similarity: float | None = Field(description="Cosine under the embedder that mined; null for a positive.")
    reason: str | None = Field(description="Why it was chosen; null for a positive.")


class NegativesAnswer(Answer):
    """Empty lists: not a training query."""

    query_id: str
    judge: str | None
    positives: list[NegativeItem]
    negatives: list[NegativeItem]


class TaskInfo(Answer):
    """A kind of question the run's data asks: instruction before a query of this kind."""

    name: str
    query: Literal["text", "image", "both"]
    instruction: str


class GroupInfo(Answer):
    dataset: str
    split: str
    items: int


class InfoAnswer(Answer):
    embedder: str
    embedder_revision: str
    reranker: str | None
    items: int
    live_items: int
    index: str = Field(description="The faiss index: kind, rows, seconds to build, recall against exact search.")
    k: int
    max_k: int
    rerank_top_k: int
    hard_negatives: bool = Field(description="Whether /v1/negatives knows this run's training queries.")
    tasks: list[TaskInfo]
    groups: list[GroupInfo]


# --- embeddings -------------------------------------------------------------------------------------------------------


class ContentInput(Request):
    """Text, a picture, or a picture with text."""

    text: str | None = None
    image: str | None = Field(None, description="A picture as base64 or a data: URL.")

    @model_validator(mode="after")
    def _something(self) -> ContentInput:
        if self.text is None and self.image is None:
            raise ValueError("give `text`, `image` or both")
        return self


Contents = Annotated[list[StrictStr | ContentInput], Field(max_length=MAX_LIST, fail_fast=True)]


class EmbeddingsRequest(Request):
    input: StrictStr | ContentInput | Contents
    model: Name
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = Field(None, description="Keep the first so many, renormalised.")
    user: str | None = None
    deadline_ms: Annotated[int, Field(ge=1)] | None = None


class Embedding(Answer):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingsUsage(Answer):
    prompt_tokens: int
    total_tokens: int


class EmbeddingsAnswer(Answer):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage


# --- rerank -----------------------------------------------------------------------------------------------------------


class RerankRequest(Request):
    query: StrictStr | ContentInput
    documents: Contents
    model: Name | None = None
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool = False
    max_tokens_per_doc: Annotated[int, Field(ge=1)] | None = Field(None, description="Accepted; documents stay whole.")
    deadline_ms: Annotated[int, Field(ge=1)] | None = None


class RerankResult(Answer):
    index: int
    relevance_score: float
    document: dict[str, Any] | None = None


class RerankAnswer(Answer):
    id: str
    model: str
    mode: Literal["listwise", "pointwise"] = Field(
        description="listwise: shares of one vote (they add up to 1); pointwise: probability of Yes."
    )
    results: list[RerankResult]
    meta: dict[str, Any]


# --- items ------------------------------------------------------------------------------------------------------------


ITEM_ID = r"^\.*[\w:@+-][\w.:@+-]*$"
"""Not of dots alone: in an address `..` is the folder above."""


class ItemWrite(Request):
    id: Annotated[str, Field(min_length=1, max_length=200, pattern=ITEM_ID)] | None = Field(
        None, description="Default: the hash of the content. Writing an id that is there replaces it."
    )
    text: str | None = None
    image: str | None = None
    instruction: str | None = Field(None, description="Default: what the run's items of this kind have.")
    dataset: Annotated[str, Field(min_length=1, max_length=200)] = "live"
    split: Annotated[str, Field(min_length=1, max_length=200)] = "live"


class ItemsWriteRequest(Request):
    items: Annotated[list[ItemWrite], Field(min_length=1, max_length=MAX_LIST, fail_fast=True)]
    deadline_ms: Annotated[int, Field(ge=1)] | None = None


class ItemsWriteAnswer(Answer):
    ids: list[str]
    version: int = Field(description="Writes the index has taken so far.")


class ItemAnswer(Answer):
    id: str
    text: str | None
    caption: str | None = Field(description="The text without the instruction that the run's items share.")
    rendered: str
    image_url: str | None
    dataset: str
    split: str
    live: bool


class ItemsAnswer(Answer):
    items: list[ItemAnswer]
    next_cursor: int | None
    total: int


class ItemDeleteAnswer(Answer):
    id: str
    deleted: Literal[True] = True
    version: int


# --- models, health ---------------------------------------------------------------------------------------------------


class ModelCard(Answer):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    task: Literal["embed", "rerank"]
    revision: str


class ModelsAnswer(Answer):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class HealthAnswer(Answer):
    status: Literal["ok"] = "ok"


class ReadyAnswer(Answer):
    ready: bool
    indexed: int
    expected: int
    reranker: str | None
