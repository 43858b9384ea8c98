"""Retrieve: for every query of the mined split the raw top-k of the pool by cosine (UniME-V2, Eq. 1, before delta).

Left out are only a query's known positives, items with the same text and picture as one of them under another
instruction, the query's own content and, where `duplicates` has run, near-duplicates of these. All other filters belong
to select. Needs a Ray cluster.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unime_ray.artifacts import Manifest, Run, StageResult, remove, run_stage
from unime_ray.config import Resources, RunConfig
from unime_ray.corpus.payload import IdIndex
from unime_ray.errors import ArtifactError
from unime_ray.schemas import CANDIDATES, ID, IDS, conform
from unime_ray.stages.embed import MINED_SPLIT
from unime_ray.stages.engine import blocks_of, count_rows, map_actors, stage_context, write_rows
from unime_ray.stages.twins import NearGroups, leaked_items, same_content

CODE_VERSION = 1
BLOCKS_PER_ACTOR = 8
"""Each actor holds all vectors; another one is worth starting per so many blocks of queries."""
MAX_ACTORS = 64

log = logging.getLogger(__name__)

_PLAN = pa.schema([("query_id", ID), ("positive_ids", IDS), ("excluded_ids", IDS), ("pool", pa.string())])
EVERYTHING = ""
"""Name of the pool that holds the items of all datasets."""
SEPARATOR = "\x1f"
"""Between the names of the datasets whose pools a query searches together."""


def run_retrieve(run: Run, config: RunConfig, name: str = "base") -> Manifest:
    """Write `candidates/<name>` from `embeddings/<name>`: one row per query, its raw top-k and its positives.

    Raises:
        ArtifactError: embed has not run, or nothing of the mined split was embedded.
    """
    artifact = run.artifact("candidates", name)
    settings = config.retrieve
    deduplicates = bool(config.duplicates.methods)
    extra = {"duplicates": {"leak": config.duplicates.leak}} if deduplicates else {}

    tables = ("items", "qrels", "pools", *(("duplicates",) if deduplicates else ()))

    def build() -> StageResult:
        near = NearGroups.of(run.artifact("duplicates").read()) if deduplicates else NearGroups()
        dropped = leaked_items(run, near) if deduplicates and config.duplicates.leak == "drop" else set()
        plan = make_plan(run, name, settings.scope, near, dropped)
        remove(artifact.data_uri)  # an attempt that was killed: retrieval is quick, so it starts over
        blocks = blocks_of(plan.queries, settings.queries_per_batch)
        actors = min(MAX_ACTORS, -(-len(blocks) // BLOCKS_PER_ACTOR))
        resources = Resources(num_actors=1, max_actors=actors, num_cpus=settings.num_cpus)
        threads = max(1, int(settings.num_cpus))
        arguments = {"run": run, "name": name, "top_k": settings.top_k, "threads": threads, "dropped": dropped}
        with stage_context():
            found = map_actors(blocks, RetrieveActor, arguments, resources, settings.queries_per_batch)
            write_rows(found, artifact, resources)
        rows = count_rows(artifact)
        if rows != plan.queries.num_rows:
            raise ArtifactError(f"{artifact.uri}: {rows} rows for {plan.queries.num_rows} queries; run retrieve again")
        return StageResult(rows=rows, counts=plan.counts)

    return run_stage(
        artifact,
        stage="retrieve",
        code_version=CODE_VERSION,
        config=settings.model_dump(mode="json", include={"top_k", "scope"}) | extra,
        inputs=[*(run.artifact(table) for table in tables), run.artifact("embeddings", name)],
        build=build,
    )


@dataclass
class Plan:
    """What to search: per query its positives and what it must not get; all of it has a vector."""

    queries: pa.Table
    counts: dict[str, int] = field(default_factory=dict)


def make_plan(
    run: Run, name: str, scope: str = "global", near: NearGroups | None = None, dropped: Collection[bytes] = ()
) -> Plan:
    """The queries of the mined split with their positives, without what could not be embedded.

    Args:
        scope: `global`, every query searches the whole pool; `dataset`, the pools of the datasets it stands in.
        near: groups of near-duplicates; nothing of the group of a query or its positives is a candidate.
        dropped: items that are not mined, be they query, positive or candidate.

    Raises:
        ArtifactError: no query with a positive is left, or the pool is empty.
    """
    embedded = run.artifact("embeddings", name).read(["item_id"]).column(0)
    all_pairs, pool = _mined(run)
    pairs = [all_pairs.column(column) for column in ("query_id", "item_id")]
    positives: dict[bytes, list[bytes]] = defaultdict(list)
    barred = pa.array(sorted(dropped), ID)
    usable = pc.and_(*(pc.is_in(column, value_set=embedded) for column in pairs))
    leaking = pc.or_(*(pc.is_in(column, value_set=barred) for column in pairs))
    with_vectors, embedded_queries = pc.sum(usable).as_py() or 0, pc.count_distinct(pairs[0].filter(usable)).as_py()
    usable = pc.and_not(usable, leaking)
    for query, item in zip(*(column.filter(usable).to_pylist() for column in pairs), strict=True):
        positives[query].append(item)
    known: dict[bytes, set[bytes]] = defaultdict(set)
    for query, item in zip(*(column.to_pylist() for column in pairs), strict=True):
        known[query].add(item)
    leaking_pool = pc.is_in(pool, value_set=barred)
    pool = pool.filter(pc.and_not(pc.is_in(pool, value_set=embedded), leaking_pool))
    counts = {
        "queries": len(positives),
        "queries_without_vectors": len(known) - embedded_queries,
        "positives": int(pc.sum(usable).as_py() or 0),
        "positives_without_vectors": len(usable) - with_vectors,
        "pool": len(pool),
    }
    if dropped:
        counts |= {"pairs_leaked": pc.sum(leaking).as_py() or 0, "pool_leaked": pc.sum(leaking_pool).as_py() or 0}
    if not positives or not len(pool):
        raise ArtifactError(
            f"nothing to mine: {len(positives)} queries and {len(pool)} pool items of split {MINED_SPLIT!r} have "
            "vectors; mark training sources with `split: train` in corpus.sources and see the rejects"
        )
    queries = sorted(positives)
    twins = same_content(
        run, {*queries, *(item for query in queries for item in known[query])}, pool, near or NearGroups()
    )
    excluded = [_excluded(query, known[query], twins) for query in queries]
    counts["duplicates_excluded"] = sum(len(ids - known[q] - {q}) for q, ids in zip(queries, excluded, strict=True))
    pools = _pool_names(run) if scope == "dataset" else {}
    columns = [
        queries,
        [sorted(positives[query]) for query in queries],
        [sorted(ids) for ids in excluded],
        [pools.get(query, EVERYTHING) for query in queries],
    ]
    # Queries of one pool lie together, so that a batch searches few pools.
    return Plan(pa.table(columns, schema=_PLAN).sort_by([("pool", "ascending"), ("query_id", "ascending")]), counts)


def _pool_names(run: Run) -> dict[bytes, str]:
    """For each query of the mined split the datasets it stands in, as one name."""
    qrels = run.artifact("qrels").read(["dataset", "split", "query_id"])
    qrels = qrels.filter(pc.equal(qrels.column("split"), MINED_SPLIT))
    names: dict[bytes, set[str]] = defaultdict(set)
    for query, dataset in zip(qrels.column("query_id").to_pylist(), qrels.column("dataset").to_pylist(), strict=True):
        names[query].add(dataset)
    return {query: SEPARATOR.join(sorted(datasets)) for query, datasets in names.items()}


def pool_items(run: Run, pool: str) -> pa.Array:
    """Ids of the items of the mined split in the pool of that name, each once."""
    pools = run.artifact("pools").read(["dataset", "split", "item_id"])
    wanted = pc.equal(pools.column("split"), MINED_SPLIT)
    if pool != EVERYTHING:
        wanted = pc.and_(wanted, pc.is_in(pools.column("dataset"), value_set=pa.array(pool.split(SEPARATOR))))
    return pools.filter(wanted).column("item_id").unique()


def _mined(run: Run) -> tuple[pa.Table, pa.Array]:
    """((query, positive) pairs, pool ids) of the mined split, each once."""
    qrels = run.artifact("qrels").read(["split", "query_id", "item_id", "relevance"])
    mine = pc.and_(pc.equal(qrels.column("split"), MINED_SPLIT), pc.greater(qrels.column("relevance"), 0))
    pairs = qrels.filter(mine).group_by(["query_id", "item_id"]).aggregate([])
    return pairs, pool_items(run, EVERYTHING)


def _excluded(query: bytes, positives: set[bytes], twins: Mapping[bytes, list[bytes]]) -> set[bytes]:
    found = positives | {query}
    for item in (query, *positives):
        found |= set(twins.get(item, ()))
    return found


class RetrieveActor:
    """Ray Data: rows of the plan -> `candidates` rows. Holds every vector of the run's mining."""

    def __init__(self, run: Run, name: str, top_k: int, threads: int, dropped: Collection[bytes] = ()) -> None:
        import faiss

        faiss.omp_set_num_threads(threads)
        self._run, self._top_k = run, top_k
        table = run.artifact("embeddings", name).read()
        self._index = IdIndex(table.column("item_id"))
        gone = pc.is_in(table.column("item_id"), value_set=pa.array(sorted(dropped), ID))
        self._embedded = table.column("item_id").filter(pc.invert(gone))
        self._vectors_ND = _matrix(table.column("embedding"))
        self._pools: dict[str, tuple[list[bytes], np.ndarray]] = {}

    def __call__(self, batch: pa.Table) -> pa.Table:
        parts = [self._search(batch.filter(pc.equal(batch.column("pool"), pool)), pool) for pool in _distinct(batch)]
        return pa.concat_tables(parts)

    def _search(self, batch: pa.Table, pool: str) -> pa.Table:
        from unime_ray.index import exact_top_k, inner_products

        queries, positives, excluded = (batch.column(name).to_pylist() for name in _PLAN.names[:3])
        pool_ids, pool_ND = self._pool(pool)
        queries_QD = self._rows(queries)
        barred = [set(ids) for ids in excluded]
        found, similarities = exact_top_k(queries_QD, pool_ND, pool_ids, self._top_k, barred)
        positive_similarities = [
            inner_products(query_D, self._rows(items)) for query_D, items in zip(queries_QD, positives, strict=True)
        ]
        columns = [queries, found, similarities, positives, positive_similarities]
        return conform(pa.table(columns, names=CANDIDATES.names), CANDIDATES, "candidates")

    def _pool(self, name: str) -> tuple[list[bytes], np.ndarray]:
        if name not in self._pools:
            items = pool_items(self._run, name)
            ids = sorted(items.filter(pc.is_in(items, value_set=self._embedded)).to_pylist())
            self._pools[name] = ids, self._rows(ids)
        return self._pools[name]

    def _rows(self, ids: Sequence[bytes]) -> np.ndarray:
        return self._vectors_ND[self._index.rows(ids, "embeddings")]


def _distinct(batch: pa.Table) -> list[str]:
    return sorted(batch.column("pool").unique().to_pylist())


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    """(N, D) float32 of an `embedding` column, in float32 or float16."""
    width = column.type.list_size
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.ascontiguousarray(flat.reshape(-1, width), dtype=np.float32)
