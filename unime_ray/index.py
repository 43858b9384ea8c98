"""Exact nearest neighbours by inner product, the same to the last bit however the pool is cut.

faiss finds who is near (brute force, as `IndexFlatIP`, without copying the pool); the similarities that are kept are
then computed pair by pair in float64 and rounded to float32. Blocked matrix products round differently by position, so
only this makes equal vectors tie exactly and shards merge to what one search gives. Pure: no ray, no torch.

Shape suffixes: Q queries, N pool items, D dimensions, K results.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import faiss
import numpy as np

Neighbours = tuple[list[list[bytes]], list[np.ndarray]]
"""Ids and float32 similarities of each query's neighbours, most similar first, ties by id."""

SLACK = 2e-6
"""Bound of the rounding error of a float32 inner product of unit vectors."""
SPARE = 16
"""Extra neighbours fetched at first, so that few queries with ties or exclusions need a second search."""


def exact_top_k(
    queries_QD: np.ndarray,
    pool_ND: np.ndarray,
    pool_ids: Sequence[bytes],
    k: int,
    exclude: Sequence[Collection[bytes]] | None = None,
) -> Neighbours:
    """The `k` pool items of highest inner product per query, its `exclude`d ids left out; fewer if the pool is small.

    Args:
        queries_QD: float32 (Q, D), unit norm.
        pool_ND: float32 (N, D), unit norm.
        pool_ids: N distinct ids; ties in similarity are broken by them.
        exclude: for each query the ids it must not get (its positives, their duplicates, itself).

    Raises:
        ValueError: the widths differ, or the ids are not as many as the pool's rows.
    """
    if queries_QD.shape[1] != pool_ND.shape[1]:
        raise ValueError(f"queries have {queries_QD.shape[1]} dimensions, the pool has {pool_ND.shape[1]}")
    if len(pool_ids) != len(pool_ND):
        raise ValueError(f"{len(pool_ids)} ids for a pool of {len(pool_ND)} rows")
    excluded = exclude if exclude is not None else [()] * len(queries_QD)
    ids: list[list[bytes]] = [[] for _ in range(len(queries_QD))]
    similarities: list[np.ndarray] = [np.empty(0, np.float32) for _ in range(len(queries_QD))]
    open_rows = list(range(len(queries_QD))) if len(pool_ND) and k > 0 else []
    width = k + max((len(ex) for ex in excluded), default=0) + SPARE
    while open_rows:
        width = min(width, len(pool_ND))
        found, rows = faiss.knn(
            np.ascontiguousarray(queries_QD[open_rows], np.float32),
            np.ascontiguousarray(pool_ND, np.float32),
            width,
            metric=faiss.METRIC_INNER_PRODUCT,
        )
        unsure = []
        for place, query in enumerate(open_rows):
            best, values = _ranked(queries_QD[query], pool_ND, pool_ids, rows[place], excluded[query])
            # Whoever was not fetched is at most as near as the last fetched one, up to rounding.
            whole = width == len(pool_ND) or (len(best) >= k and found[place, -1] + SLACK < values[k - 1])
            ids[query], similarities[query] = best[:k], values[:k]
            if not whole:
                unsure.append(query)
        open_rows, width = unsure, width * 4
    return ids, similarities


def merge_top_k(shards: Sequence[Neighbours], k: int) -> Neighbours:
    """The neighbours in the union of disjoint pool shards, from those in each: exactly what one search would give."""
    ids, similarities = [], []
    for parts in zip(*(zip(*shard, strict=True) for shard in shards), strict=True):
        pairs = sorted((-float(s), i) for part_ids, part_s in parts for i, s in zip(part_ids, part_s, strict=True))[:k]
        ids.append([identifier for _, identifier in pairs])
        similarities.append(np.array([-negated for negated, _ in pairs], dtype=np.float32))
    return ids, similarities


def inner_products(query_D: np.ndarray, rows_KD: np.ndarray) -> np.ndarray:
    """(K,) float32 inner products; each depends on its own two vectors alone, not on its neighbours in memory."""
    return (rows_KD.astype(np.float64) * query_D.astype(np.float64)).sum(axis=1).astype(np.float32)


def _ranked(
    query_D: np.ndarray,
    pool_ND: np.ndarray,
    pool_ids: Sequence[bytes],
    rows_K: np.ndarray,
    excluded: Collection[bytes],
) -> tuple[list[bytes], np.ndarray]:
    kept = [int(row) for row in rows_K if row >= 0 and pool_ids[row] not in excluded]
    values = inner_products(query_D, pool_ND[kept])
    order = sorted(range(len(kept)), key=lambda place: (-float(values[place]), pool_ids[kept[place]]))
    return [pool_ids[kept[place]] for place in order], values[order]
