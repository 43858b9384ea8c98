"""Searching a test set's pool with its queries, by inner product of unit vectors: ranks of the golds and the top."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from unime_ray.evaluation.protocol import Query, TestSet
from unime_ray.evaluation.tables import with_metrics
from unime_ray.metrics import Floats, Ints, comparable, gold_ranks

SCORES_PER_BLOCK = 8_000_000
"""Similarities held at once: 64 MB of float64."""


def search(
    test_set: TestSet, vectors: Mapping[bytes, np.ndarray], ks: tuple[int, ...], top_k: int
) -> Iterator[dict[str, object]]:
    """One row of the per-query table for each query of the set.

    `vectors` holds a unit vector (D,) for every query and pool item.
    """
    pool_ND = np.stack([vectors[item] for item in test_set.pool])
    place = {item: index for index, item in enumerate(test_set.pool)}
    block = max(1, SCORES_PER_BLOCK // len(test_set.pool))
    for start in range(0, len(test_set.queries), block):
        queries = test_set.queries[start : start + block]
        scores_BN = comparable(np.stack([vectors[query.query_id] for query in queries]) @ pool_ND.T)
        for query, scores_N in zip(queries, scores_BN, strict=True):
            row = {"dataset": test_set.dataset, "split": test_set.split, "meta_task": test_set.meta_task}
            yield with_metrics(row | _answer(query, scores_N, test_set.pool, place, top_k), ks)


def _answer(
    query: Query, scores_N: Floats, pool: list[bytes], place: dict[bytes, int], top_k: int
) -> dict[str, object]:
    gold = np.array([place[item] for item in query.golds])
    scores_N = _searchable(query, scores_N, place)
    top = top_of(scores_N, gold, top_k)
    return {
        "query_id": query.query_id,
        "gold_ids": query.golds,
        "gold_relevances": query.relevances,
        "gold_ranks": gold_ranks(scores_N, gold).tolist(),
        "gold_scores": scores_N[gold].tolist(),
        "top_ids": [pool[index] for index in top],
        "top_scores": scores_N[top].tolist(),
    }


def _searchable(query: Query, scores_N: Floats, place: dict[bytes, int]) -> Floats:
    """Scores with -inf for what this query is not searched in: see the protocol."""
    scores_N = np.where(np.isnan(scores_N), -2.0, scores_N)  # below any cosine: a broken vector finds nothing
    if query.candidates is not None:
        allowed = np.zeros(len(scores_N), dtype=bool)
        allowed[[place[item] for item in query.candidates]] = True
        scores_N[~allowed] = -np.inf
    passed_over = (query.known | {query.query_id}) - set(query.golds)
    scores_N[[place[item] for item in passed_over if item in place]] = -np.inf
    return scores_N


def top_of(scores_N: Floats, gold: Ints, top_k: int) -> Ints:
    """Places of the best `top_k`, best first; golds come after what they tie with, then the lower id goes first."""
    count = int((scores_N > -np.inf).sum())
    k = min(top_k, count)
    if not k:
        return np.empty(0, dtype=np.int64)
    threshold = np.partition(scores_N, -k)[-k]
    near = np.flatnonzero(scores_N >= threshold)
    order = np.lexsort((near, np.isin(near, gold), -scores_N[near]))
    return near[order][:k]
