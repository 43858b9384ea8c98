"""What serving can be told: which models of a run, the index, the limits of a request, the size of each stage."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from unime_ray.sections import Count, Positive, Section


class StageConfig(Section):
    """Replicas, resources, batching and queue of one deployment."""

    min_replicas: Count = 1
    max_replicas: Count = 1
    """Above `min_replicas`, Ray Serve scales with the requests under way."""
    num_cpus: Annotated[float, Field(ge=0.0)] = 1.0
    num_gpus: Annotated[float, Field(ge=0.0)] = 0.0
    max_batch: Count = 32
    """Requests put into one batch; 1 turns batching off."""
    batch_wait_ms: Annotated[float, Field(ge=0.0)] = 1.0
    """How long a batch waits for company. While one batch computes, the next fills by itself."""
    max_ongoing: Count = 64
    """Requests a replica holds at once, in its batch or waiting for it."""
    max_queued: Count = 128
    """Requests that wait for a replica; more are refused."""


class IndexConfig(Section):
    """How vectors are searched. `flat` is exact; the others trade recall, measured when built, for speed."""

    kind: Literal["flat", "ivf", "hnsw"] = "flat"
    precision: Literal["float32", "float16", "int8"] = "float32"
    ivf_lists: Count = 1024
    ivf_probes: Count = 16
    hnsw_links: Count = 32
    hnsw_ef_search: Count = 64
    memory_map: bool = False
    """Search the snapshot from a file on the replica's disk, which the operating system keeps in memory as it can."""
    rebuild_after: Count = 10_000
    """Written items searched exactly beside the snapshot before a new snapshot takes them in."""
    refresh_seconds: Positive = 0.5
    """How often a replica looks for what other replicas have written."""


class LimitsConfig(Section):
    """What one request may ask for."""

    max_request_bytes: Count = 32_000_000
    max_image_bytes: Count = 10_000_000
    max_image_pixels: Count = 50_000_000
    """Decompression-bomb limit, checked on the header before a pixel is decoded."""
    max_text_chars: Count = 20_000
    max_k: Count = 100
    max_inputs: Count = 256
    """Inputs of one /v1/embeddings call; items of one write."""
    max_documents: Count = 100
    """Documents of one rerank call."""
    max_in_flight: Count = 256
    """Requests of one ingress replica under way; more get 429."""
    deadline_ms: Count = 10_000
    """Time a request has unless it sets `deadline_ms` itself."""
    max_deadline_ms: Count = 60_000
    rerank_budget_ms: Count = 2_000
    """Longest a search waits for its reranker; then the retrieval order is returned, marked `degraded`."""


class ServeConfig(Section):
    embedder: str | None = None
    """Which of the run's embedders (`base`: the one that mined; default: the last trained one)."""
    reranker: str | None = None
    """Which of the run's rerankers (`none`: no reranking; default: the last trained one)."""
    k: Count = 12
    rerank_top_k: Annotated[int, Field(ge=2, le=10)] = 10
    """How many of the retrieved items the reranker sees."""
    api_key_env: str = "UNIME_RAY_API_KEY"
    """Environment variable with the API key (several: comma-separated). Not set: no key is asked for."""
    retriever_shards: Count = 1
    """Deployments the index is divided among, each with `retriever`'s replicas; results are merged."""
    tracing: bool = False
    """Send OpenTelemetry spans to OTEL_EXPORTER_OTLP_ENDPOINT (needs the extra `tracing`)."""
    index: IndexConfig = IndexConfig()
    limits: LimitsConfig = LimitsConfig()
    ingress: StageConfig = StageConfig(num_cpus=0.5, max_batch=1, max_ongoing=512, max_queued=512)
    encoder: StageConfig = StageConfig()
    retriever: StageConfig = StageConfig(num_cpus=0.5, batch_wait_ms=0.0)
    rerank: StageConfig = StageConfig(max_batch=8, max_ongoing=32, max_queued=64)
