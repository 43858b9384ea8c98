"""Judge scores as probabilities: Platt's sigmoid or an isotonic map, fitted on labelled pairs. Pure numpy.

Both maps are monotone, so they change no ranking and no AUC; what they change is what a difference of scores means,
and with it the false-negative margin beta and the softness of training targets.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
EDGE = 1e-7
"""Scores are kept this far from 0 and 1 before their logit is taken: float32 knows no finer ones near 1."""
NEWTON_STEPS = 100


@dataclass(frozen=True)
class Calibration:
    """A monotone map from scores in [0, 1] to probabilities.

    platt: sigmoid(slope * logit(score) + intercept). isotonic: linear between the points, flat outside.
    """

    method: str
    slope: float = 1.0
    intercept: float = 0.0
    scores: list[float] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    pairs: int = 0
    positives: int = 0
    use: str = "both"
    """`both`, `selection` or `targets`: where the probabilities stand for the scores."""

    def apply(self, scores: ArrayLike) -> Floats:
        """Probabilities of `scores`, any shape; NaN stays NaN."""
        values = np.asarray(scores, dtype=np.float64)
        if self.method == "platt":
            return _sigmoid(self.slope * _logit(values) + self.intercept)
        found: Floats = np.interp(values, self.scores, self.probabilities)
        return found

    def one(self, score: float | None) -> float | None:
        """The probability of one score; None stays None."""
        return None if score is None else float(self.apply(score))

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        return cls(**json.loads(text))


def fit_calibration(method: str, scores: ArrayLike, relevant: ArrayLike, use: str = "both") -> Calibration:
    """The map of that method that makes the labelled pairs most likely.

    Args:
        scores: (N,) in [0, 1]; NaN is left out. relevant: (N,) booleans.

    Raises:
        ValueError: not both relevant and irrelevant pairs, or scores that fall where relevance rises.
    """
    values, labels = np.asarray(scores, dtype=np.float64), np.asarray(relevant, dtype=bool)
    values, labels = values[~np.isnan(values)], labels[~np.isnan(values)]
    count, positives = len(labels), int(labels.sum())
    if not 0 < positives < count:
        raise ValueError(f"{positives} of {count} labelled pairs are relevant; both kinds are needed")
    if method == "isotonic":
        xs, ys = _isotonic(values, labels)
        return Calibration(method, 1.0, 0.0, xs.tolist(), ys.tolist(), count, positives, use)
    slope, intercept = _platt(_logit(values), labels)
    if slope <= 0:
        raise ValueError(f"scores fall where relevance rises (slope {slope:.3g}): this judge cannot be calibrated")
    return Calibration(method, slope, intercept, [], [], count, positives, use)


def _platt(logits: Floats, labels: NDArray[np.bool_]) -> tuple[float, float]:
    """Slope and intercept by Newton's method on Platt's smoothed targets, which keep separable pairs finite."""
    positives = int(labels.sum())
    negatives = len(labels) - positives
    targets = np.where(labels, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    design = np.stack([logits, np.ones_like(logits)], axis=1)
    weights = np.array([0.0, np.log((positives + 1) / (negatives + 1))])
    loss = _cross_entropy(design @ weights, targets)
    for _ in range(NEWTON_STEPS):
        probabilities = _sigmoid(design @ weights)
        gradient = design.T @ (probabilities - targets)
        curvature = (design * (probabilities * (1 - probabilities))[:, None]).T @ design + 1e-9 * np.eye(2)
        step, size = np.linalg.solve(curvature, gradient), 1.0
        while size > 1e-6 and (new := _cross_entropy(design @ (weights - size * step), targets)) > loss:
            size /= 2
        if size <= 1e-6 or loss - new < 1e-12 * max(1.0, abs(loss)):
            break
        weights, loss = weights - size * step, new
    return float(weights[0]), float(weights[1])


def _isotonic(scores: Floats, labels: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Pool adjacent violators: the rising step function nearest to the labels, as the points of its blocks."""
    values, place = np.unique(scores, return_inverse=True)
    counts = np.bincount(place).astype(np.float64)
    sums = np.bincount(place, weights=labels.astype(np.float64))
    blocks: list[list[float]] = []  # count, sum of labels, sum of scores
    for value, count, total in zip(values, counts, sums, strict=True):
        blocks.append([count, total, count * value])
        while len(blocks) > 1 and blocks[-2][1] * blocks[-1][0] >= blocks[-1][1] * blocks[-2][0]:
            last = blocks.pop()
            blocks[-1] = [one + other for one, other in zip(blocks[-1], last, strict=True)]
    table = np.asarray(blocks)
    return table[:, 2] / table[:, 0], table[:, 1] / table[:, 0]


def _cross_entropy(logits: Floats, targets: Floats) -> float:
    return float((np.logaddexp(0.0, logits) - targets * logits).sum())


def _logit(scores: Floats) -> Floats:
    clipped = np.clip(scores, EDGE, 1 - EDGE)
    found: Floats = np.log(clipped / (1 - clipped))
    return found


def _sigmoid(values: Floats) -> Floats:
    found: Floats = np.exp(-np.logaddexp(0.0, -values))
    return found
