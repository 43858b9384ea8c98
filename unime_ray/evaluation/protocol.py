"""What is measured: the queries of the test splits with their golds, and the pool each is searched in.

A test set is one (dataset, split). Its pool is the union of the `pools` rows of that dataset and split (without any:
all rows of that split); a query with a row in `eval_candidates` is searched in that list instead. A query's *golds*
are its positives of that test set that are in its pool; positives it has elsewhere, in training for instance, are
neither golds nor wrong answers, and are passed over. So is the query itself, if the pool holds it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unime_ray.artifacts import Run
from unime_ray.config import RunConfig
from unime_ray.errors import EvaluationError
from unime_ray.ids import show


@dataclass
class Query:
    """One query of a test set. `golds` and `relevances` go together; all positives of the query are in `known`."""

    query_id: bytes
    golds: list[bytes]
    relevances: list[float]
    known: set[bytes]
    candidates: list[bytes] | None = None


@dataclass
class TestSet:
    """One dataset and split: its queries by id and its pool, sorted by id."""

    __test__ = False  # not a pytest class, whatever its name says

    dataset: str
    split: str
    meta_task: str | None
    queries: list[Query]
    pool: list[bytes]


@dataclass
class Protocol:
    """All test sets of a run, and the queries left out with the reason."""

    sets: list[TestSet]
    rejects: list[dict[str, object]] = field(default_factory=list)

    @property
    def num_queries(self) -> int:
        return sum(len(one.queries) for one in self.sets)

    def item_ids(self) -> list[bytes]:
        """Every item to embed, once, in a fixed order."""
        wanted: dict[bytes, None] = {}
        for one in self.sets:
            wanted.update(dict.fromkeys(query.query_id for query in one.queries))
            wanted.update(dict.fromkeys(one.pool))
        return list(wanted)


def load_protocol(run: Run, config: RunConfig) -> Protocol:
    """Read the test sets of `config.evaluate.splits` from qrels, pools and eval_candidates.

    Raises:
        EvaluationError: no query in these splits, or more than `corpus.max_error_rate` of the queries have no positive
            in their pool.
    """
    qrels = _positives(run.artifact("qrels").read())
    tested = qrels.filter(pc.is_in(qrels["split"], pa.array(config.evaluate.splits)))
    if not tested.num_rows:
        splits = ", ".join(sorted(set(qrels["split"].to_pylist()))) or "none"
        wanted = ", ".join(config.evaluate.splits)
        raise EvaluationError(f"evaluate.splits: no query in split {wanted}; the corpus has {splits}")
    known = _known(qrels, tested)
    pools, candidates = _pools(run, config), _candidates(run)
    protocol, meta_tasks = Protocol([]), _meta_tasks(run)
    for (dataset, split), queries in sorted(_queries(tested, known).items()):
        pool = _pool_of(pools, dataset, split)
        found = TestSet(dataset, split, meta_tasks.get(dataset), queries, sorted(pool))
        protocol.sets.append(_checked(found, pool, candidates, protocol.rejects))
    _check_rejects(protocol, config.corpus.max_error_rate)
    for one in protocol.sets:
        one.queries = _sample(one.queries, config.evaluate.max_queries, config.evaluate.seed)
    return protocol


def _positives(qrels: pa.Table) -> pa.Table:
    return qrels.filter(pc.greater(qrels["relevance"], 0.0))


def _known(qrels: pa.Table, tested: pa.Table) -> dict[bytes, set[bytes]]:
    """All positives, whatever the dataset and split, of the tested queries."""
    rows = qrels.filter(pc.is_in(qrels["query_id"], pc.unique(tested["query_id"])))
    known: dict[bytes, set[bytes]] = defaultdict(set)
    for query, item in zip(rows["query_id"].to_pylist(), rows["item_id"].to_pylist(), strict=True):
        known[query].add(item)
    return known


def _queries(tested: pa.Table, known: dict[bytes, set[bytes]]) -> dict[tuple[str, str], list[Query]]:
    """Queries by (dataset, split), sorted by id, golds too. A positive named twice keeps its highest relevance."""
    graded: dict[tuple[str, str, bytes], dict[bytes, float]] = defaultdict(dict)
    columns = ("dataset", "split", "query_id", "item_id", "relevance")
    for dataset, split, query, item, relevance in zip(*(tested[name].to_pylist() for name in columns), strict=True):
        golds = graded[dataset, split, query]
        golds[item] = max(relevance, golds.get(item, 0.0))
    found: dict[tuple[str, str], list[Query]] = defaultdict(list)
    for (dataset, split, query), golds in sorted(graded.items()):
        items = sorted(golds)
        found[dataset, split].append(Query(query, items, [golds[item] for item in items], known[query]))
    return found


def _pools(run: Run, config: RunConfig) -> dict[tuple[str, str], set[bytes]]:
    table = run.artifact("pools").read()
    table = table.filter(pc.is_in(table["split"], pa.array(config.evaluate.splits)))
    pools: dict[tuple[str, str], set[bytes]] = defaultdict(set)
    columns = (table[name].to_pylist() for name in ("dataset", "split", "item_id"))
    for dataset, split, item in zip(*columns, strict=True):
        pools[dataset, split].add(item)
    return pools


def _pool_of(pools: dict[tuple[str, str], set[bytes]], dataset: str, split: str) -> set[bytes]:
    own = pools.get((dataset, split))
    if own:
        return own
    return set().union(*(items for (_, where), items in pools.items() if where == split))


def _candidates(run: Run) -> dict[tuple[str, str, bytes], list[bytes]]:
    artifact = run.artifact("eval_candidates")
    if artifact.manifest() is None or not artifact.require().rows:
        return {}
    table = artifact.read()
    columns = (table[name].to_pylist() for name in ("dataset", "split", "query_id", "candidate_ids"))
    return {(dataset, split, query): items for dataset, split, query, items in zip(*columns, strict=True)}


def _checked(
    found: TestSet,
    pool: set[bytes],
    candidates: dict[tuple[str, str, bytes], list[bytes]],
    rejects: list[dict[str, object]],
) -> TestSet:
    """The test set with only the golds that can be found; a query left without any becomes a reject."""
    kept: list[Query] = []
    extra: set[bytes] = set()
    for row, query in enumerate(found.queries):
        listed = candidates.get((found.dataset, found.split, query.query_id))
        query.candidates = None if listed is None else sorted(set(listed))
        where = pool if query.candidates is None else set(query.candidates)
        golds = [(gold, value) for gold, value in zip(query.golds, query.relevances, strict=True) if gold in where]
        if len(golds) < len(query.golds):
            lost = sorted(set(query.golds) - {gold for gold, _ in golds})
            reason = f"query {show(query.query_id)}: positive {show(lost[0])} is not in the pool it is searched in"
            rejects.append(
                {"source": f"{found.dataset}/{found.split}", "row": row, "stage": "evaluate", "reason": reason}
            )
        if golds:
            query.golds, query.relevances = [gold for gold, _ in golds], [value for _, value in golds]
            kept.append(query)
            extra.update(query.candidates or ())
    # Lists may hold items that no pool names; they are embedded too, and found by position in one sorted pool.
    return TestSet(found.dataset, found.split, found.meta_task, kept, sorted(pool | extra))


def _check_rejects(protocol: Protocol, limit: float) -> None:
    total = protocol.num_queries + len(protocol.rejects)
    if len(protocol.rejects) > limit * total or not protocol.num_queries:
        first = "; ".join(f"{one['source']}: {one['reason']}" for one in protocol.rejects[:10])
        raise EvaluationError(
            f"{len(protocol.rejects)} of {total} test queries lack a positive in their pool, more than "
            f"corpus.max_error_rate allows: {first}; add the items to a pool source of the same dataset and split"
        )


def _sample(queries: list[Query], limit: int | None, seed: int) -> list[Query]:
    if limit is None or len(queries) <= limit:
        return queries
    chosen = np.random.default_rng(seed).choice(len(queries), size=limit, replace=False)
    return [queries[index] for index in sorted(chosen)]


def _meta_tasks(run: Run) -> dict[str, str]:
    """The meta task of each dataset that has one, as ingest found it."""
    manifest = run.artifact("items").manifest()
    return {} if manifest is None else dict(manifest.counts.get("meta_tasks") or {})
