"""What every request passes (keys, sizes, hosts, ids), what surrounds the routes, and arbitrary bodies."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from tests.conftest import picture
from tests.unit.serve_fixtures import (
    api_client,
    data_url,
    filled_engine,
    make_bundle,
    make_run,
    problem,
    vector_of,
)
from unime_ray.config_serve import LimitsConfig
from unime_ray.serve.bundle import Bundle
from unime_ray.serve.gate import Gate, key_digests
from unime_ray.serve.metrics import NoMeter

MODEL = "colors-embedder"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(make_run(tmp_path_factory.mktemp("gate") / "run"))


@pytest.fixture(scope="module")
def api(bundle: Bundle) -> TestClient:
    return api_client(bundle)


def test_keys_are_asked_for_everywhere_but_at_the_door(bundle: Bundle) -> None:
    guarded = api_client(bundle, digests=key_digests("first, second"))
    assert guarded.get("/health").status_code == guarded.get("/").status_code == 200
    assert problem(guarded.get("/v1/info")) == (401, "authorization", "invalid_api_key")
    for header in ("Bearer wrong", "Basic first", "first", "Bearer"):
        assert guarded.get("/v1/info", headers={"authorization": header}).status_code == 401
    for key in ("first", "second"):
        assert guarded.get("/v1/info", headers={"authorization": f"Bearer {key}"}).status_code == 200


def test_large_requests_are_refused(bundle: Bundle) -> None:
    api = api_client(bundle, LimitsConfig(max_request_bytes=1000))
    assert problem(api.post("/v1/search", json={"text": "x" * 2000})) == (413, "body", "request_too_large")

    def pieces() -> Iterator[bytes]:
        yield from (b"x" * 100 for _ in range(20))

    chunked = api.post("/v1/search", content=pieces(), headers={"content-type": "application/json"})
    assert problem(chunked) == (413, "body", "request_too_large")


def test_too_many_requests_at_once_are_told_to_come_back() -> None:
    async def together() -> list[tuple[int, dict[bytes, bytes]]]:
        release = asyncio.Event()

        async def slow(scope: dict, receive: Callable, send: Callable) -> None:
            await release.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})

        gate = Gate(slow, LimitsConfig(max_in_flight=2), NoMeter())
        heads: list[tuple[int, dict[bytes, bytes]]] = []

        async def one() -> None:
            async def receive() -> dict:
                return {"type": "http.request", "body": b"", "more_body": False}

            async def send(message: dict) -> None:
                if message["type"] == "http.response.start":
                    heads.append((message["status"], dict(message["headers"])))

            await gate({"type": "http", "method": "GET", "path": "/v1/info", "headers": []}, receive, send)

        calls = [asyncio.create_task(one()) for _ in range(5)]
        await asyncio.sleep(0.05)
        refused = len(heads)
        release.set()
        await asyncio.gather(*calls)
        assert refused == 3 and gate.in_flight == 0
        return heads

    heads = asyncio.run(together())
    assert [status for status, _ in heads] == [429] * 3 + [200] * 2
    assert all(headers[b"retry-after"] == b"1" for status, headers in heads if status == 429)


def test_large_pictures_are_refused(bundle: Bundle) -> None:
    api = api_client(bundle, LimitsConfig(max_image_bytes=50))
    assert problem(api.post("/v1/search", json={"image": data_url(picture("red"))}))[:2] == (413, "image")


def test_other_content_types_and_hosts_are_refused(bundle: Bundle) -> None:
    local = api_client(bundle, hosts=["testserver"])
    assert local.get("/health").status_code == 200
    assert problem(local.get("/health", headers={"host": "evil.example"}))[0] == 421
    form = local.post("/v1/search", content=b'{"text": "a"}', headers={"content-type": "text/plain"})
    assert problem(form) == (415, "content-type", "not_json")


def test_request_ids_and_unknown_paths(api: TestClient) -> None:
    assert api.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert api.get("/health", headers={"x-request-id": "bad id\t"}).headers["x-request-id"] != "bad id\t"
    assert problem(api.get("/v1/nothing")) == (404, None, "no_such_path")
    assert problem(api.put("/v1/search", json={})) == (405, None, "method_not_allowed")
    assert "access-control-allow-origin" not in api.get("/health", headers={"origin": "https://a.example"}).headers


def test_info_models_ready(api: TestClient) -> None:
    info = api.get("/v1/info").json()
    assert (info["items"], info["embedder"], info["reranker"]) == (16, MODEL, "colors-reranker")
    assert {"dataset": "colors", "split": "train", "items": 8} in info["groups"]
    assert api.get("/ready").json() == {"ready": True, "indexed": 16, "expected": 16, "reranker": "colors-reranker"}
    assert {card["id"] for card in api.get("/v1/models").json()["data"]} == {MODEL, "colors-reranker"}


def test_the_openapi_document_is_complete(api: TestClient) -> None:
    document = api.get("/openapi.json").json()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert operation.get("description") or operation.get("summary"), (path, method)
            assert "422" in operation["responses"] and "429" in operation["responses"], (path, method)
            schema = operation["responses"]["422"]["content"]["application/json"]["schema"]
            assert schema["$ref"].endswith("/ErrorAnswer"), (path, method)


def test_the_page_is_one_file_under_a_strict_policy(api: TestClient) -> None:
    page = api.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert "https://" not in page.text and "/*SCRIPT*/" not in page.text and "innerHTML" not in page.text


def test_the_fixture_makes_equal_colors_equal_vectors(bundle: Bundle) -> None:
    items = bundle.payload().items([ref.item_id for ref in filled_engine(bundle)._pool.refs])
    reds = [item for item in items if item.text == "the color red" or item.image == picture("red")]
    assert len(reds) == 2 and np.allclose(vector_of(reds[0]), vector_of(reds[1]))


FIELDS = ["text", "image", "k", "rerank", "filter", "input", "model", "query", "documents", "items", "id", "top_n"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.sampled_from([MODEL, "image"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS) | st.text(), inner, max_size=4),
    max_leaves=8,
)
PATHS = ["/v1/search", "/v1/embeddings", "/v1/rerank", "/v1/items"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(PATHS), body=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=5))
def test_no_body_breaks_it(api: TestClient, path: str, body: dict) -> None:
    content = json.dumps(body).encode()
    answer = api.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code < 500
    if answer.status_code != 200:
        problem(answer)
