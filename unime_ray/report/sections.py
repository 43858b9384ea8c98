"""The plain parts of the report: what went in, what each stage did, loss curves, and where it all came from."""

from __future__ import annotations

import json
import platform
import re
from collections import Counter
from importlib import metadata
from typing import Any

import pyarrow as pa
import yaml

from unime_ray.artifacts import Manifest, Run, read_text
from unime_ray.config import RunConfig
from unime_ray.corpus.demo_rows import ADAPTATION_ARTIST, PRETRAINING_ARTISTS, UNSEEN_ARTIST
from unime_ray.models.names import PACKAGED
from unime_ray.report.charts import line_chart

FLOW = (
    *("images", "items", "qrels", "pools", "eval_candidates", "embeddings"),
    *("duplicates", "candidates", "judgements"),
    *("hard_negatives", "embedder", "reranker", "evaluations", "metrics", "rejects"),
)
LIBRARIES = ("ray", "torch", "transformers", "peft", "pyarrow", "numpy")
REASONS_SHOWN = 10
KEYS = re.compile(r"([A-Za-z][\w+.-]*://)[^/\s@]+@")
SIDE = re.compile(r"(query|positive|negative|candidate|item)(?: \d+)?")
"""How a reject's reason names the side of a row that it is about."""


def manifests(run: Run) -> dict[str, Manifest]:
    """Manifests by artifact key in the order of the flow, the report's own left out."""
    found = {one.key: one.require() for one in run.artifacts() if one.table != "report"}
    return dict(sorted(found.items(), key=lambda entry: (_flow_place(entry[1].table), entry[0])))


def _flow_place(table: str) -> int:
    return FLOW.index(table) if table in FLOW else len(FLOW)


def corpus_section(run: Run, config: RunConfig, found: dict[str, Manifest]) -> dict[str, Any] | None:
    """Counts of what went in, per dataset and split, what the models had seen before, and what was rejected."""
    if "items" not in found or "qrels" not in found:
        return None
    tables = {key: found[key].rows for key in ("images", "items", "qrels", "pools") if key in found}
    shown = {"tables": tables, "datasets": _datasets(run, found), "rejects": _rejects(run, found)}
    return shown | {"seen_before": seen_before(config)}


def seen_before(config: RunConfig) -> str:
    """What the packaged models among a run's were pretrained on, "" if there are none: the headroom of the demo.

    What any other checkpoint has seen is not known here.
    """
    named = [config.embed.model, *(judge.model for judge in config.judges.values() if judge.engine != "oracle")]
    packaged = sorted({model for model in named if model in PACKAGED})
    if not packaged:
        return ""
    return (
        f"{' and '.join(packaged)} had seen emoji of the train fold drawn by {', '.join(PRETRAINING_ARTISTS)}; no "
        f"picture by {ADAPTATION_ARTIST} (the demo adapts to it) or by {UNSEEN_ARTIST} (the demo's artist test), and "
        "no held-out emoji's picture or name."
    )


def _datasets(run: Run, found: dict[str, Manifest]) -> list[dict[str, Any]]:
    qrels = run.artifact("qrels").read(["dataset", "split", "query_id"])
    pairs = Counter(zip(qrels["dataset"].to_pylist(), qrels["split"].to_pylist(), strict=True))
    unique = qrels.group_by(["dataset", "split"]).aggregate([("query_id", "count_distinct")])
    queries = _keyed(unique, "query_id_count_distinct")
    pools: dict[tuple[str, str], int] = {}
    if "pools" in found:
        grouped = run.artifact("pools").read(["dataset", "split"]).group_by(["dataset", "split"])
        pools = _keyed(grouped.aggregate([([], "count_all")]), "count_all")
    keys = sorted(set(pairs) | set(pools), key=lambda key: (key[1] != "train", key))
    shared = [{"dataset": key[0], "split": key[1]} for key in keys]
    counts = [{"queries": queries.get(key, 0), "pairs": pairs.get(key, 0), "pool": pools.get(key, 0)} for key in keys]
    return [one | two for one, two in zip(shared, counts, strict=True)]


def _keyed(table: pa.Table, column: str) -> dict[tuple[str, str], int]:
    keys = zip(table["dataset"].to_pylist(), table["split"].to_pylist(), strict=True)
    return dict(zip(keys, table[column].to_pylist(), strict=True))


def _rejects(run: Run, found: dict[str, Manifest]) -> list[dict[str, Any]]:
    """Rejected rows by stage, with the most frequent reasons and the first rows."""
    sections = []
    for manifest in found.values():
        if manifest.table == "rejects" and manifest.rows:
            rows = run.artifact("rejects", manifest.name).read().to_pylist()
            reasons = Counter(_reason_kind(row["reason"]) for row in rows).most_common(REASONS_SHOWN)
            sections.append({"stage": manifest.name or "", "rows": len(rows), "reasons": reasons, "first": rows[:10]})
    return sections


def _reason_kind(reason: str) -> str:
    """The reason without what is peculiar to one row: its part before the colon.

    `positive: picture not found: x.png` names the side of the row first; what happened to it comes before the second
    colon then.
    """
    head, _, rest = reason.partition(":")
    side = SIDE.fullmatch(head.strip())
    if side is None or not rest.strip():
        return head.strip()
    return f"{side[1]}: {rest.split(':')[0].strip()}"


def stage_rows(found: dict[str, Manifest]) -> list[dict[str, Any]]:
    """One row an artifact with its share of the time."""
    total = max((manifest.seconds for manifest in found.values()), default=0.0) or 1.0
    width = {key: round(100 * manifest.seconds / total, 2) for key, manifest in found.items()}
    return [
        {"key": key, "manifest": manifest, "width": width[key], "counts": _flat(manifest.counts)}
        for key, manifest in found.items()
        if manifest.table != "rejects"
    ]


def _flat(counts: dict[str, Any]) -> list[tuple[str, Any]]:
    """The plain counts of a manifest; what is nested has a table of its own."""
    return [
        (name, value) for name, value in counts.items() if value is not None and not isinstance(value, (dict, list))
    ]


def training_curves(run: Run, found: dict[str, Manifest]) -> list[dict[str, Any]]:
    """A loss curve for every trained model that left a log."""
    curves = []
    for key, manifest in found.items():
        if manifest.table not in ("embedder", "reranker"):
            continue
        lines = _log(run, manifest)
        if len(lines) > 1:
            chart = line_chart([line["step"] for line in lines], [line["loss"] for line in lines])
            rates = [line["queries_per_second"] for line in lines if line.get("queries_per_second")]
            rate = sum(rates) / len(rates) if rates else None
            ends = {"first": lines[0]["loss"], "last": lines[-1]["loss"], "steps": lines[-1]["step"]}
            curves.append({"key": key, "manifest": manifest, "chart": chart, "rate": rate} | ends)
    return curves


def _log(run: Run, manifest: Manifest) -> list[dict[str, Any]]:
    text = read_text(run.artifact(manifest.table, manifest.name).child("log.jsonl")) or ""
    lines = [json.loads(line) for line in text.splitlines() if line.strip()]
    # A resumed training may log a step again: the later line counts.
    by_step = {line["step"]: line for line in lines if line.get("loss") is not None and line.get("step") is not None}
    return [by_step[step] for step in sorted(by_step)]


def provenance(config: RunConfig, found: dict[str, Manifest]) -> dict[str, Any]:
    """Models, seeds, versions and the whole config."""
    models = [
        {"key": key, "model": without_keys(one.model), "revision": one.revision, "prompt": one.prompt_hash}
        for key, one in found.items()
        if one.model
    ]
    versions = {name: metadata.version(name) for name in LIBRARIES if _installed(name)}
    seeds = {"select": config.select.seed, "evaluate": config.evaluate.seed}
    seeds |= {name: section.seed for name, section in {**config.embedders, **config.rerankers}.items()}
    return {
        "models": models,
        "versions": {"python": platform.python_version()} | versions,
        "seeds": seeds,
        "commits": sorted({one.git_commit for one in found.values() if one.git_commit}),
        "config": without_keys(
            yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)
        ),
    }


def without_keys(text: str) -> str:
    """`text` without the keys that addresses such as s3://KEY:SECRET@bucket carry: a report is made to be shown."""
    return KEYS.sub(r"\1***@", text)


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
