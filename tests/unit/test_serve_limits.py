"""What callers can make grow, hang or break: caches, bodies, filters, pictures; and a client whose server lies."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from PIL import Image

from tests.conftest import picture
from tests.unit.models_fixtures import make_item
from tests.unit.serve_fixtures import (
    DIM,
    FakeEncoder,
    LocalRetriever,
    api_client,
    data_url,
    filled_engine,
    make_bundle,
    make_run,
    problem,
    vector_of,
)
from unime_ray.config_serve import IndexConfig, ServeConfig
from unime_ray.errors import ConfigError
from unime_ray.serve import items as items_module
from unime_ray.serve.bundle import Bundle
from unime_ray.serve.catalog import MAX_MASKS, Catalog, Ref, Rows, Wanted
from unime_ray.serve.client import Client
from unime_ray.serve.deadline import Deadline
from unime_ray.serve.filling import reembed_all
from unime_ray.serve.gate import Gate
from unime_ray.serve.items import Items
from unime_ray.serve.live import LiveLog, Put
from unime_ray.serve.metrics import NoMeter
from unime_ray.serve.pictures import thumbnail
from unime_ray.serve.retriever import RetrieverEngine
from unime_ray.serve.stages import Encoded


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(make_run(tmp_path_factory.mktemp("limits") / "run"))


def first_picture(bundle: Bundle) -> tuple[Items, str, str]:
    """(the items, the id of one with a picture, the version in its address)."""
    engine = filled_engine(bundle)
    ref = next(ref for ref in engine.catalog.page(0, 100, Wanted())[0] if ref.image_id is not None)
    items = Items(FakeEncoder(), LocalRetriever(engine), {}, ServeConfig(), NoMeter())
    return items, ref.id, ref.image_id.hex()[:16]  # type: ignore[union-attr]


def test_pictures_asked_for_at_once_are_counted_once(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    items, name, version = first_picture(bundle)

    async def several(size: int) -> None:
        await asyncio.gather(*(items.picture(name, version, size) for _ in range(8)))

    asyncio.run(several(16))
    held = sum(len(body) for body, _, _ in items._pictures.values())
    assert len(items._pictures) == 1 and items._picture_bytes == held
    monkeypatch.setattr(items_module, "PICTURE_CACHE_BYTES", held)
    for size in range(17, 30):
        asyncio.run(several(size))
    assert items._picture_bytes == sum(len(body) for body, _, _ in items._pictures.values()) <= held


def test_only_an_address_that_names_its_content_is_kept(bundle: Bundle) -> None:
    items, name, version = first_picture(bundle)
    for other in ("", version[:1], "0" * 16, None):
        asyncio.run(items.picture(name, other, None))
    assert not items._pictures
    api = api_client(bundle)
    for other, kept in ((version, True), (version[:1], False), ("0" * 16, False)):
        headers = api.get(f"/v1/items/{name}/image?v={other}").headers
        assert ("immutable" in headers["cache-control"]) == kept


def test_a_deleted_items_picture_is_gone(tmp_path) -> None:
    api = api_client(make_bundle(make_run(tmp_path / "run")))
    assert api.post("/v1/items", json={"items": [{"id": "mine", "image": data_url(picture("red"))}]}).status_code == 200
    url = api.get("/v1/items/mine").json()["image_url"]
    assert api.get(url).status_code == 200
    assert api.delete("/v1/items/mine").status_code == 200
    assert api.get(url).status_code == 404


def test_filters_do_not_fill_the_memory() -> None:
    refs = [Ref(f"r{n}", bytes(16), None, None, "d", "s") for n in range(3)]
    vectors = np.eye(3, DIM, dtype=np.float32)
    catalog = Catalog(Rows(refs, {("d", "s"): [0, 1, 2]}), vectors, IndexConfig(), "v")
    for number in range(3 * MAX_MASKS):
        assert catalog.search(vectors[:1], [2], [Wanted(dataset=f"x{number}")]) == [[]]
    assert len(catalog._masks) == MAX_MASKS
    assert len(catalog.search(vectors[:1], [2], [Wanted(dataset="d")])[0]) == 2


@pytest.mark.parametrize(
    ("path", "body", "where"),
    [
        ("/v1/embeddings", {"model": "colors-embedder", "input": [1] * 100_000}, "input[0]"),
        ("/v1/embeddings", {"model": "colors-embedder", "input": ["a"] * 100_000}, "input"),
        ("/v1/rerank", {"query": "q", "documents": ["a", *[None] * 100_000]}, "documents[1]"),
        ("/v1/search", {f"x{n}": n for n in range(100_000)}, "body"),
        ("/v1/embeddings", {"model": "m", "input": [{f"x{n}": n for n in range(100_000)}]}, "input[0]"),
        ("/v1/items", {"items": [{}] * 60_000 + [1] * 60_000}, None),
        ("/v1/search", {"text": "x", "task": "t" * 5_000_000}, "task"),
        ("/v1/search", {"text": "x", "filter": {"dataset": "t" * 5_000_000}}, "filter.dataset"),
    ],
)
def test_a_request_full_of_errors_is_told_of_the_first(
    bundle: Bundle, path: str, body: dict[str, object], where: str | None
) -> None:
    answer = api_client(bundle).post(path, json=body)
    assert answer.elapsed.total_seconds() < 5 and len(answer.content) < 2000
    assert problem(answer)[0] == 422 and where in (None, problem(answer)[1])


@pytest.mark.parametrize("name", [".", "..", "..."])
def test_no_item_is_called_by_dots_alone(bundle: Bundle, name: str) -> None:
    api = api_client(bundle)
    assert problem(api.post("/v1/items", json={"items": [{"id": name, "text": "x"}]}))[:2] == (422, "items[0].id")


def test_nobody_sends_a_body_where_no_key_is_asked_for(bundle: Bundle) -> None:
    api = api_client(bundle)
    for path in ("/", "/health", "/openapi.json"):
        assert problem(api.request("POST", path, json={"text": "x"})) == (413, "body", "request_too_large")
        assert api.get(path).status_code == 200


@pytest.mark.parametrize("host", ["localhost", "LocalHost:8000", "[::1]", "[::1]:8000", "127.0.0.1:1"])
def test_this_machine_by_all_its_names(host: str) -> None:
    gate = Gate(None, ServeConfig().limits, NoMeter(), hosts=("127.0.0.1", "localhost", "[::1]"))
    gate._check({"path": "/"}, {b"host": host.encode()})


def test_a_picture_longer_than_webp_knows_is_shown_smaller() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (20_000, 4), "red").save(buffer, "TIFF")
    for side in (None, 2048):
        body, kind = thumbnail(buffer.getvalue(), side)
        assert kind == "image/webp" and Image.open(io.BytesIO(body)).width == 16383


class Choosy(FakeEncoder):
    """Cannot embed what has the word `bad` in it."""

    async def embed(self, items, deadline: Deadline, revision: str | None = None) -> Encoded:
        encoded = await super().embed(items, deadline, revision)
        encoded.errors[:] = ["too long" if "bad" in item.rendered else None for item in items]
        return encoded


def test_live_items_that_the_new_embedder_cannot_embed_do_not_hold_it_up(tmp_path) -> None:
    run = make_run(tmp_path / "run")
    made = [make_item(f"{'bad ' if n < 70 else ''}color red {n}") for n in range(72)]
    puts = [Put(f"i{n}", item, "live", "live", "before", vector_of(item)) for n, item in enumerate(made)]  # type: ignore[arg-type]
    LiveLog(run).append_puts(puts)
    engine: RetrieverEngine = filled_engine(make_bundle(run))
    asyncio.run(asyncio.wait_for(reembed_all(engine, Choosy()), 30))
    assert engine.get("i71") is not None and engine.get("i70") is not None and engine.get("i0") is None
    assert engine.state().ready


class Lying(BaseHTTPRequestHandler):
    """Answers with a page, a redirect to itself that notes the key, or half of what it promised."""

    seen: list[str | None] = []

    def do_GET(self) -> None:
        self.seen.append(self.headers.get("authorization"))
        body = b"<html>" if self.path != "/short" else b"{"
        self.send_response(302 if self.path == "/moved" else 200)
        self.send_header("location", "/elsewhere")
        self.send_header("content-length", str(len(body) + (self.path == "/short") * 100))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def lying(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("UNIME_RAY_API_KEY", "secret")
    server = HTTPServer(("127.0.0.1", 0), Lying)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_client_says_what_is_wrong_and_follows_nobody(lying: str) -> None:
    Lying.seen.clear()
    with pytest.raises(ConfigError, match="does not answer in JSON"):
        Client(lying).call("GET", "/page")
    with pytest.raises(ConfigError, match="HTTP 302"):
        Client(lying).call("GET", "/moved")
    with pytest.raises(ConfigError, match="does not answer"):
        Client(lying).call("GET", "/short")
    assert Lying.seen == ["Bearer secret"] * 3
