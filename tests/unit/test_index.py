"""Exact top-k: against brute force, with exclusions, ties and shards."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unime_ray.index import exact_top_k, inner_products, merge_top_k


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def ids_of(count: int) -> list[bytes]:
    # Hashes, so that the order of ids is not the order of rows.
    return [hashlib.blake2b(str(number).encode(), digest_size=16).digest() for number in range(count)]


def brute(query: np.ndarray, pool: np.ndarray, ids: list[bytes], k: int, exclude: set[bytes]) -> list[bytes]:
    values = inner_products(query, pool)
    ranked = sorted((-float(value), identifier) for value, identifier in zip(values, ids, strict=True))
    return [identifier for _, identifier in ranked if identifier not in exclude][:k]


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    pool_size=st.integers(1, 90),
    distinct=st.integers(1, 90),
    k=st.integers(1, 40),
    num_excluded=st.integers(0, 30),
)
def test_equals_brute_force_with_ties_and_exclusions(
    seed: int, pool_size: int, distinct: int, k: int, num_excluded: int
) -> None:
    rng = np.random.default_rng(seed)
    directions = unit(rng.normal(size=(distinct, 8)))
    pool = directions[rng.integers(0, distinct, pool_size)]  # few directions: many exact ties
    queries, ids = unit(rng.normal(size=(4, 8))), ids_of(pool_size)
    exclude = [{ids[i] for i in rng.integers(0, pool_size, num_excluded)} for _ in queries]
    found, values = exact_top_k(queries, pool, ids, k, exclude)
    for row, query in enumerate(queries):
        assert found[row] == brute(query, pool, ids, k, exclude[row])
        assert values[row].dtype == np.float32 and len(values[row]) == len(found[row])
        assert (np.diff(values[row]) <= 0).all()


@pytest.mark.parametrize("cuts", [[40], [1, 2, 3], [10, 50, 90]])
def test_shards_merge_to_the_search_of_the_whole(cuts: list[int]) -> None:
    rng = np.random.default_rng(3)
    pool = unit(rng.normal(size=(100, 16)))
    pool[60:] = pool[:40]  # the same vectors in different shards: ties across them
    queries, ids = unit(rng.normal(size=(5, 16))), ids_of(100)
    exclude = [{ids[7], ids[67]}] * 5
    whole = exact_top_k(queries, pool, ids, 12, exclude)
    parts = [
        exact_top_k(queries, pool[a:b], ids[a:b], 12, exclude) for a, b in zip([0, *cuts], [*cuts, 100], strict=True)
    ]
    merged = merge_top_k(parts, 12)
    assert merged[0] == whole[0]
    assert all((a == b).all() for a, b in zip(merged[1], whole[1], strict=True))


def test_all_equal_vectors_are_ordered_by_id() -> None:
    pool = unit(np.ones((500, 4)))
    ids = ids_of(500)
    found, values = exact_top_k(pool[:1], pool, ids, 10)
    assert found[0] == sorted(ids)[:10]
    assert len(set(values[0].tolist())) == 1


def test_similarity_does_not_depend_on_the_company() -> None:
    rng = np.random.default_rng(0)
    pool = unit(rng.normal(size=(300, 96)))
    query = unit(rng.normal(size=(1, 96)))[0]
    alone = np.array([inner_products(query, pool[i : i + 1])[0] for i in range(300)])
    assert (alone == inner_products(query, pool)).all()


def test_pool_smaller_than_k_and_fully_excluded() -> None:
    pool, ids = unit(np.eye(3)), ids_of(3)
    found, _ = exact_top_k(pool[:2], pool, ids, 5, [set(), set(ids)])
    assert len(found[0]) == 3 and found[1] == []


def test_empty_pool() -> None:
    found, values = exact_top_k(unit(np.eye(3)), np.empty((0, 3), np.float32), [], 5)
    assert found == [[], [], []] and all(len(row) == 0 for row in values)


def test_wrong_width_and_wrong_ids_are_refused() -> None:
    pool = unit(np.eye(3))
    with pytest.raises(ValueError, match="2 dimensions"):
        exact_top_k(unit(np.eye(2)), pool, ids_of(3), 1)
    with pytest.raises(ValueError, match="2 ids"):
        exact_top_k(pool, pool, ids_of(2), 1)
