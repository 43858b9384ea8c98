"""For serving tests: a small run folder as ingest would leave it, and stages that answer without models."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import yaml
from starlette.testclient import TestClient

from tests.conftest import picture
from tests.unit.models_fixtures import FakeItem, make_item
from unime_ray.artifacts import Manifest, Run
from unime_ray.config import EmbedConfig, RunConfig
from unime_ray.config_serve import LimitsConfig, ServeConfig
from unime_ray.corpus.payload import Item
from unime_ray.schemas import HARD_NEGATIVES, IMAGES, ITEMS, POOLS, QRELS
from unime_ray.serve.app import Stages, build_app
from unime_ray.serve.bundle import Bundle, Checkpoint
from unime_ray.serve.catalog import Found, Ref, Wanted
from unime_ray.serve.deadline import Deadline
from unime_ray.serve.errors import StageFailed, StageLate
from unime_ray.serve.metrics import NoMeter
from unime_ray.serve.negatives import read_negatives
from unime_ray.serve.retriever import RetrieverEngine
from unime_ray.serve.stages import Encoded, IndexState, NewItem, Page
from unime_ray.serve.tasks import item_instructions, query_tasks

COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "black", "gray")
ASK = "Find a picture of the color:"
SHOW = "Represent the given picture."
NAME = "Name the color in the picture."
DIM = 16
REVISION = "revision-a"


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def make_run(root: Path) -> Run:
    """Eight pictures (dataset `colors`, split train), eight names (dataset `names`, split test), queries for both."""
    run = Run(str(root))
    pictures = [make_item(None, picture(color), SHOW) for color in COLORS]
    names = [make_item(f"the color {color}") for color in COLORS]
    asks = [make_item(color, None, ASK) for color in COLORS]
    shows = [make_item(None, picture(color), NAME) for color in COLORS]
    everything = [*pictures, *names, *asks, *shows]
    _lance(run, "items", pa.Table.from_pylist([_item_row(item) for item in everything], ITEMS))
    unique = {item.image_id: item.image for item in everything if item.image_id}
    rows = [{"image_id": key, "bytes": data, "width": 16, "height": 16} for key, data in unique.items()]
    _lance(run, "images", pa.Table.from_pylist(rows, IMAGES))
    pools = [_member("colors", "train", item) for item in pictures] + [_member("names", "test", n) for n in names]
    _parquet(run, "pools", pa.Table.from_pylist(pools, POOLS))
    pairs = list(zip(asks, pictures, strict=True)) + list(zip(shows, names, strict=True))
    qrels = [
        {**_member("colors" if place < 8 else "names", "train", positive), "query_id": query.item_id, "relevance": 1.0}
        for place, (query, positive) in enumerate(pairs)
    ]
    _parquet(run, "qrels", pa.Table.from_pylist(qrels, QRELS))
    _hard_negatives(run, asks[0], pictures)
    return run


def _hard_negatives(run: Run, query: FakeItem, pictures: Sequence[FakeItem]) -> None:
    """`red` has two: green, which the judge finds likelier, and blue."""
    row = {"query_id": query.item_id, "positive_id": pictures[0].item_id, "positive_score": 0.9}
    row |= {"negative_ids": [pictures[2].item_id, pictures[1].item_id], "negative_scores": [0.2, 0.4]}
    row |= {"negative_similarities": [0.7, 0.6], "negative_reasons": ["hardest", "cycle"]}
    artifact = run.artifact("hard_negatives", "oracle")
    artifact.write(pa.Table.from_pylist([row], HARD_NEGATIVES), HARD_NEGATIVES)
    artifact.finish(Manifest(table="hard_negatives", name="oracle", stage="test", fingerprint="0", rows=1))


def make_bundle(run: Run, config: ServeConfig | None = None, revision: str = REVISION, rerank: bool = True) -> Bundle:
    """A bundle whose checkpoints are never loaded."""
    pixels = EmbedConfig().pixels
    embedder = Checkpoint("colors-embedder", "/nowhere", revision, DIM, None, "float32", pixels, 1024)
    reranker = Checkpoint("colors-reranker", "/nowhere", "revision-r", DIM, None, "float32", pixels, 1024)
    return Bundle(run, embedder, reranker if rerank else None, config or ServeConfig())


def trained_run(root: Path, checkpoint: Path) -> tuple[Run, RunConfig]:
    """The run with `checkpoint` as its base embedder and, by symlink, as its reranker `order`."""
    run = make_run(root)
    artifact = run.artifact("reranker", "order")
    Path(artifact.uri).mkdir(parents=True)
    Path(artifact.child("model")).symlink_to(checkpoint, target_is_directory=True)
    artifact.finish(Manifest(table="reranker", name="order", stage="test", fingerprint="0"))
    config = RunConfig.model_validate({"run": str(root), "embed": {"model": str(checkpoint)}})
    (root / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return run, config


def _lance(run: Run, table: str, data: pa.Table) -> None:
    lance.write_dataset(data, run.artifact(table).data_uri)
    run.artifact(table).finish(Manifest(table=table, stage="test", fingerprint="0", rows=data.num_rows))


def _parquet(run: Run, table: str, data: pa.Table) -> None:
    run.artifact(table).write(data, data.schema)
    run.artifact(table).finish(Manifest(table=table, stage="test", fingerprint="0", rows=data.num_rows))


def _item_row(item: FakeItem) -> dict:
    row = {"item_id": item.item_id, "rendered": item.rendered, "text": item.text, "image_id": item.image_id}
    return {**row, "source": "test", "instruction": None}


def _member(dataset: str, split: str, item: FakeItem) -> dict:
    return {"dataset": dataset, "split": split, "item_id": item.item_id}


def vector_of(item: Item, dim: int = DIM) -> np.ndarray:
    """A unit vector that the item's picture, or else the last word of its text, decides: same color, same vector."""
    color = item.image if item.image is not None else (item.text or item.rendered).split()[-1].encode()
    by_picture = {picture(name): name.encode() for name in COLORS}
    seed = int.from_bytes(by_picture.get(color, color)[:8], "big")
    vector = np.random.default_rng(seed).normal(size=dim).astype(np.float32)
    return vector / np.linalg.norm(vector)


@dataclass
class FakeEncoder:
    """Embeds by color. `delay` seconds late; `failure` is raised instead of an answer."""

    revision: str = REVISION
    dim: int = DIM
    delay: float = 0.0
    failure: StageFailed | None = None
    seen: list[Item] = field(default_factory=list)

    async def embed(self, items: Sequence[Item], deadline: Deadline, revision: str | None = None) -> Encoded:
        await _behave(self.delay, self.failure, deadline, "encoder")
        self.seen += items
        vectors = np.stack([vector_of(item, self.dim) for item in items])
        tokens = sum(len(item.rendered.split()) for item in items)
        return Encoded(vectors, [None] * len(items), tokens, self.revision, "colors-embedder")


@dataclass
class LocalRetriever:
    """The retriever's engine, called in this process."""

    engine: RetrieverEngine
    failure: StageFailed | None = None

    async def search(
        self, vector_D: np.ndarray, revision: str, k: int, wanted: Wanted, deadline: Deadline
    ) -> list[tuple[Found, Item]]:
        await _behave(0.0, self.failure, deadline, "retriever")
        return self.engine.search(vector_D[None], [k], [wanted])[0]

    async def write(
        self, items: Sequence[NewItem], vectors_ND: np.ndarray, revision: str, deadline: Deadline
    ) -> tuple[list[str], int]:
        return self.engine.write(items, vectors_ND)

    async def delete(self, name: str, deadline: Deadline) -> int | None:
        return self.engine.delete(name)

    async def get(self, name: str, deadline: Deadline) -> tuple[Ref, Item] | None:
        return self.engine.get(name)

    async def page(self, start: int, limit: int, wanted: Wanted, deadline: Deadline) -> Page:
        return self.engine.page(start, limit, wanted)

    async def picture(self, name: str, deadline: Deadline) -> tuple[bytes, bytes] | None:
        return self.engine.picture(name)

    async def state(self, deadline: Deadline) -> IndexState:
        await _behave(0.0, self.failure, deadline, "retriever")
        return self.engine.state()


@dataclass
class FakeReranker:
    """Turns the order round: the last candidate gets the largest share."""

    delay: float = 0.0
    failure: StageFailed | None = None
    calls: int = 0

    async def rerank_refs(self, query: Item, refs: Sequence[Ref], deadline: Deadline) -> list[float | None]:
        return await self._scores(len(refs), deadline)

    async def rerank_items(
        self, query: Item, items: Sequence[Item], mode: str, deadline: Deadline
    ) -> list[float | None]:
        return await self._scores(len(items), deadline)

    async def _scores(self, count: int, deadline: Deadline) -> list[float | None]:
        self.calls += 1
        await _behave(self.delay, self.failure, deadline, "reranker")
        total = count * (count + 1) / 2
        return [(place + 1) / total for place in range(count)]


async def _behave(delay: float, failure: StageFailed | None, deadline: Deadline, stage: str) -> None:
    if failure is not None:
        raise failure
    if delay:
        await asyncio.sleep(min(delay, max(deadline.left(), 0)))
        if time.time() >= deadline.at:
            raise StageLate(stage)


def filled_engine(bundle: Bundle) -> RetrieverEngine:
    """An engine whose pool has been embedded by color."""
    engine = RetrieverEngine(bundle)
    missing = engine.missing
    if missing:
        items = engine.payload.items(missing)
        engine.take_in(missing, np.stack([vector_of(item) for item in items]), [None] * len(items))
        engine.rebuild()
    return engine


def api_client(bundle: Bundle, limits: LimitsConfig | None = None, **options: object) -> TestClient:
    """A client of the interface over stages without models; `options` go to `build_app`."""
    bundle = replace(bundle, config=ServeConfig(limits=limits or LimitsConfig()))
    engine, payload = filled_engine(bundle), bundle.payload()
    stages = Stages(FakeEncoder(), LocalRetriever(engine), FakeReranker() if bundle.reranker else None)
    ids = bundle.run.artifact("pools").read(["item_id"]).column(0).to_pylist()
    tasks, words = query_tasks(bundle.run, payload), item_instructions(payload, ids)
    meter = options.pop("meter", NoMeter())
    options.setdefault("negatives", read_negatives(bundle.run, None, payload))
    return TestClient(build_app(bundle, stages, tasks, words, meter, **options), raise_server_exceptions=False)  # type: ignore[arg-type]


@contextlib.contextmanager
def listening(app: object) -> Iterator[str]:
    """The address of a server on a free port of this machine, without a slash at its end."""
    import uvicorn

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", lifespan="off"))  # type: ignore[arg-type]
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server ended at once"
        time.sleep(0.05)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


def problem(answer: object) -> tuple[int, str | None, str | None]:
    """(status, param, code) of an error, whose shape is checked."""
    body = answer.json()  # type: ignore[attr-defined]
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code", "request_id"}
    assert body["error"]["request_id"] == answer.headers["x-request-id"]  # type: ignore[attr-defined]
    return answer.status_code, body["error"]["param"], body["error"]["code"]  # type: ignore[attr-defined]
