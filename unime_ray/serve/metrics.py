"""What serving counts, as Prometheus metrics of Ray's own endpoint. Ray Serve adds replicas and errors."""

from __future__ import annotations

from typing import Any, Protocol

BATCH_SIZES = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]
LATENCY_MS = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0]


class Meter(Protocol):
    def stage(self, name: str, milliseconds: float) -> None:
        """A stage of a request took so long."""
        ...

    def request(self, route: str, status: int, milliseconds: float) -> None: ...
    def batch(self, stage: str, size: int, waiting: int) -> None:
        """A stage was asked for `size` requests at once, while `waiting` more waited."""
        ...

    def degraded(self, reason: str) -> None:
        """A search was answered in retrieval order, because the reranker was late, overloaded or down."""
        ...

    def picture(self, hit: bool) -> None:
        """A picture was asked for; `hit`: it was in the ingress' cache."""
        ...


class NoMeter:
    """Counts nothing: outside Ray."""

    def stage(self, name: str, milliseconds: float) -> None:
        pass

    def request(self, route: str, status: int, milliseconds: float) -> None:
        pass

    def batch(self, stage: str, size: int, waiting: int) -> None:
        pass

    def degraded(self, reason: str) -> None:
        pass

    def picture(self, hit: bool) -> None:
        pass


class RayMeter:
    """Counts through `ray.serve.metrics`; made inside a replica."""

    def __init__(self) -> None:
        from ray.serve.metrics import Counter, Gauge, Histogram

        self._stage = Histogram(
            "unime_stage_ms", description="Milliseconds in a stage.", boundaries=LATENCY_MS, tag_keys=("stage",)
        )
        self._latency = Histogram(
            "unime_request_ms", description="Milliseconds of a request.", boundaries=LATENCY_MS, tag_keys=("path",)
        )
        status_tags: Any = ("path", "status")
        self._requests = Counter("unime_requests", description="Requests answered.", tag_keys=status_tags)
        self._degraded = Counter(
            "unime_degraded", description="Searches answered without their reranker.", tag_keys=("reason",)
        )
        self._batch = Histogram(
            "unime_batch_size", description="Requests in one call.", boundaries=BATCH_SIZES, tag_keys=("stage",)
        )
        self._waiting = Gauge("unime_waiting", description="Requests that wait for a stage.", tag_keys=("stage",))
        self._pictures = Counter("unime_pictures", description="Pictures shown.", tag_keys=("cache",))

    def stage(self, name: str, milliseconds: float) -> None:
        self._stage.observe(milliseconds, tags={"stage": name})

    def request(self, route: str, status: int, milliseconds: float) -> None:
        self._latency.observe(milliseconds, tags={"path": route})
        self._requests.inc(tags={"path": route, "status": str(status)})

    def batch(self, stage: str, size: int, waiting: int) -> None:
        self._batch.observe(size, tags={"stage": stage})
        self._waiting.set(waiting, tags={"stage": stage})

    def degraded(self, reason: str) -> None:
        self._degraded.inc(tags={"reason": reason})

    def picture(self, hit: bool) -> None:
        self._pictures.inc(tags={"cache": "hit" if hit else "miss"})
