"""The paired bootstrap, and the aggregation of arms over test sets."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from unime_ray import metrics
from unime_ray.config import EvaluateConfig
from unime_ray.errors import EvaluationError
from unime_ray.evaluation.aggregate import differences, resample, stack_arms
from unime_ray.evaluation.tables import per_query_schema, with_metrics

KS = (1, 10)


def test_constant_values_have_no_spread() -> None:
    means = metrics.bootstrap_means(np.full((50, 2), 0.25), samples=30, seed=0)
    assert np.allclose(means, 0.25)


def test_interval_matches_the_normal_approximation() -> None:
    values = np.random.default_rng(0).random((2000, 1)) < 0.3
    low, high = metrics.interval(metrics.bootstrap_means(values, samples=2000, seed=1))
    half = 1.96 * np.sqrt(values.mean() * (1 - values.mean()) / 2000)
    assert low == pytest.approx(values.mean() - half, abs=0.003)
    assert high == pytest.approx(values.mean() + half, abs=0.003)


def test_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    covered = 0
    for trial in range(200):
        low, high = metrics.interval(metrics.bootstrap_means(rng.random((80, 1)) < 0.4, 300, seed=trial))
        covered += low <= 0.4 <= high
    assert 0.89 <= covered / 200 <= 0.99


def test_pairing_cancels_what_both_share() -> None:
    hardness = np.random.default_rng(2).random(500)
    found = metrics.paired_difference(hardness + 0.01, hardness, samples=200, seed=0)
    assert found.value == pytest.approx(0.01)
    assert found.low == pytest.approx(0.01) and found.high == pytest.approx(0.01)
    assert found.share_not_better == 0.0


def test_same_seed_same_samples_whatever_the_chunk() -> None:
    values = np.random.default_rng(3).random((40, 3))
    first = metrics.bootstrap_means(values, 25, seed=7)
    assert np.array_equal(first, metrics.bootstrap_means(values, 25, seed=7))
    assert not np.array_equal(first, metrics.bootstrap_means(values, 25, seed=8))
    assert np.allclose(first, metrics.bootstrap_means(values, 25, seed=7, chunk=4))


def per_query(ranks_by_set: dict[str, list[int]]) -> pa.Table:
    rows = []
    for dataset, ranks in ranks_by_set.items():
        for index, rank in enumerate(ranks):
            row = {"dataset": dataset, "split": "test", "query_id": index.to_bytes(16, "big"), "meta_task": None}
            row |= {"gold_ids": [b"g" * 16], "gold_relevances": [1.0], "gold_ranks": [rank], "gold_scores": [0.5]}
            rows.append(with_metrics(row | {"top_ids": [], "top_scores": []}, KS))
    return pa.Table.from_pylist(rows, per_query_schema(KS))


def test_means_are_unweighted_over_test_sets() -> None:
    stacked = stack_arms({"base": per_query({"small": [1, 1], "large": [2] * 8})}, KS)
    results = {label: means for label, _, means, _ in resample(stacked, EvaluateConfig(bootstrap_samples=10))}
    hit = stacked.metrics.index("hit@1")
    assert results["small"][0, hit] == 1.0 and results["large"][0, hit] == 0.0
    assert results["mean"][0, hit] == 0.5


def test_differences_are_signed_and_paired() -> None:
    tables = {"base": per_query({"a": [2, 2, 1, 1]}), "tuned": per_query({"a": [1, 2, 1, 1]})}
    stacked = stack_arms(tables, KS)
    rows = differences(stacked, [("base", "tuned", "base")], EvaluateConfig(bootstrap_samples=400))
    found = next(row for row in rows if row["dataset"] == "a" and row["metric"] == "hit@1")
    assert found["value"] == pytest.approx(0.25)
    assert found["low"] >= 0.0, "no query got worse, so no resampling can"


def test_without_samples_there_are_no_intervals() -> None:
    stacked = stack_arms({"base": per_query({"a": [1]}), "tuned": per_query({"a": [1]})}, KS)
    row = differences(stacked, [("base", "tuned", "base")], EvaluateConfig(bootstrap_samples=0))[0]
    assert (row["low"], row["high"]) == (None, None)


def test_arms_with_other_queries_are_refused() -> None:
    with pytest.raises(EvaluationError, match="evaluations/tuned answers other queries"):
        stack_arms({"base": per_query({"a": [1, 1]}), "tuned": per_query({"a": [1]})}, KS)
