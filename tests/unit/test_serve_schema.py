"""schemathesis over the OpenAPI document: whatever is sent, no 5xx, and every answer is as the document says."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.unit.serve_fixtures import api_client, make_bundle, make_run

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
OPERATIONS = {
    "search": "POST /v1/search",
    "negatives": "GET /v1/negatives/{query_id}",
    "embeddings": "POST /v1/embeddings",
    "rerank_v1": "POST /v1/rerank",
    "rerank_v2": "POST /v2/rerank",
    "models": "GET /v1/models",
    "write_items": "POST /v1/items",
    "list_items": "GET /v1/items",
    "get_item": "GET /v1/items/{id}",
    "delete_item": "DELETE /v1/items/{id}",
    "item_image": "GET /v1/items/{id}/image",
    "health": "GET /health",
    "ready": "GET /ready",
    "info": "GET /v1/info",
}


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Any:
    client = api_client(make_bundle(make_run(tmp_path_factory.mktemp("schema") / "run")))
    return schemathesis.openapi.from_asgi("/openapi.json", client.app)


def test_every_operation_is_tried_below(document: Any) -> None:
    found = {each.ok().definition.raw["operationId"] for each in document.get_all_operations()}
    assert found == set(OPERATIONS)


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_interface_keeps_to_its_document(document: Any, name: str) -> None:
    operation = document.find_operation_by_id(name)

    @settings(max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy())
    def check(case: Any) -> None:
        case.call_and_validate(checks=CHECKS)

    check()
