"""Traces: a span a request in its caller's trace, and one in it for each stage."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from tests.unit.serve_fixtures import api_client, make_bundle, make_run
from unime_ray.serve.metrics import NoMeter
from unime_ray.serve.tracing import Traced, TracingMeter

sdk = pytest.importorskip("opentelemetry.sdk.trace")
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def test_a_request_is_a_span_with_its_stages_inside(tmp_path: Path) -> None:
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    provider, kept = sdk.TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    tracer = provider.get_tracer("test")
    plain = api_client(make_bundle(make_run(tmp_path / "run")), meter=TracingMeter(NoMeter(), tracer))
    traced = TestClient(Traced(plain.app, tracer))
    answer = traced.post("/v1/search", json={"text": "red"}, headers={"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"})
    assert answer.status_code == 200
    *stages, request = kept.get_finished_spans()
    assert request.name == "POST /v1/search" and request.attributes["http.route"] == "/v1/search"
    assert request.attributes["request_id"] == answer.headers["x-request-id"]
    assert f"{request.context.trace_id:032x}" == TRACE, "it goes on in the caller's trace"
    assert [span.name for span in stages] == ["prepare", "encode", "retrieve", "rerank"]
    for span in stages:
        assert span.parent.span_id == request.context.span_id
        assert request.start_time <= span.start_time <= span.end_time <= request.end_time + 1_000_000
