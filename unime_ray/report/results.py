"""The results' part of the report: values per test set and arm, their intervals and paired differences."""

from __future__ import annotations

import json
from typing import Any

from unime_ray.artifacts import Run, read_text
from unime_ray.report.charts import interval_chart

MEAN = "mean"
PREFERRED = ("hit@1", "recall@5", "recall@10", "mrr", "ndcg@10")


def results_section(run: Run) -> dict[str, Any] | None:
    """Everything the results show, or None before evaluate has run."""
    metrics = run.artifact("metrics")
    manifest = metrics.manifest()
    if manifest is None:
        return None
    rows = metrics.read().to_pylist()
    arms = [_labelled(arm) for arm in json.loads(read_text(metrics.child("arms.json")) or "[]")]
    differences = json.loads(read_text(metrics.child("differences.json")) or "[]")
    names = _shown(rows)
    panels = [_panel(name, rows, arms, differences) for name in names]
    return {"manifest": manifest, "arms": arms, "panels": panels, "headline": _headline(panels, arms)}


def _shown(rows: list[dict[str, Any]]) -> list[str]:
    """The metrics worth a tab. recall@1 and hit@k repeat others when a query has one gold, so few are picked."""
    measured = list(dict.fromkeys(row["metric"] for row in rows))
    picked = [name for name in PREFERRED if name in measured]
    return picked + [name for name in measured if name.startswith("ndcg") and name not in picked]


def _labelled(arm: dict[str, Any]) -> dict[str, Any]:
    if arm["stage"] == "rerank":
        kind = "reranked"
    elif arm["name"] == "base":
        kind = "base"
    else:
        kind = "infonce" if arm["loss"] == "infonce" else "adapted"
    words = {"base": "before", "reranked": "reranked"}.get(kind, "after")
    notes = [f"loss {arm['loss']}"] if arm["loss"] and kind != "reranked" else []
    notes += [f"judge {arm['judge']}"] if arm["judge"] else []
    return arm | {"kind": kind, "when": words, "note": ", ".join(notes)}


def _panel(
    metric: str, rows: list[dict[str, Any]], arms: list[dict[str, Any]], differences: list[dict[str, Any]]
) -> dict[str, Any]:
    values = {(row["dataset"], row["split"], row["model"]): row for row in rows if row["metric"] == metric}
    sets = list(dict.fromkeys(key[:2] for key in values))
    highest = max((row["value"] for row in values.values()), default=0.0) or 1.0
    lines = [_line(key, values, arms, highest) for key in sorted(sets, key=lambda key: key[0] == MEAN)]
    mean_split = next((split for dataset, split in sets if dataset == MEAN), "")
    bars = [
        {"arm": arm} | _percent(values[MEAN, mean_split, arm["name"]])
        for arm in arms
        if (MEAN, mean_split, arm["name"]) in values
    ]
    return {
        "metric": metric,
        "lines": lines,
        "chart": interval_chart(bars) if bars else None,
        "differences": _differences(metric, differences, {arm["name"]: arm for arm in arms}),
    }


def _line(
    key: tuple[str, str], values: dict[tuple[str, str, str], dict[str, Any]], arms: list[dict[str, Any]], highest: float
) -> dict[str, Any]:
    found = [values.get((*key, arm["name"])) for arm in arms]
    best = max((row["value"] for row in found if row), default=None)
    cells = [
        None if row is None else _percent(row) | {"best": row["value"] == best, "width": 100 * row["value"] / highest}
        for row in found
    ]
    queries = next((row["queries"] for row in found if row), 0)
    return {"dataset": key[0], "split": key[1], "queries": queries, "cells": cells, "is_mean": key[0] == MEAN}


def _percent(row: dict[str, Any]) -> dict[str, Any]:
    scale = {name: None if row[name] is None else 100 * row[name] for name in ("value", "low", "high")}
    return scale


def _differences(
    metric: str, differences: list[dict[str, Any]], arms: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """One chart a kind of comparison, over the mean and each test set."""
    charts = []
    kinds = {"base": "against base", "infonce": "against InfoNCE", "not reranked": "reranked against not"}
    for kind, title in kinds.items():
        found = [row for row in differences if row["kind"] == kind and row["metric"] == metric]
        rows = [
            {"dataset": row["dataset"], "arm": arms[row["model"]], "against": row["against"]}
            | _percent(row)
            | {"is_clear": row["low"] is not None and (row["low"] > 0 or row["high"] < 0)}
            for row in sorted(found, key=lambda row: row["dataset"] != MEAN)
        ]
        if rows:
            charts.append({"title": title, "kind": kind} | interval_chart(rows, zero=True))
    return charts


def _headline(panels: list[dict[str, Any]], arms: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Before, best after, best reranked of the first metric's mean; what the page opens with."""
    chart = panels[0]["chart"] if panels else None
    if chart is None:
        return None
    best: dict[str, dict[str, Any]] = {}
    for row in chart["rows"]:
        when = row["arm"]["when"]
        if when not in best or row["value"] > best[when]["value"]:
            best[when] = row
    mean = next((line for line in panels[0]["lines"] if line["is_mean"]), panels[0]["lines"][0])
    sets = sum(not line["is_mean"] for line in panels[0]["lines"])
    order = [best[when] for when in ("before", "after", "reranked") if when in best]
    return {"metric": panels[0]["metric"], "steps": order, "queries": mean["queries"], "sets": sets}
