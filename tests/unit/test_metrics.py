"""Metrics in closed form: every expected value can be worked out on paper."""

from __future__ import annotations

import math

import numpy as np
import pytest

from unime_ray import metrics


def ranks(scores: list[float], gold: list[int], known: list[int] | None = None) -> list[int]:
    known_array = None if known is None else np.array(known)
    return metrics.gold_ranks(metrics.comparable(scores), np.array(gold), known_array).tolist()


def test_rank_counts_the_wrong_answers_above() -> None:
    assert ranks([0.1, 0.9, 0.5, 0.7], [2]) == [3]
    assert ranks([0.1, 0.9, 0.5, 0.7], [1]) == [1]


def test_ties_count_against_the_model() -> None:
    assert ranks([0.5] * 100, [0]) == [100]
    assert ranks([0.5, 0.5 - 1e-8, 0.4], [0]) == [2], "a difference in the last bits is a tie"
    assert ranks([0.5, 0.5 - 1e-5, 0.4], [0]) == [1], "a real difference is none"


def test_other_golds_and_known_positives_are_passed_over() -> None:
    assert ranks([0.9, 0.8, 0.7, 0.6], [0, 2, 3]) == [1, 2, 2]
    assert ranks([0.9, 0.8, 0.7, 0.6], [2], known=[0]) == [2]


def test_items_left_out_of_the_search_are_no_wrong_answers() -> None:
    assert ranks([-math.inf, 0.2, -math.inf], [1]) == [1]


def test_a_gold_whose_score_is_no_number_comes_last() -> None:
    assert ranks([0.2, math.nan, -0.5], [1]) == [3]


def test_hit_recall_and_reciprocal_rank() -> None:
    found = np.array([2, 7])
    assert [metrics.hit_at(found, k) for k in (1, 2, 10)] == [0.0, 1.0, 1.0]
    assert [metrics.recall_at(found, k) for k in (1, 2, 10)] == [0.0, 0.5, 1.0]
    assert metrics.reciprocal_rank(found) == 0.5


def test_ndcg_of_one_gold_is_the_discount_of_its_rank() -> None:
    for rank in (1, 2, 3, 10):
        assert metrics.ndcg_at(np.array([rank]), [0.0], [1.0], 10) == pytest.approx(1 / math.log2(1 + rank))
    assert metrics.ndcg_at(np.array([11]), [0.0], [1.0], 10) == 0.0


def test_ndcg_is_graded_and_ordered() -> None:
    both_first = np.array([1, 1])
    assert metrics.ndcg_at(both_first, [0.9, 0.8], [1.0, 0.5], 10) == pytest.approx(1.0)
    swapped = (0.5 + 1.0 / math.log2(3)) / (1.0 + 0.5 / math.log2(3))
    assert metrics.ndcg_at(both_first, [0.8, 0.9], [1.0, 0.5], 10) == pytest.approx(swapped)
    assert metrics.ndcg_at(both_first, [0.9, 0.9], [1.0, 0.5], 10) == pytest.approx(swapped), "a tie takes the worse"


def test_ndcg_ideal_is_cut_at_k() -> None:
    assert metrics.ndcg_at(np.array([1, 1, 1]), [3.0, 2.0, 1.0], [1.0, 1.0, 1.0], 2) == pytest.approx(1.0)


def test_query_metrics_follow_their_names() -> None:
    names = metrics.metric_names((1, 5))
    values = metrics.query_metrics(np.array([3]), [0.1], [1.0], (1, 5))
    assert dict(zip(names, values, strict=True)) == pytest.approx(
        {"hit@1": 0, "hit@5": 1, "recall@1": 0, "recall@5": 1, "mrr": 1 / 3, "ndcg@5": 0.5}
    )


def test_random_scores_hit_at_chance() -> None:
    rng = np.random.default_rng(0)
    hits = [metrics.hit_at(metrics.gold_ranks(rng.random(20), np.array([3])), 1) for _ in range(4000)]
    assert np.mean(hits) == pytest.approx(1 / 20, abs=0.015)


def test_auc_by_counting_pairs() -> None:
    assert metrics.auc([0.9, 0.4], [0.5, 0.1]) == pytest.approx(3 / 4)
    assert metrics.auc([0.5], [0.5]) == 0.5
    assert metrics.auc([1.0], [0.0]) == 1.0
    assert metrics.auc([], [0.5]) is None
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 9, 60), rng.integers(0, 9, 40)
    counted = ((a[:, None] > b) + 0.5 * (a[:, None] == b)).mean()
    assert metrics.auc(a, b) == pytest.approx(counted)


def test_precision_and_recall() -> None:
    assert metrics.precision_recall([1, 1, 0, 0], [1, 0, 1, 1]) == (0.5, pytest.approx(1 / 3))
    assert metrics.precision_recall([0, 0], [0, 1]) == (None, 0.0)


def test_reliability_bins_and_their_error() -> None:
    bins = metrics.reliability_bins([0.05, 0.95, 1.0, 0.95], [False, True, True, False])
    assert [(one.low, one.count) for one in bins] == [(0.0, 1), (0.9, 3)]
    assert bins[1].share_true == pytest.approx(2 / 3)
    expected = (1 * 0.05 + 3 * abs((0.95 + 1.0 + 0.95) / 3 - 2 / 3)) / 4
    assert metrics.calibration_error(bins) == pytest.approx(expected)
    assert metrics.calibration_error([]) is None
