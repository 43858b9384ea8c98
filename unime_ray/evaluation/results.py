"""The table of results as people read it: before, after and reranked, per test set, with intervals."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from unime_ray.artifacts import Run, read_text
from unime_ray.errors import EvaluationError
from unime_ray.evaluation.aggregate import MEAN
from unime_ray.evaluation.arms import BASE, RERANK

SHOWN = ("hit@1", "recall@10", "mrr")
WIDEST = 10_000


def results_table(run: Run, metric: str | None = None) -> list[dict[str, Any]]:
    """One row a test set (means last): `dataset`, `split`, `queries`, `metric` and `arms`: name -> value, low, high.

    `metric` None takes the first of hit@1, recall@10 and mrr that was measured.

    Raises:
        ArtifactError: the run has no metrics yet.
    """
    rows = run.artifact("metrics").read().to_pylist()
    measured = list(dict.fromkeys(row["metric"] for row in rows))
    wanted = metric or next((name for name in SHOWN if name in measured), measured[0])
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        if row["metric"] == wanted:
            key = (row["dataset"], row["split"])
            shared = {name: row[name] for name in ("dataset", "split", "queries", "metric")}
            entry = found.setdefault(key, shared | {"arms": {}})
            entry["arms"][row["model"]] = {name: row[name] for name in ("value", "low", "high")}
    return sorted(found.values(), key=lambda row: row["dataset"] == MEAN)


def render_results(run: Run, console: Console) -> None:
    """Print hit@1 and recall@10 of every arm: before, after, reranked. Values and 95 % intervals in percent."""
    arms = json.loads(read_text(run.artifact("metrics").child("arms.json")) or "[]")
    measured = set(run.artifact("metrics").read(["metric"])["metric"].to_pylist())
    for metric in [name for name in SHOWN[:2] if name in measured]:
        for table in _tables(results_table(run, metric), arms, metric, console):
            console.print(table)
    console.print("95 % intervals: bootstrap over queries. Ties count against the model.", style="dim")


def markdown_results(run: Run, metric: str) -> str:
    """One metric of every arm as a Markdown table, in percent with 95 % intervals: what README shows.

    Raises:
        ArtifactError: the run has no metrics. EvaluationError: it has none of that name.
    """
    rows = results_table(run, metric)
    if not rows:
        raise EvaluationError(f"{run.root}: no metric {metric!r} was measured")
    arms = json.loads(read_text(run.artifact("metrics").child("arms.json")) or "[]")
    heads = [f"{_role(arm)}: {arm['name'].replace('+', ' + ')}" for arm in arms]
    lines = ["| " + " | ".join([f"{metric}, %", "queries", *heads]) + " |", "|---" * (len(arms) + 2) + "|"]
    for row in rows:
        cells = [_cell(row["arms"].get(arm["name"])).plain.replace("\n", " (") for arm in arms]
        cells = [cell + ")" if "(" in cell else cell for cell in cells]
        name = row["dataset"].replace("|", "\\|")
        lines.append("| " + " | ".join([name, str(row["queries"]), *cells]) + " |")
    return "\n".join(lines)


def _tables(rows: list[dict[str, Any]], arms: list[dict[str, Any]], metric: str, console: Console) -> list[Table]:
    """One table, or where the arms do not fit side by side several, each with the first arm to compare with."""
    first, others = arms[:1], arms[1:]
    tables, unbounded = [_table(rows, arms, metric)], console.options.update(width=WIDEST)
    for size in range(len(others), 0, -1):
        groups = [others[start : start + size] for start in range(0, len(others), size)]
        tables = [_table(rows, first + group, metric) for group in groups]
        if all(console.measure(table, options=unbounded).maximum <= console.width for table in tables):
            break
    return tables


def _table(rows: list[dict[str, Any]], arms: list[dict[str, Any]], metric: str) -> Table:
    table = Table(title=f"{metric}, %", title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("test set")
    table.add_column("queries", justify="right")
    for arm in arms:
        table.add_column(Text(f"{_role(arm)}\n{arm['name'].replace('+', ' + ')}"), justify="right")
    for row in rows:
        if row["dataset"] == MEAN:
            table.add_section()
        cells = [_cell(row["arms"].get(arm["name"])) for arm in arms]
        table.add_row(Text(row["dataset"]), str(row["queries"]), *cells, style="bold" if row["dataset"] == MEAN else "")
    return table


def _role(arm: dict[str, Any]) -> str:
    if arm["stage"] == RERANK:
        return "reranked"
    return "before" if arm["name"] == BASE else "after"


def _cell(found: dict[str, Any] | None) -> Text:
    if found is None:
        return Text("-")
    text = Text(f"{100 * found['value']:.1f}")
    if found["low"] is not None:
        text.append(f"\n{100 * found['low']:.1f}-{100 * found['high']:.1f}", style="dim")
    return text
