"""Retrieval metrics, the paired bootstrap, and measures of a judge. Pure numpy; nothing here reads a file.

Protocol. A *gold* is a known positive of a query in the pool it is searched in. Its rank is one plus the number of
*wrong* answers that score at least as high: ties count against the model, and scores are compared at six decimals,
since two products with the same vector may differ in the last bit. Answers that are known positives of the query,
its other golds among them, are never wrong and are passed over.

Shapes: Q queries, N pool items, G golds of one query, M measured columns, B bootstrap samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

TIE_DECIMALS = 6
"""Scores that agree to this many decimals are tied."""


def comparable(scores: ArrayLike) -> Floats:
    """Scores as they are compared: float64, rounded so that equal vectors tie whatever order they were summed in."""
    values: Floats = np.asarray(scores, dtype=np.float64)
    return values.round(TIE_DECIMALS)


def gold_ranks(scores: Floats, gold: Ints, known: Ints | None = None) -> Ints:
    """Ranks, from 1, of the golds among the wrong answers of one query.

    Args:
        scores: (N,) of `comparable`; -inf leaves an item out of the search.
        gold: (G,) positions in `scores`.
        known: positions of all known positives (default: the golds); none of them is a wrong answer.

    Returns:
        (G,) ranks. A score that is no number counts as the lowest.
    """
    clean = np.where(np.isnan(scores), -np.inf, scores)
    wrong = clean.copy()
    wrong[gold if known is None else np.union1d(gold, known)] = np.nan  # compares false with everything
    wrong[np.isneginf(scores)] = np.nan
    return 1 + (wrong[None, :] >= clean[gold][:, None]).sum(axis=1)


def hit_at(ranks: Ints, k: int) -> float:
    """1.0 if any gold is among the first k answers, else 0.0. For k=1 this is MMEB's hit@1."""
    return float(ranks.size > 0 and ranks.min() <= k)


def recall_at(ranks: Ints, k: int) -> float:
    """Share of the golds whose own rank is at most k; with one gold the same as `hit_at`."""
    return float((ranks <= k).mean()) if ranks.size else 0.0


def reciprocal_rank(ranks: Ints) -> float:
    """1 / rank of the best gold."""
    return 1.0 / float(ranks.min()) if ranks.size else 0.0


def ndcg_at(ranks: Ints, gold_scores: ArrayLike, relevances: ArrayLike, k: int) -> float:
    """Normalised discounted cumulative gain with linear gain, as trec_eval and BEIR have it.

    A gold's place in the list is its rank plus the golds before it; golds with equal scores come with the least
    relevant first. `relevances` (G,) must be positive.
    """
    gains = np.asarray(relevances, dtype=np.float64)
    if not gains.size:
        return 0.0
    order = np.lexsort((gains, -np.asarray(gold_scores, dtype=np.float64)))
    places = ranks[order] + np.arange(len(order))
    found = np.where(places <= k, gains[order] / np.log2(1.0 + places), 0.0).sum()
    best = np.sort(gains)[::-1][:k]
    return float(found / (best / np.log2(2.0 + np.arange(len(best)))).sum())


def metric_names(ks: tuple[int, ...]) -> list[str]:
    """Names of the metrics of `query_metrics`, in its order."""
    return [f"hit@{k}" for k in ks] + [f"recall@{k}" for k in ks] + ["mrr", f"ndcg@{max(ks)}"]


def query_metrics(ranks: Ints, gold_scores: ArrayLike, relevances: ArrayLike, ks: tuple[int, ...]) -> list[float]:
    """All metrics of one query, each in [0, 1]."""
    hits = [hit_at(ranks, k) for k in ks]
    recalls = [recall_at(ranks, k) for k in ks]
    return [*hits, *recalls, reciprocal_rank(ranks), ndcg_at(ranks, gold_scores, relevances, max(ks))]


# --- bootstrap --------------------------------------------------------------------------------------------------------


def bootstrap_means(values_QM: ArrayLike, samples: int, seed: int, chunk: int = 100) -> Floats:
    """Means of `samples` resamplings of the queries, (B, M).

    All columns share each resampling, so the difference of two columns is the *paired* bootstrap of that difference.
    """
    values = np.asarray(values_QM, dtype=np.float64)
    num_queries = len(values)
    rng = np.random.default_rng(seed)
    means = np.empty((samples, values.shape[1]))
    for start in range(0, samples, chunk):
        size = min(chunk, samples - start)
        drawn = rng.integers(0, num_queries, size=(size, num_queries))
        rows = np.repeat(np.arange(size), num_queries) * num_queries
        counts = np.bincount(rows + drawn.ravel(), minlength=size * num_queries).reshape(size, num_queries)
        means[start : start + size] = counts @ values / num_queries
    return means


def interval(samples: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of bootstrap samples."""
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(np.asarray(samples, dtype=np.float64), [tail, 1.0 - tail])
    return float(low), float(high)


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean of `a - b` over queries, its 95 % interval, and the share of resamplings at or below zero."""

    value: float
    low: float | None
    high: float | None
    share_not_better: float | None


def paired_difference(a: ArrayLike, b: ArrayLike, samples: int, seed: int) -> Difference:
    """Paired bootstrap of mean(a) - mean(b); `a` and `b` (Q,) belong to the same queries in the same order."""
    delta = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    return difference(float(delta.mean()), bootstrap_means(delta[:, None], samples, seed)[:, 0])


def difference(value: float, resampled: Floats) -> Difference:
    """A difference from its value and its bootstrap samples (none: no interval)."""
    if not resampled.size:
        return Difference(value, None, None, None)
    return Difference(value, *interval(resampled), float((resampled <= 0).mean()))


# --- measures of a judge ----------------------------------------------------------------------------------------------


def auc(positive_scores: ArrayLike, negative_scores: ArrayLike) -> float | None:
    """Probability that a positive scores above a negative, ties counting half; None if either side is empty."""
    positive = np.asarray(positive_scores, dtype=np.float64)
    negative = np.sort(np.asarray(negative_scores, dtype=np.float64))
    if not positive.size or not negative.size:
        return None
    below = np.searchsorted(negative, positive, side="left")
    at_or_below = np.searchsorted(negative, positive, side="right")
    return float((below + at_or_below).mean() / 2.0 / len(negative))


def precision_recall(flagged: ArrayLike, true: ArrayLike) -> tuple[float | None, float | None]:
    """Precision and recall of a boolean decision; None where it divides by zero."""
    said, real = np.asarray(flagged, dtype=bool), np.asarray(true, dtype=bool)
    both = int((said & real).sum())
    return (both / int(said.sum()) if said.any() else None, both / int(real.sum()) if real.any() else None)


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Scores in [low, high): how many, their mean, and the share that is true. Calibrated: mean == share."""

    low: float
    high: float
    count: int
    mean_score: float
    share_true: float


def reliability_bins(scores: ArrayLike, true: ArrayLike, num_bins: int = 10) -> list[ReliabilityBin]:
    """Equal-width bins of [0, 1]; empty ones are left out. A score of 1.0 falls into the last."""
    values, labels = np.asarray(scores, dtype=np.float64), np.asarray(true, dtype=bool)
    place = np.clip((values * num_bins).astype(int), 0, num_bins - 1)
    bins = []
    for index in np.unique(place):
        inside = place == index
        mean, share = float(values[inside].mean()), float(labels[inside].mean())
        bins.append(ReliabilityBin(index / num_bins, (index + 1) / num_bins, int(inside.sum()), mean, share))
    return bins


def calibration_error(bins: list[ReliabilityBin]) -> float | None:
    """Expected calibration error: mean |mean score - share true|, weighted by the bins' counts."""
    total = sum(one.count for one in bins)
    return sum(one.count * abs(one.mean_score - one.share_true) for one in bins) / total if total else None
