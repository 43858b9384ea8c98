"""The HTTP interface over stages without models: shapes, limits, and what it says to bad input."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient

from tests.conftest import picture
from tests.unit.serve_fixtures import COLORS, api_client, data_url, make_bundle, make_run, problem
from unime_ray.serve.bundle import Bundle

MODEL = "colors-embedder"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(make_run(tmp_path_factory.mktemp("serve") / "run"))


@pytest.fixture(scope="module")
def api(bundle: Bundle) -> Iterator[TestClient]:
    yield api_client(bundle)


# --- search -----------------------------------------------------------------------------------------------------------


def test_search_retrieves_then_reranks(api: TestClient) -> None:
    plain = api.post("/v1/search", json={"text": "red", "k": 4, "rerank": False}).json()
    assert plain["rendered_query"] == "Find a picture of the color: red" and plain["task"] == "colors"
    assert [hit["rank"] for hit in plain["results"]] == [1, 2, 3, 4]
    assert {hit["caption"] for hit in plain["results"][:2]} == {None, "the color red"}, "both red things come first"
    assert [hit["similarity"] for hit in plain["results"]] == sorted(
        (hit["similarity"] for hit in plain["results"]), reverse=True
    )
    assert not plain["reranked"] and plain["results"][0]["rerank_score"] is None
    turned = api.post("/v1/search", json={"text": "red", "k": 10}).json()
    assert turned["reranked"] and not turned["degraded"]
    assert [hit["retrieval_rank"] for hit in turned["results"]] == list(range(10, 0, -1))
    assert set(turned["timings_ms"]) == {"prepare", "encode", "retrieve", "rerank", "total"}


def test_results_after_the_reranked_ones_keep_their_order(api: TestClient) -> None:
    results = api.post("/v1/search", json={"text": "red", "k": 16}).json()["results"]
    assert [hit["retrieval_rank"] for hit in results[10:]] == list(range(11, 17))
    assert all(hit["rerank_score"] is None for hit in results[10:])


@pytest.mark.parametrize("k", [1, 3])
def test_a_small_k_still_shows_the_reranker_ten(api: TestClient, k: int) -> None:
    results = api.post("/v1/search", json={"text": "red", "k": k}).json()["results"]
    assert [hit["retrieval_rank"] for hit in results] == list(range(10, 10 - k, -1))


def test_search_by_picture_and_filters(api: TestClient) -> None:
    body = {"image": data_url(picture("blue")), "k": 16, "rerank": False}
    everything = api.post("/v1/search", json=body).json()
    assert everything["rendered_query"] == "<|image_1|>\nName the color in the picture."
    assert {hit["caption"] for hit in everything["results"][:2]} == {None, "the color blue"}
    for filter_, count in (
        ({"kind": "text"}, 8),
        ({"dataset": "colors"}, 8),
        ({"split": "test"}, 8),
        ({"dataset": "colors", "kind": "text"}, 0),
        ({"dataset": "no such"}, 0),
    ):
        assert len(api.post("/v1/search", json={**body, "filter": filter_}).json()["results"]) == count


def test_a_training_query_shows_its_hard_negatives(api: TestClient, bundle: Bundle) -> None:
    query = api.post("/v1/search", json={"text": "red"}).json()["query_id"]
    mined = api.get(f"/v1/negatives/{query}").json()
    assert mined["judge"] == "oracle" and [item["judge_score"] for item in mined["positives"]] == pytest.approx([0.9])
    assert [item["judge_score"] for item in mined["negatives"]] == pytest.approx([0.4, 0.2])
    assert [item["reason"] for item in mined["negatives"]] == ["cycle", "hardest"], "likelier ones first"
    assert api.get(mined["negatives"][0]["image_url"]).content == picture("green")
    other = api.post("/v1/search", json={"text": "a question nobody trained on"}).json()["query_id"]
    assert api.get(f"/v1/negatives/{other}").json()["negatives"] == []
    assert problem(api.get("/v1/negatives/xyz")) == (422, "query_id", "invalid_value")
    without = api_client(bundle, negatives=None)
    assert without.get(f"/v1/negatives/{query}").json()["positives"] == []
    assert not without.get("/v1/info").json()["hard_negatives"]


def test_instruction_and_task(api: TestClient) -> None:
    bare = api.post("/v1/search", json={"text": "red", "instruction": ""}).json()
    assert bare["rendered_query"] == "red" and bare["task"] is None
    named = api.post("/v1/search", json={"text": "red", "task": "names"}).json()
    assert named["rendered_query"] == "Name the color in the picture. red"
    wrong = api.post("/v1/search", json={"text": "red", "task": "color"})
    assert problem(wrong) == (422, "task", "invalid_value") and "'colors'" in wrong.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, (422, "text", "empty")),
        ({"text": "  "}, (422, "text", "empty")),
        ({"text": "a", "txt": "b"}, (422, "txt", "unknown_field")),
        ({"text": "a", "filter": {"data": "x"}}, (422, "filter.data", "unknown_field")),
        ({"text": 5}, (422, "text", "invalid_value")),
        ({"text": "a", "k": "3"}, (422, "k", "invalid_value")),
        ({"text": "a", "k": 0}, (422, "k", "invalid_value")),
        ({"text": "a", "k": 10_000}, (422, "k", "invalid_value")),
        ({"text": "a", "deadline_ms": 10**9}, (422, "deadline_ms", "invalid_value")),
        ({"text": "a <|image_1|>"}, (422, "text", "invalid_value")),
        ({"text": "x" * 20_001}, (413, "text", "text_too_long")),
        ({"image": "https://example.com/a.png"}, (422, "image", "address_not_fetched")),
        ({"image": "file:///etc/passwd"}, (422, "image", "address_not_fetched")),
        ({"image": "%%%"}, (422, "image", "invalid_image")),
        (
            {"image": base64.b64encode(b"<svg/>").decode()},
            (422, "image", "invalid_image"),
        ),
        ({"image": data_url(picture("red")[:-20])}, (422, "image", "invalid_image")),
        ({"image": "data:image/png,abc"}, (422, "image", "invalid_image")),
    ],
)
def test_bad_searches_name_the_field(api: TestClient, body: dict, expected: tuple[int, str, str]) -> None:
    assert problem(api.post("/v1/search", json=body)) == expected


def test_a_picture_of_200_megapixels_is_refused_by_its_header(api: TestClient) -> None:
    header = struct.pack(">IIBBBBB", 20_000, 10_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    bomb = b"\x89PNG\r\n\x1a\n" + chunk + picture("red")[33:]
    answer = api.post("/v1/search", json={"image": data_url(bomb)})
    assert problem(answer) == (422, "image", "invalid_image")
    assert "200000000 pixels" in answer.json()["error"]["message"]


@pytest.mark.parametrize("body", [b'{"text": "\xff"}', b"{", b"", b"[]", b'"a"', b"\x00", b'{"text": NaN}'])
def test_bodies_that_are_no_request(api: TestClient, body: bytes) -> None:
    answer = api.post("/v1/search", content=body, headers={"content-type": "application/json"})
    assert problem(answer)[0] in (400, 422)


def test_lone_surrogates_are_refused(api: TestClient) -> None:
    headers = {"content-type": "application/json"}
    assert problem(api.post("/v1/search", content=rb'{"text": "\ud800"}', headers=headers))[:2] == (422, "text")


# --- embeddings and rerank --------------------------------------------------------------------------------------------


def test_embeddings_have_openais_shape(api: TestClient) -> None:
    body = {"input": ["the color red", {"image": data_url(picture("red"))}], "model": MODEL}
    answer = api.post("/v1/embeddings", json=body).json()
    assert answer["object"] == "list" and answer["model"] == MODEL and answer["usage"]["total_tokens"] > 0
    assert [entry["index"] for entry in answer["data"]] == [0, 1]
    np.testing.assert_allclose(answer["data"][0]["embedding"], answer["data"][1]["embedding"])
    packed = api.post("/v1/embeddings", json={**body, "encoding_format": "base64"}).json()
    numbers = np.frombuffer(base64.b64decode(packed["data"][0]["embedding"]), "<f4")
    np.testing.assert_array_equal(numbers, np.float32(answer["data"][0]["embedding"]))


def test_dimensions_cut_and_renormalise(api: TestClient) -> None:
    whole = api.post("/v1/embeddings", json={"input": "a", "model": MODEL}).json()["data"][0]["embedding"]
    cut = api.post("/v1/embeddings", json={"input": "a", "model": MODEL, "dimensions": 4}).json()["data"][0]
    np.testing.assert_allclose(cut["embedding"], np.array(whole[:4]) / np.linalg.norm(whole[:4]), rtol=1e-5)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"input": "a", "model": "colors"}, (404, "model", "model_not_found")),
        ({"input": "a"}, (422, "model", "invalid_value")),
        ({"input": [], "model": MODEL}, (422, "input", "invalid_value")),
        ({"input": ["a"] * 257, "model": MODEL}, (422, "input", "invalid_value")),
        ({"input": ["a", ""], "model": MODEL}, (422, "input[1]", "empty")),
        ({"input": [1, 2], "model": MODEL}, (422, "input[0]", "invalid_value")),
        ({"input": ["a", {"picture": "x"}], "model": MODEL}, (422, "input[1].picture", "unknown_field")),
        ({"input": [{"image": "aGk="}], "model": MODEL}, (422, "input[0].image", "invalid_image")),
        ({"input": "a", "model": MODEL, "dimensions": 17}, (422, "dimensions", "invalid_value")),
        ({"input": "a", "model": MODEL, "encoding_format": "hex"}, (422, "encoding_format", "invalid_value")),
    ],
)
def test_bad_embeddings_requests(api: TestClient, body: dict, expected: tuple[int, str, str]) -> None:
    assert problem(api.post("/v1/embeddings", json=body)) == expected


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank"])
def test_rerank_orders_documents(api: TestClient, path: str) -> None:
    body = {"query": {"image": data_url(picture("red"))}, "documents": ["a", {"text": "b"}, "c"], "top_n": 2}
    answer = api.post(path, json={**body, "return_documents": True}).json()
    assert [entry["index"] for entry in answer["results"]] == [2, 1]
    assert answer["results"][1] == {"index": 1, "relevance_score": pytest.approx(1 / 3), "document": {"text": "b"}}
    assert answer["mode"] == "listwise" and answer["meta"]["api_version"]["version"] == path[2]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"documents": []}, (422, "documents", "invalid_value")),
        ({"documents": ["a"] * 10_000}, (422, "documents", "invalid_value")),
        ({"documents": ["a", " "]}, (422, "documents[1]", "empty")),
        ({"query": ""}, (422, "query", "empty")),
        ({"model": "gpt"}, (404, "model", "model_not_found")),
        ({"top_n": 0}, (422, "top_n", "invalid_value")),
        ({"docs": []}, (422, "docs", "unknown_field")),
    ],
)
def test_bad_rerank_requests(api: TestClient, change: dict, expected: tuple[int, str, str]) -> None:
    assert problem(api.post("/v1/rerank", json={"query": "q", "documents": ["a"], **change})) == expected


def test_more_than_ten_documents_are_scored_one_by_one(api: TestClient) -> None:
    answer = api.post("/v1/rerank", json={"query": "q", "documents": [f"d{n}" for n in range(11)]}).json()
    assert answer["mode"] == "pointwise" and len(answer["results"]) == 11


def test_without_a_reranker(bundle: Bundle) -> None:
    plain = api_client(replace(bundle, reranker=None))
    assert not plain.post("/v1/search", json={"text": "red"}).json()["reranked"]
    assert problem(plain.post("/v1/rerank", json={"query": "q", "documents": ["a"]})) == (404, "model", "no_reranker")
    assert [card["task"] for card in plain.get("/v1/models").json()["data"]] == ["embed"]


# --- items ------------------------------------------------------------------------------------------------------------


def test_items_are_written_found_replaced_and_deleted(bundle: Bundle, tmp_path: Path) -> None:
    api = api_client(replace(bundle, run=make_run(tmp_path / "run")))
    assert api.get("/v1/items/new").status_code == 404
    first = {"id": "new", "text": "bright teal", "dataset": "mine"}
    assert api.post("/v1/items", json={"items": [first]}).json() == {"ids": ["new"], "version": 1}
    found = api.post("/v1/search", json={"text": "teal", "k": 1, "rerank": False}).json()["results"][0]
    assert found["id"] == "new" and found["similarity"] == pytest.approx(1, abs=1e-5) and found["dataset"] == "mine"
    api.post("/v1/items", json={"items": [{"id": "new", "image": data_url(picture("red")), "dataset": "mine"}]})
    shown = api.get("/v1/items/new").json()
    assert shown["rendered"] == "<|image_1|>\nRepresent the given picture." and shown["live"]
    assert api.get(shown["image_url"]).content == picture("red")
    only = {"filter": {"dataset": "mine"}, "rerank": False}
    assert len(api.post("/v1/search", json={"text": "teal", **only}).json()["results"]) == 1
    assert api.delete("/v1/items/new").json() == {"id": "new", "deleted": True, "version": 3}
    assert api.post("/v1/search", json={"text": "teal", **only}).json()["results"] == []
    assert problem(api.delete("/v1/items/new")) == (404, "id", "no_such_item")


def test_the_runs_own_items_can_be_deleted(bundle: Bundle, tmp_path: Path) -> None:
    api = api_client(replace(bundle, run=make_run(tmp_path / "run")))
    victim = api.post("/v1/search", json={"text": "red", "k": 1, "rerank": False}).json()["results"][0]["id"]
    assert api.delete(f"/v1/items/{victim}").status_code == 200
    results = api.post("/v1/search", json={"text": "red", "k": 16, "rerank": False}).json()["results"]
    assert victim not in {hit["id"] for hit in results} and len(results) == 15


def test_listing_pages_through_everything(api: TestClient) -> None:
    seen, cursor = [], 0
    while cursor is not None:
        page = api.get("/v1/items", params={"cursor": cursor, "limit": 5, "kind": "image"}).json()
        seen += [item["id"] for item in page["items"]]
        cursor = page["next_cursor"]
    assert len(seen) == len(set(seen)) == page["total"] == len(COLORS)


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({"text": ""}, (422, "items[0].text", "empty")),
        ({"id": "a b", "text": "x"}, (422, "items[0].id", "invalid_value")),
        ({"id": "../x", "text": "x"}, (422, "items[0].id", "invalid_value")),
        ({"image": "aGk="}, (422, "items[0].image", "invalid_image")),
        ({"text": "x", "color": "red"}, (422, "items[0].color", "unknown_field")),
    ],
)
def test_bad_items(api: TestClient, item: dict, expected: tuple[int, str, str]) -> None:
    assert problem(api.post("/v1/items", json={"items": [item]})) == expected


def test_pictures_are_cacheable_and_can_be_made_small(api: TestClient) -> None:
    hit = api.post("/v1/search", json={"text": "red", "k": 16, "rerank": False, "filter": {"kind": "image"}}).json()
    url = hit["results"][0]["image_url"]
    answer = api.get(url)
    assert answer.headers["content-type"] == "image/png" and "immutable" in answer.headers["cache-control"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert api.get(url, headers={"if-none-match": answer.headers["etag"]}).status_code == 304
    assert api.get(f"{url}&size=16").headers["content-type"] == "image/webp"
    assert problem(api.get(f"{url}&size=5"))[:2] == (422, "size")
    assert problem(api.get("/v1/items/nothing/image"))[0] == 404
