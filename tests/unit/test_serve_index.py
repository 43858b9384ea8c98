"""The index against brute force: filters, the tail, deletions, rebuilds; and the live log through kills."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.unit.models_fixtures import make_item
from tests.unit.serve_fixtures import DIM, FakeEncoder, filled_engine, make_bundle, make_run, vector_of
from unime_ray.artifacts import Run
from unime_ray.config_serve import IndexConfig, ServeConfig
from unime_ray.corpus.payload import Item
from unime_ray.serve import live
from unime_ray.serve.catalog import TAIL_CAPACITY, Catalog, Ref, Rows, Wanted
from unime_ray.serve.filling import reembed
from unime_ray.serve.live import LiveLog, LogRow, Put
from unime_ray.serve.retriever import RetrieverEngine
from unime_ray.serve.snapshot import Snapshot
from unime_ray.serve.stages import NewItem

EVERYTHING = Wanted()


def plain(text: str) -> Item:
    """An item of text alone."""
    item = make_item(text)
    return Item(item.item_id, item.rendered, item.text, None, None)


def unit(rng: np.random.Generator, count: int) -> np.ndarray:
    vectors = rng.normal(size=(count, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def rows_of(count: int) -> Rows:
    """Half of the rows have a picture; thirds are in datasets a, b, c; one row in two datasets."""
    pictures = [bytes(16) if n % 2 else None for n in range(count)]
    refs = [Ref(f"r{n:04}", bytes([n % 256]) * 16, pictures[n], None, "abc"[n % 3], "s") for n in range(count)]
    groups = {(name, "s"): list(range(place, count, 3)) for place, name in enumerate("abc")}
    groups["b", "s"].append(0)
    return Rows(refs, groups)


def put(row: int, name: str, vector: np.ndarray, revision: str = "v", dataset: str = "live") -> LogRow:
    return LogRow(row, live.PUT, name, bytes(16), None, dataset, "s", revision, vector)


def brute(vectors: dict[str, np.ndarray], query: np.ndarray, k: int) -> list[str]:
    return sorted(vectors, key=lambda name: (-float(vectors[name] @ query), name))[:k]


def names(catalog: Catalog, query: np.ndarray, k: int, wanted: Wanted = EVERYTHING) -> list[str]:
    return [found.ref.id for found in catalog.search(query[None], [k], [wanted])[0]]


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_every_kind_of_index_finds_most_and_says_how_much(kind: str, precision: str) -> None:
    vectors = unit(np.random.default_rng(0), 2000)
    config = IndexConfig.model_validate({"kind": kind, "precision": precision, "ivf_probes": 8})
    snapshot = Snapshot(vectors, config)
    assert snapshot.report.recall >= (1.0 if (kind, precision) == ("flat", "float32") else 0.8), snapshot.report
    odd = np.arange(2000) % 2 == 1
    _, rows = snapshot.search(vectors[:5], 10, odd)
    assert (rows % 2 == 1).all(), "the mask holds"
    mapped = Snapshot(vectors, config.model_copy(update={"memory_map": True}))
    for mask in (None, odd):
        for one, other in zip(
            snapshot.search(vectors[:5], 10, mask), mapped.search(vectors[:5], 10, mask), strict=True
        ):
            np.testing.assert_array_equal(one, other)
    assert "memory-mapped" in mapped.report.factory


def test_search_equals_brute_force_through_writes_and_deletions() -> None:
    rng = np.random.default_rng(1)
    base, vectors = rows_of(50), unit(rng, 50)
    catalog = Catalog(base, vectors, IndexConfig(), "v")
    truth = {ref.id: vector for ref, vector in zip(base.refs, vectors, strict=True)}
    log: list[LogRow] = []
    for step in range(3 * TAIL_CAPACITY):
        name = f"r{rng.integers(50):04}" if step % 3 else f"n{rng.integers(40):04}"
        if step % 4 == 3 and name in truth:
            log.append(LogRow(step, live.DELETE, name))
            del truth[name]
        else:
            vector = unit(rng, 1)[0]
            log.append(put(step, name, vector))
            truth[name] = vector
        catalog.apply(log[-1:])
    rebuilt = Catalog(base, vectors, IndexConfig(), "v", log)
    assert len(catalog) == len(rebuilt) == len(truth) and catalog.version == rebuilt.version == len(log)
    written = {row.id for row in log if row.op == live.PUT} & truth.keys()
    assert catalog.num_live == rebuilt.num_live == len(written)
    for query in unit(rng, 10):
        expected = brute(truth, query, 7)
        assert names(catalog, query, 7) == names(rebuilt, query, 7) == expected
    catalog.apply(log)
    assert len(catalog) == len(truth), "rows taken in before are skipped"


def test_filters_equal_brute_force() -> None:
    base, vectors = rows_of(60), unit(np.random.default_rng(2), 60)
    catalog = Catalog(base, vectors, IndexConfig(), "v")
    catalog.apply([put(0, "x", vectors[0], dataset="b")])
    query = vectors[0]
    for wanted, kept in (
        (Wanted(dataset="b"), lambda n: n % 3 == 1 or n == 0),
        (Wanted(dataset="c", kind="image"), lambda n: n % 3 == 2 and n % 2 == 1),
        (Wanted(split="s", kind="text"), lambda n: n % 2 == 0),
    ):
        truth = {f"r{n:04}": vectors[n] for n in range(60) if kept(n)}
        if wanted.dataset != "c":
            truth["x"] = vectors[0]
        assert names(catalog, query, 100, wanted) == brute(truth, query, 100)
    assert names(catalog, query, 5, Wanted(dataset="nothing")) == []


def test_a_batch_of_different_searches_gives_each_its_own() -> None:
    base, vectors = rows_of(30), unit(np.random.default_rng(3), 30)
    catalog = Catalog(base, vectors, IndexConfig(), "v")
    wanted = [Wanted(), Wanted(dataset="a"), Wanted()]
    together = catalog.search(vectors[:3], [2, 5, 9], wanted)
    for place, (k, each) in enumerate(zip([2, 5, 9], wanted, strict=True)):
        assert [found.ref.id for found in together[place]] == names(catalog, vectors[place], k, each)


def test_another_revisions_vectors_are_never_searched() -> None:
    base, vectors = rows_of(10), unit(np.random.default_rng(4), 10)
    old = put(0, "old", vectors[0], revision="before")
    for catalog in (Catalog(base, vectors, IndexConfig(), "v", [old]), Catalog(base, vectors, IndexConfig(), "v")):
        catalog.apply([old])
        assert "old" not in names(catalog, vectors[0], 20) and [row.id for row in catalog.stale] == ["old"]
        catalog.apply([put(1, "old", vectors[0])])
        assert "old" in names(catalog, vectors[0], 20) and not catalog.stale


# --- the log ----------------------------------------------------------------------------------------------------------


def write(log: LiveLog, name: str, text: str = "the color red") -> None:
    item = plain(text)
    log.append_puts([Put(name, item, "d", "s", "v", vector_of(item))])


def test_the_log_reads_back_and_keeps_row_numbers_when_compacted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "COMPACT_EVERY", 5)
    log, reader = LiveLog(Run(str(tmp_path))), LiveLog(Run(str(tmp_path)))
    assert reader.read_from(0) == []
    for n in range(12):
        write(log, f"i{n}", f"text {n}")
    log.append_deletes(["i3"])
    rows = reader.read_from(0)
    assert [(row.row, row.id) for row in rows] == [*((n, f"i{n}") for n in range(12)), (12, "i3")]
    assert rows[-1].op == live.DELETE and rows[-1].vector is None
    assert [row.id for row in reader.read_from(10)] == ["i10", "i11", "i3"] and reader.read_from(13) == []
    assert [item.text for item in reader.items([7, 0, 7])] == ["text 7", "text 0", "text 7"]
    write(log, "late", "later")
    assert reader.items([13])[0].text == "later", "a reader sees rows written after it opened the log"


WRITER = """
import sys
from pathlib import Path
from tests.unit.test_serve_index import LiveLog, Run, write
log = LiveLog(Run(sys.argv[1]))
for n in range(1000):
    write(log, f"i{n}")
    print(n, flush=True)
"""


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, cwd=root, text=True, bufsize=1
    )
    assert writer.stdout is not None
    acknowledged = -1
    for line in writer.stdout:
        acknowledged = int(line)
        if acknowledged == 20:
            os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    rows = LiveLog(Run(str(tmp_path))).read_from(0)
    assert acknowledged >= 20
    assert [row.id for row in rows][: acknowledged + 1] == [f"i{n}" for n in range(acknowledged + 1)]


# --- the engine -------------------------------------------------------------------------------------------------------


def test_replicas_follow_each_other_and_restarts_keep_everything(tmp_path: Path) -> None:
    bundle = make_bundle(make_run(tmp_path / "run"))
    one, other = filled_engine(bundle), filled_engine(bundle)
    assert not RetrieverEngine(bundle).missing, "vectors are kept for the next start"
    item = plain("bright teal")
    new = [NewItem("t", item, "d", "s"), NewItem(None, item, "d", "s")]
    ids, version = one.write(new, np.stack([vector_of(item)] * 2))
    assert ids == ["t", item.item_id.hex()] and version == 2
    assert other.get("t") is None
    other.refresh()
    for engine in (one, other, RetrieverEngine(bundle)):
        hits = engine.search(vector_of(item)[None], [2], [Wanted()])[0]
        assert {hit.ref.id for hit, _ in hits} == set(ids) and hits[0][1].text == "bright teal"
    assert other.delete("t") == 3 and other.delete("t") is None
    one.refresh()
    assert one.get("t") is None and one.state().live == 1


def test_a_rebuild_takes_the_tail_into_the_snapshot(tmp_path: Path) -> None:
    config = ServeConfig(index=IndexConfig(rebuild_after=3))
    engine = filled_engine(make_bundle(make_run(tmp_path / "run"), config))
    for n in range(3):
        item = plain(f"thing {n}")
        engine.write([NewItem(f"i{n}", item, "d", "s")], vector_of(item)[None])
    assert engine.needs_rebuild() and engine.catalog.tail_rows == 3
    before = engine.search(vector_of(item)[None], [5], [Wanted()])
    assert engine.rebuild() and not engine.needs_rebuild() and engine.catalog.tail_rows == 0
    after = engine.search(vector_of(item)[None], [5], [Wanted()])
    assert [hit.ref.id for hit, _ in before[0]] == [hit.ref.id for hit, _ in after[0]]
    assert engine.state().live == 3


def test_another_embedder_embeds_pool_and_live_items_anew(tmp_path: Path) -> None:
    bundle = make_bundle(make_run(tmp_path / "run"))
    first = filled_engine(bundle)
    item = plain("the color red")
    first.write([NewItem("mine", item, "d", "s")], vector_of(item)[None])
    wider = replace(bundle, embedder=replace(bundle.embedder, revision="revision-b", dim=DIM + 8))
    engine = RetrieverEngine(wider)
    assert len(engine.missing) == 16 and not engine.state().ready and engine.state().indexed == 0
    encoder = FakeEncoder("revision-b", DIM + 8)
    items = engine.payload.items(engine.missing)
    engine.take_in(engine.missing, np.stack([vector_of(each, DIM + 8) for each in items]), [None] * len(items))
    engine.rebuild()
    assert engine.get("mine") is None and not engine.state().ready
    asyncio.run(reembed(engine, encoder))
    assert engine.get("mine") is not None and engine.state().ready
    assert first.state().live == 1 and RetrieverEngine(bundle).state().live == 0, "the last word is the new revision's"


def test_an_item_without_a_vector_is_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = RetrieverEngine(make_bundle(make_run(tmp_path / "run")))
    ids = engine.missing
    vectors = np.stack([vector_of(item) for item in engine.payload.items(ids)])
    engine.take_in(ids, vectors, ["does not decode", *[None] * (len(ids) - 1)])
    engine.rebuild()
    state = engine.state()
    assert (state.indexed, state.expected, state.ready) == (15, 15, True) and ids[0].hex() in caplog.text
