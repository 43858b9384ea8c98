"""A run with one trained embedder and one reranker, as training leaves them: real weights of the tiny model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa

from unime_ray import schemas
from unime_ray.artifacts import Manifest, Run
from unime_ray.models.names import model_revision, resolve_model

LORA = {"rank": 4, "alpha": 8.0, "dora": False, "target_modules": ["q_proj", "v_proj"]}


def trained_run(root: Path, adapter: Path | None = None, reranker: str = "reordered") -> Run:
    """The run; `adapter` is copied beside the embedder's weights if given, `reranker` is the reranker's name."""
    run, model = Run(str(root)), resolve_model("tiny")
    for kind, name in (("embedder", "adapted"), ("reranker", reranker)):
        artifact = run.artifact(kind, name)
        shutil.copytree(model, artifact.child("model"))
        if adapter is not None and kind == "embedder":
            shutil.copytree(adapter, artifact.child("adapter"))
        artifact.finish(
            Manifest(
                table=kind,
                name=name,
                stage=f"train_{kind}",
                fingerprint="0",
                rows=120,
                config={"judge": "oracle", "loss": "judge_kl", "learning_rate": 1e-4, "lora": LORA},
                counts={"steps": 10, "final_loss": 0.5},
                model=model,
                revision=model_revision(model),
                git_commit="0123456789abcdef",
            )
        )
    _metrics(run)
    return run


def _metrics(run: Run) -> None:
    shared = {"dataset": "shapes", "split": "test", "meta_task": None, "metric": "hit@1", "queries": 50}
    rows = [
        shared | {"model": "base", "stage": "retrieve", "value": 0.25, "low": 0.2, "high": 0.3},
        shared | {"model": "adapted", "stage": "retrieve", "value": 0.5, "low": 0.4, "high": 0.6},
        shared | {"model": "adapted+reordered", "stage": "rerank", "value": 0.6, "low": 0.5, "high": 0.7},
        shared | {"model": "other", "stage": "retrieve", "value": 0.1, "low": 0.0, "high": 0.2},
    ]
    artifact = run.artifact("metrics")
    artifact.write(pa.Table.from_pylist(rows, schema=schemas.METRICS), schemas.METRICS)
    artifact.finish(Manifest(table="metrics", stage="evaluate", fingerprint="0", rows=len(rows)))
