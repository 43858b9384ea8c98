"""OpenTelemetry traces of requests, where `serve.tracing` asks for them: a span a request, one in it for each stage.

Spans go over OTLP/HTTP to where OTEL_EXPORTER_OTLP_ENDPOINT points. A request that carries a `traceparent` header goes
on in its caller's trace.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from unime_ray.errors import ConfigError
from unime_ray.serve.metrics import Meter

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

NANOSECONDS = 1_000_000
SERVER_ERROR = 500


def otlp_tracer() -> Tracer:
    """A tracer that exports in the background.

    Raises:
        ConfigError: the extra `tracing` is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(f"serve.tracing needs `pip install 'unime-ray[tracing]'` ({error})") from error
    provider = TracerProvider(resource=Resource.create({"service.name": "unime-ray"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider.get_tracer("unime_ray.serve")


class Traced:
    """ASGI middleware: one span a request, as the current one of everything inside."""

    def __init__(self, app: Any, tracer: Tracer) -> None:
        self.app, self.tracer = app, tracer

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind, StatusCode

        carrier = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        name = f"{scope['method']} request"
        with self.tracer.start_as_current_span(name, extract(carrier), SpanKind.SERVER) as span:

            async def noted(message: dict[str, Any]) -> None:
                if message["type"] == "http.response.start":
                    headers = dict(message.get("headers", []))
                    span.set_attribute("http.response.status_code", message["status"])
                    span.set_attribute("request_id", headers.get(b"x-request-id", b"").decode("latin-1"))
                    if message["status"] >= SERVER_ERROR:
                        span.set_status(StatusCode.ERROR)
                await send(message)

            await self.app(scope, receive, noted)
            route = getattr(scope.get("route"), "path", None)
            if route is not None:
                span.update_name(f"{scope['method']} {route}")
                span.set_attribute("http.route", route)


class TracingMeter:
    """Counts as `meter` does; each stage is a span too."""

    def __init__(self, meter: Meter, tracer: Tracer) -> None:
        self.meter, self.tracer = meter, tracer

    def stage(self, name: str, milliseconds: float) -> None:
        self.meter.stage(name, milliseconds)
        end = time.time_ns()
        self.tracer.start_span(name, start_time=end - int(milliseconds * NANOSECONDS)).end(end)

    def request(self, route: str, status: int, milliseconds: float) -> None:
        self.meter.request(route, status, milliseconds)

    def batch(self, stage: str, size: int, waiting: int) -> None:
        self.meter.batch(stage, size, waiting)

    def degraded(self, reason: str) -> None:
        from opentelemetry import trace

        trace.get_current_span().set_attribute("degraded", reason)
        self.meter.degraded(reason)

    def picture(self, hit: bool) -> None:
        self.meter.picture(hit)
