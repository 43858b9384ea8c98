"""Geometry of the report's charts as plain data; templates/charts.html.j2 draws it.

A plot area is an SVG of 100 x 100 units that stretches to its box; labels are HTML beside it, so that text keeps its
size on a narrow screen. x runs to the right, y downwards, both in [0, 100].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """A linear axis from `low` to `high` with labelled ticks: (place in [0, 100], text)."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]

    def place(self, value: float) -> float:
        """Where `value` lies, in [0, 100]; values outside are moved to the edge."""
        share = (value - self.low) / (self.high - self.low)
        return round(100.0 * min(max(share, 0.0), 1.0), 3)


def axis(low: float, high: float, wanted: int = 4, fit: bool = True) -> Axis:
    """An axis over [low, high] with about `wanted` round steps; `fit` widens it to whole steps."""
    if not high > low:
        low, high = low - 0.5, high + 0.5
    step = round_step((high - low) / wanted)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if fit:
        low, high = first * step, last * step
    marks = [index * step for index in range(first, last + 1) if low - 1e-9 <= index * step <= high + 1e-9]
    ticks = tuple((round(100.0 * (mark - low) / (high - low), 3), tick_label(mark, step)) for mark in marks)
    return Axis(low, high, ticks)


def round_step(rough: float) -> float:
    """The smallest of 1, 2, 2.5, 5 x 10^n that is at least `rough`."""
    scale = 10.0 ** math.floor(math.log10(rough))
    return next(size * scale for size in (1.0, 2.0, 2.5, 5.0, 10.0) if size * scale >= rough * (1 - 1e-9))


def tick_label(value: float, step: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    # 0.25 needs one digit more than its power of ten says
    digits += round(step * 10**digits, 6) % 1 > 0
    return f"{value + 0.0:.{digits}f}".replace("-", "−")


def path(points: Points) -> str:
    """An SVG path through the points."""
    return "M" + "L".join(f"{x:.2f},{y:.2f}" for x, y in points) if points else ""


def smooth(values: Sequence[float], span: int) -> list[float]:
    """Centred running mean over `span` values, shorter at the ends."""
    array, half = np.asarray(values, dtype=np.float64), span // 2
    total = np.concatenate([[0.0], np.cumsum(array)])
    starts = np.maximum(np.arange(len(array)) - half, 0)
    ends = np.minimum(np.arange(len(array)) + half + 1, len(array))
    return ((total[ends] - total[starts]) / (ends - starts)).tolist()


def line_chart(xs: Sequence[float], ys: Sequence[float], max_points: int = 400) -> dict[str, Any]:
    """One curve: every value thin, a running mean over a tenth of it bold."""
    keep = np.unique(np.linspace(0, len(xs) - 1, min(len(xs), max_points)).astype(int))
    mean = smooth(ys, max(3, len(ys) // 10))
    x_axis = axis(min(xs), max(xs), fit=False)
    # A spike at the start must not flatten the rest: the axis shows all but the highest hundredth.
    y_axis = axis(min(ys), max(float(np.quantile(ys, 0.99)), max(mean)))
    raw = [(x_axis.place(xs[i]), 100 - y_axis.place(ys[i])) for i in keep]
    bold = [(x_axis.place(xs[i]), 100 - y_axis.place(mean[i])) for i in keep]
    return {"x": x_axis, "y": y_axis, "raw": path(raw), "mean": path(bold), "last": bold[-1] if bold else (0, 0)}


def histogram(counts: Sequence[int]) -> dict[str, Any]:
    """Bars over [0, 1] in equal bins; heights are shares of the total, the tallest bar fills the box."""
    total, peak = sum(counts), max(counts, default=0)
    width = 100.0 / len(counts)
    bars = [
        {"x": round(index * width, 3), "width": round(width * 0.86, 3), "height": round(100.0 * count / peak, 2)}
        for index, count in enumerate(counts)
        if count
    ]
    return {"bars": bars, "total": total, "peak": peak / total if total else 0.0}


def score_counts(scores: Sequence[float], num_bins: int = 40) -> list[int]:
    """Counts of scores in `num_bins` equal bins of [0, 1]; 1.0 falls into the last."""
    values = np.asarray(scores, dtype=np.float64)
    return np.histogram(values[~np.isnan(values)], bins=num_bins, range=(0.0, 1.0))[0].tolist()


def interval_chart(rows: Sequence[dict[str, Any]], zero: bool = False) -> dict[str, Any]:
    """Dots with intervals on one axis. Rows need `value`, `low`, `high`; they come back with places.

    `zero`: the axis includes 0 (for differences it is the line that matters; for values it keeps lengths honest).
    """
    lows = [row["low"] if row["low"] is not None else row["value"] for row in rows]
    highs = [row["high"] if row["high"] is not None else row["value"] for row in rows]
    found = axis(min(lows + [0.0] * zero), max(highs + [0.0] * zero), wanted=5)
    placed = [
        dict(row) | {"at": found.place(row["value"]), "from": found.place(low), "to": found.place(high)}
        for row, low, high in zip(rows, lows, highs, strict=True)
    ]
    return {"axis": found, "rows": placed, "zero": found.place(0.0) if found.low <= 0.0 <= found.high else None}
