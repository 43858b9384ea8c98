"""The judges' part of the report: distributions of scores, and measures against a truth table."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from unime_ray.artifacts import Run, read_text
from unime_ray.config import RunConfig
from unime_ray.report.charts import axis, histogram, path, score_counts
from unime_ray.report.fates import load_mined
from unime_ray.selection import DELTA, FALSE_NEGATIVE, KEPT, SPARE

SAMPLED_QUERIES = 3000
GROUPS = (
    ("positive", "Declared positives"),
    (KEPT, "Kept as hard negatives"),
    (FALSE_NEGATIVE, "Dropped as false negatives"),
    (DELTA, "Dropped by similarity"),
    (SPARE, "Passed, not drawn"),
)


def judge_sections(run: Run, config: RunConfig) -> list[dict[str, Any]]:
    """One entry a judge that has judged."""
    truth = json.loads(read_text(run.artifact("metrics").child("judges.json")) or "{}")
    found = []
    for name in config.judges:
        manifest = run.artifact("judgements", name).manifest()
        if manifest is not None and run.artifact("candidates", "base").manifest() is not None:
            settings = config.judges[name]
            entry = {"name": name, "manifest": manifest, "settings": settings, "truth": _truth(truth.get(name))}
            found.append(entry | _distributions(run, name, config))
    return found


def sample_queries(run: Run, limit: int, seed: int = 0) -> list[bytes]:
    """At most `limit` mined queries: the same ones for every judge."""
    ids = sorted(run.artifact("candidates", "base").read(["query_id"])["query_id"].to_pylist())
    if len(ids) <= limit:
        return ids
    chosen = np.random.default_rng(seed).choice(len(ids), size=limit, replace=False)
    return [ids[index] for index in sorted(chosen)]


def _distributions(run: Run, judge: str, config: RunConfig) -> dict[str, Any]:
    queries = sample_queries(run, SAMPLED_QUERIES)
    mined = load_mined(run, judge, queries, config.select)
    scores: dict[str, list[float]] = {key: [] for key, _ in GROUPS}
    for one in mined.values():
        if one.positive_score is not None:
            scores["positive"].append(one.positive_score)
        for candidate in one.candidates:
            if candidate.score is not None and candidate.fate in scores:
                scores[candidate.fate].append(candidate.score)
    rows = [
        {
            "key": key.replace(" ", "-"),
            "label": label,
            "mean": float(np.mean(scores[key])),
            "chart": histogram(score_counts(scores[key])),
        }
        for key, label in GROUPS
        if scores[key]
    ]
    return {"distributions": rows, "sampled": len(mined), "axis": axis(0.0, 1.0)}


def _truth(found: dict[str, Any] | None) -> dict[str, Any] | None:
    if found is None:
        return None
    calibrated = found.get("calibrated")
    extra = {"points": _points(found["bins"]), "sweep_chart": _sweep(found), "calibrated": calibrated}
    return found | extra | {"calibrated_points": _points(calibrated["bins"]) if calibrated else []}


def _points(bins: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bins of a reliability diagram as dots: mean score to the right, share relevant up, area by count."""
    largest = max((one["count"] for one in bins), default=1)
    return [
        one
        | {"x": 100 * one["mean_score"], "y": 100 - 100 * one["share_true"]}
        | {"radius": 1.6 + 3.4 * float(np.sqrt(one["count"] / largest))}
        for one in bins
    ]


def _sweep(found: dict[str, Any]) -> dict[str, Any] | None:
    """Precision and recall of the false-negative filter over beta, and where the run's own beta stands."""
    rows = found.get("sweep")
    if not rows:
        return None
    x_axis, y_axis = axis(rows[0]["beta"], rows[-1]["beta"], wanted=6, fit=False), axis(0.0, 1.0, wanted=2)

    def line(name: str) -> str:
        known = [row for row in rows if row[name] is not None]
        return path([(x_axis.place(row["beta"]), 100 - y_axis.place(row[name])) for row in known])

    lines = {name: line(name) for name in ("precision", "recall")}
    return {"x": x_axis, "y": y_axis, "at": x_axis.place(found["beta"]), "beta": found["beta"]} | lines
