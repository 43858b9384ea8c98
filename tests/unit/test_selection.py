"""The published selection rule, branch by branch."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unime_ray.config import SelectConfig
from unime_ray.selection import (
    DELTA,
    FALSE_NEGATIVE,
    KEPT,
    POSITIVE,
    SPARE,
    UNSCORED,
    Selection,
    cycle_ranks,
    query_rng,
    select_negatives,
)


def ids(count: int) -> list[bytes]:
    return [bytes([number]) * 16 for number in range(count)]


def descending(count: int) -> list[float]:
    """Similarities 0.99, 0.98, ...: candidate i has rank i."""
    return [0.99 - 0.01 * number for number in range(count)]


def pick(scores: list[float | None], positive_score: float = 0.9, positive_similarity: float = 0.5, **config: object):
    count = len(scores)
    settings = SelectConfig(**config)  # type: ignore[arg-type]
    rng = query_rng(settings.seed, b"q" * 16)
    return select_negatives(ids(count), descending(count), scores, positive_score, positive_similarity, settings, rng)


def ranks(selection: Selection) -> list[int]:
    return [identifier[0] for identifier in selection.ids]


@pytest.mark.parametrize(
    ("count", "step", "expected"),
    [
        (0, 5, []),
        (1, 5, [0]),
        (7, 5, [0, 5, 1, 6, 2, 3, 4]),
        (12, 5, [0, 5, 10, 1, 6, 11, 2, 7, 3, 8, 4, 9]),
        (4, 1, [0, 1, 2, 3]),
        (3, 9, [0, 1, 2]),
    ],
)
def test_cycle(count: int, step: int, expected: list[int]) -> None:
    assert cycle_ranks(count, step) == expected


def test_fifty_candidates_give_the_published_ten() -> None:
    chosen = pick([0.1] * 50)
    assert ranks(chosen) == [0, 5, 10, 15, 20, 25, 30, 35, 40, 45]
    assert chosen.reasons[1] == "cycle 0 rank 5"
    assert chosen.counts["queries_full"] == 1 and chosen.counts["negatives_cycle"] == 10
    assert chosen.fates.count(SPARE) == 40 and chosen.fates.count(KEPT) == 10


def test_twelve_candidates_wrap_into_the_next_cycle() -> None:
    chosen = pick([0.1] * 12)
    assert ranks(chosen) == [0, 5, 10, 1, 6, 11, 2, 7, 3, 8]
    assert chosen.reasons[3] == "cycle 1 rank 1"


def test_false_negatives_are_dropped_strictly_above_alpha() -> None:
    chosen = pick([0.95, 0.9, 0.5, 0.4999, 0.51], positive_score=0.6, beta=0.1, num_negatives=2)
    assert chosen.fates == [FALSE_NEGATIVE, FALSE_NEGATIVE, KEPT, KEPT, FALSE_NEGATIVE]
    assert chosen.counts["candidates_false_negative"] == 3
    assert chosen.scores == [0.5, 0.4999]


@pytest.mark.parametrize(
    ("delta", "kept"),
    [("none", [0, 1, 2, 3]), ("positive", [2, 3]), (0.985, [1, 2, 3]), (0.97, [3]), (0.98, [2, 3])],
)
def test_delta_keeps_only_what_is_less_similar(delta: object, kept: list[int]) -> None:
    chosen = pick([0.1] * 4, positive_similarity=0.975, delta=delta, num_negatives=4)
    assert sorted(set(ranks(chosen))) == kept
    assert chosen.fates.count(DELTA) == 4 - len(kept)


def test_ranks_count_only_the_rest() -> None:
    # Candidates 0 and 1 are false negatives, so rank 0 of the rest is candidate 2.
    chosen = pick([0.95, 0.95] + [0.1] * 6, num_negatives=2)
    assert ranks(chosen) == [2, 7]
    assert chosen.reasons == ["cycle 0 rank 0", "cycle 0 rank 5"]


@pytest.mark.parametrize("missing", [None, math.nan])
def test_missing_scores_are_dropped_and_counted(missing: float | None) -> None:
    chosen = pick([missing, 0.2], num_negatives=1)
    assert ranks(chosen) == [1] and chosen.fates == [UNSCORED, KEPT]
    assert chosen.counts["candidates_unscored"] == 1


def test_delta_is_looked_at_before_the_score() -> None:
    assert pick([None, 0.1], delta=0.985, num_negatives=1).fates == [DELTA, KEPT]


def test_fewer_than_n_repeat_in_order() -> None:
    chosen = pick([0.1, 0.2, 0.3], num_negatives=8)
    assert ranks(chosen) == [0, 1, 2, 0, 1, 2, 0, 1]
    assert chosen.reasons[2:5] == ["cycle 2 rank 2", "repeat of rank 0", "repeat of rank 1"]
    assert chosen.scores[3] == 0.1 and chosen.similarities[3] == pytest.approx(0.99)
    assert chosen.counts["queries_filled"] == 1 and chosen.counts["negatives_repeat"] == 5


def test_fallback_skip() -> None:
    chosen = pick([0.95] * 12)
    assert chosen.ids == [] and chosen.counts["queries_skipped"] == 1
    assert chosen.fates == [FALSE_NEGATIVE] * 12


def test_fallback_published() -> None:
    chosen = pick([0.95] * 12, fallback="published")
    assert len(set(chosen.ids)) == 10 and chosen.scores == [1.0] * 10 and chosen.reasons == ["fallback"] * 10
    assert chosen.counts["queries_fallback"] == 1
    few = pick([0.95] * 3, fallback="published")
    assert len(few.ids) == 10 and len(set(few.ids)) == 3


def test_fallback_depends_on_seed_and_query_alone() -> None:
    config = SelectConfig(fallback="published", num_negatives=3)
    scores: list[float | None] = [0.99] * 20
    similarities, shuffled = descending(20), list(range(20))
    random.Random(1).shuffle(shuffled)

    def draw(order: list[int], seed: int, query: bytes) -> list[bytes]:
        given_ids, given_similarities = [ids(20)[i] for i in order], [similarities[i] for i in order]
        rng = query_rng(seed, query)
        return select_negatives(given_ids, given_similarities, scores, 0.5, 0.5, config, rng).ids

    first = draw(list(range(20)), 0, b"a" * 16)
    assert draw(shuffled, 0, b"a" * 16) == first
    assert draw(shuffled, 1, b"a" * 16) != first
    assert draw(shuffled, 0, b"b" * 16) != first


def test_no_candidates_at_all() -> None:
    for fallback in ("skip", "published"):
        assert pick([], fallback=fallback).counts["queries_skipped"] == 1


def test_ties_in_similarity_are_ranked_by_id() -> None:
    config = SelectConfig(num_negatives=3, cycle=1)
    names = [b"c" * 16, b"a" * 16, b"b" * 16]
    chosen = select_negatives(names, [0.5, 0.5, 0.5], [0.1, 0.1, 0.1], 0.9, 0.4, config, random.Random(0))
    assert chosen.ids == sorted(names)


def test_a_positive_among_the_candidates_is_never_taken() -> None:
    for fallback in ("skip", "published"):
        config = SelectConfig(num_negatives=2, fallback=fallback)
        chosen = select_negatives(
            ids(2), [0.9, 0.8], [0.0, 0.99], 0.5, 0.5, config, random.Random(0), positives={ids(1)[0]}
        )
        assert ids(1)[0] not in chosen.ids and chosen.fates[0] == POSITIVE


def test_bad_arguments() -> None:
    config = SelectConfig()
    with pytest.raises(ValueError, match="differ in length"):
        select_negatives(ids(2), [0.5], [0.1, 0.1], 0.9, 0.5, config, random.Random(0))
    with pytest.raises(ValueError, match="no score"):
        select_negatives(ids(1), [0.5], [0.1], math.nan, 0.5, config, random.Random(0))


candidates = st.lists(
    st.tuples(st.floats(-1, 1, width=32), st.one_of(st.none(), st.floats(0, 1, width=32))), max_size=60
)


@given(
    rows=candidates,
    positive_score=st.floats(0, 1, width=32),
    positive_similarity=st.floats(-1, 1, width=32),
    n=st.integers(1, 12),
    beta=st.floats(0, 0.5),
    delta=st.one_of(st.sampled_from(["none", "positive"]), st.floats(-1, 1)),
    fallback=st.sampled_from(["skip", "published"]),
    num_positives=st.integers(0, 4),
)
def test_properties(rows, positive_score, positive_similarity, n, beta, delta, fallback, num_positives) -> None:
    config = SelectConfig(num_negatives=n, beta=beta, delta=delta, fallback=fallback)
    names = ids(len(rows))
    known = dict(zip(names, rows, strict=True))
    positives = set(names[:num_positives])
    similarities, scores = [row[0] for row in rows], [row[1] for row in rows]
    chosen = select_negatives(
        names, similarities, scores, positive_score, positive_similarity, config, random.Random(0), positives
    )
    assert len(chosen.ids) in (0, n)
    assert len(chosen.ids) == len(chosen.scores) == len(chosen.similarities) == len(chosen.reasons)
    assert not positives & set(chosen.ids)
    assert len(chosen.fates) == len(rows)
    if not chosen.ids:
        assert KEPT not in chosen.fates and chosen.counts["queries_skipped"] == 1
    if "fallback" not in chosen.reasons:
        limit = {"none": math.inf, "positive": positive_similarity}.get(delta, delta)
        for identifier, score in zip(chosen.ids, chosen.scores, strict=True):
            assert score <= positive_score - beta and score == known[identifier][1]
            assert known[identifier][0] < limit
    told = sum(value for key, value in chosen.counts.items() if key.startswith("candidates_"))
    assert told == chosen.counts["candidates"] == len(rows)
