"""The model card of an export, filled from the manifests of the run: nothing in it is written by hand.

It says what the run knows: base model and its revision, data, judge, hyper-parameters, metrics with intervals. What it
does not know, the licence above all, it says it does not know.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

import yaml

from unime_ray.artifacts import Manifest

SHOWN_METRICS = ("hit@1", "recall@10", "mrr", "ndcg@10")
SETTINGS = (
    "loss",
    "num_negatives",
    "temperature",
    "judge_temperature",
    "steps",
    "batch_queries",
    "learning_rate",
    "schedule",
    "warmup_steps",
    "dtype",
    "seed",
)
USE = {
    "embedder": """\
```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(FOLDER)
queries = model.encode(["a text, with its instruction before it"])
candidates = model.encode([{"image": picture, "text": "the instruction for pictures"}])
scores = model.similarity(queries, candidates)
```

`vllm serve FOLDER --runner pooling` answers `/v1/embeddings` with the same vectors.""",
    "reranker": """\
```python
from sentence_transformers import CrossEncoder

model = CrossEncoder(FOLDER)
scores = model.predict([("a query", {"image": picture, "text": "the instruction for pictures"})])  # in [0, 1]
```""",
}


def model_card(
    kind: str,
    name: str,
    libraries: Iterable[str],
    manifest: Manifest,
    judged: Manifest | None,
    metrics: list[dict[str, Any]],
    config: Mapping[str, Any],
    licence: str = "",
) -> str:
    """The card as Markdown with YAML front matter.

    Args:
        manifest: of the trained model; judged: of the judgements it was trained on, if there are any.
        metrics: rows of the run's metrics table, of every model.
    """
    base = _shown(manifest.model)
    parts = [
        _front_matter(kind, libraries, manifest, licence),
        f"# {name}",
        f"{'An' if kind == 'embedder' else 'A'} {kind} trained with unime-ray (UniME-V2, arXiv 2510.13515) from "
        f"`{base}` (revision `{(manifest.revision or 'unknown')[:12]}`), a `{config.get('model_type', 'unknown')}`.",
        "## Use",
        USE[kind] if "sentence-transformers" in libraries else "`transformers` loads the folder as its base model.",
        "## Training",
        _table(_training(manifest, judged)),
        "## Metrics",
        _metrics(name, metrics),
        "## Licence",
        licence
        or "Not stated. The base model's licence and that of the training data decide; state it before sharing.",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(kind: str, libraries: Iterable[str], manifest: Manifest, licence: str) -> str:
    task = "feature-extraction" if kind == "embedder" else "text-ranking"
    fields: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": task}
    if "sentence-transformers" in libraries:
        fields["library_name"] = "sentence-transformers"
    if licence:
        fields["license"] = licence
    if manifest.model and manifest.model.count("/") == 1 and not manifest.model.startswith(("/", ".", "~")):
        fields["base_model"] = manifest.model
    fields["tags"] = ["multimodal-retrieval", kind, "unime-ray"]
    return "---\n" + yaml.safe_dump(fields, sort_keys=False).strip() + "\n---"


def _shown(model: str | None) -> str:
    """A hub id as it is; of a folder only its name, since a path is nobody else's business."""
    if not model:
        return "unknown"
    return PurePath(model).name if model.startswith(("/", ".", "~")) else model


def _training(manifest: Manifest, judged: Manifest | None) -> list[tuple[str, Any]]:
    config, counts = manifest.config, manifest.counts
    rows: list[tuple[str, Any]] = [("queries with negatives", manifest.rows)]
    if judged is not None:
        rows.append(("judge", f"`{_shown(judged.model) if judged.model else judged.name}`, {judged.rows} scores"))
    rows += [(key.replace("_", " "), config[key]) for key in SETTINGS if config.get(key) is not None]
    lora = config.get("lora")
    if lora:
        adapter = "DoRA" if lora.get("dora") else "LoRA"
        rows.append((adapter, f"rank {lora['rank']}, alpha {lora['alpha']:g}, on {', '.join(lora['target_modules'])}"))
    keys = ("trainable_parameters", "parameters", "workers", "training_seconds", "final_loss")
    rows += [(key.replace("_", " "), counts[key]) for key in keys if key in counts]
    if manifest.git_commit:
        rows.append(("commit of unime-ray", f"`{manifest.git_commit[:12]}`"))
    return rows


def _metrics(name: str, metrics: list[dict[str, Any]]) -> str:
    """This model's figures beside the base's; a reranker's are those of the arms it takes part in."""
    measured = [m for m in SHOWN_METRICS if any(row["metric"] == m for row in metrics)][:2]
    arms = dict.fromkeys(row["model"] for row in metrics if row["model"] == "base" or name in row["model"].split("+"))
    if not measured or set(arms) <= {"base"}:
        return "Not measured: the run has no metrics for it."
    header = ["test set", "split", "metric", "queries", *arms]
    lines = [_row(header), "|---" * len(header) + "|"]
    found = {(r["dataset"], r["split"], r["metric"], r["model"]): r for r in metrics}
    for dataset, split, metric in dict.fromkeys(key[:3] for key in found if key[2] in measured):
        rows = [found.get((dataset, split, metric, arm)) for arm in arms]
        queries = next((row["queries"] for row in rows if row), "")
        lines.append(_row([dataset, split, metric, queries, *map(_value, rows)]))
    return "Percent, with 95 % bootstrap intervals over queries. Ties count against the model.\n\n" + "\n".join(lines)


def _value(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    text = f"{100 * row['value']:.1f}"
    return text if row["low"] is None else f"{text} ({100 * row['low']:.1f}-{100 * row['high']:.1f})"


def _table(rows: list[tuple[str, Any]]) -> str:
    return "\n".join(["| | |", "|---|---|", *map(_row, rows)])


def _row(cells: Iterable[Any]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(_cell(str(cell)) for cell in cells) + " |"


def _cell(text: str) -> str:
    """`text` on one line, and as text: datasets and splits are called what a corpus calls them."""
    line = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
    return line.replace("<", "&lt;").replace("[", "\\[")
