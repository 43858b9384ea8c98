"""Sharded retrievers answer as one does: searches, filters, pages, writes and deletions."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import picture
from tests.unit.models_fixtures import make_item
from tests.unit.serve_fixtures import COLORS, LocalRetriever, make_bundle, make_run, vector_of
from unime_ray.config_serve import ServeConfig
from unime_ray.corpus.payload import Item
from unime_ray.errors import UnimeError
from unime_ray.serve.bundle import Bundle
from unime_ray.serve.catalog import Shard, Wanted
from unime_ray.serve.deadline import Deadline
from unime_ray.serve.errors import StageDown
from unime_ray.serve.retriever import RetrieverEngine
from unime_ray.serve.shards import ShardedRetriever, retriever_names
from unime_ray.serve.stages import NewItem

EVERYTHING = Wanted()
SOON = Deadline.after_ms(600_000)


def retriever(bundle: Bundle, count: int) -> ShardedRetriever:
    shards = []
    for place in range(count):
        engine = RetrieverEngine(bundle, Shard(place, count))
        missing = engine.missing
        if missing:
            vectors = np.stack([vector_of(item) for item in engine.payload.items(missing)])
            engine.take_in(missing, vectors, [None] * len(missing))
            engine.rebuild()
        shards.append(LocalRetriever(engine))
    return ShardedRetriever(shards)


def ask(one: ShardedRetriever, color: str, k: int, wanted: Wanted = EVERYTHING) -> list[tuple[str, float]]:
    query = vector_of(Item(bytes(16), color, color, None, None))
    hits = asyncio.run(one.search(query, "revision-a", k, wanted, SOON))
    return [(found.ref.id, round(found.similarity, 5)) for found, _ in hits]


def listed(one: ShardedRetriever, limit: int, wanted: Wanted) -> list[str]:
    names: list[str] = []
    cursor: int | None = 0
    while cursor is not None:
        page = asyncio.run(one.page(cursor, limit, wanted, SOON))
        names += [ref.id for ref, _ in page.items]
        cursor = page.next_cursor
        assert len(page.items) <= limit
    assert len(names) == page.total
    return names


def test_shards_answer_as_one(tmp_path: Path) -> None:
    bundle = make_bundle(make_run(tmp_path / "run"))
    whole, parts = retriever(bundle, 1), retriever(bundle, 3)
    sizes = [asyncio.run(shard.state(SOON)).indexed for shard in parts.shards]
    assert sum(sizes) == 16 and min(sizes) > 0, "every shard has something to do"
    for k in (1, 5, 16, 40):
        for wanted in (Wanted(), Wanted(kind="text"), Wanted("colors", "train")):
            merged, single = ask(parts, "red", k, wanted), ask(whole, "red", k, wanted)
            # Equal vectors tie; which of them is the last of k is not settled.
            assert [similarity for _, similarity in merged] == [similarity for _, similarity in single]
            assert merged == single or k == 5
    for limit in (1, 3, 16, 50):
        for wanted in (Wanted(), Wanted("names")):
            assert sorted(listed(parts, limit, wanted)) == sorted(listed(whole, limit, wanted))
    states = [asyncio.run(one.state(SOON)) for one in (whole, parts)]
    assert states[0].groups == states[1].groups and states[1].ready


def test_writes_go_to_the_shard_that_holds_the_name(tmp_path: Path) -> None:
    bundle = make_bundle(make_run(tmp_path / "run"))
    parts = retriever(bundle, 3)
    items: list[Any] = [make_item(f"written {color}") for color in COLORS]
    new = [NewItem(f"sku-{place}", item, "shop", "live") for place, item in enumerate(items)]
    vectors = np.stack([vector_of(item) for item in items])
    names, version = asyncio.run(parts.write(new, vectors, "revision-a", SOON))
    assert names == [f"sku-{place}" for place in range(8)] and version == 8
    assert {name for name, _ in ask(parts, "red", 3)} >= {"sku-0"}
    assert asyncio.run(parts.get("sku-3", SOON))[1].text == "written yellow"  # type: ignore[index]
    assert asyncio.run(parts.delete("sku-0", SOON)) is not None and asyncio.run(parts.delete("sku-0", SOON)) is None
    again = retriever(bundle, 2)
    assert asyncio.run(again.state(SOON)).live == 7, "another number of shards reads the same log"
    assert asyncio.run(again.picture(ask(again, "red", 1, Wanted(kind="image"))[0][0], SOON))[1] == picture("red")  # type: ignore[index]


def test_a_shard_that_fails_fails_the_search(tmp_path: Path) -> None:
    parts = retriever(make_bundle(make_run(tmp_path / "run")), 2)
    parts.shards[1].failure = StageDown("retriever-1")  # type: ignore[attr-defined]
    with pytest.raises(UnimeError, match="retriever-1 is down"):
        ask(parts, "red", 3)


def test_deployments_are_named_by_their_place() -> None:
    assert retriever_names(ServeConfig()) == ["retriever"]
    assert retriever_names(ServeConfig(retriever_shards=2)) == ["retriever-0", "retriever-1"]
