"""The evaluate stage: every arm's answers to the test queries, then one table of metrics with intervals.

Each arm has its own artifact, `evaluations/<arm>`, one row a query. It is keyed by the arm's checkpoint and by the
tables it reads, so a second run measures only what is new; `metrics` is drawn from all of them in a second or two.
"""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from unime_ray.artifacts import Artifact, Manifest, Run, StageResult, filesystem, run_stage, write_text
from unime_ray.config import RunConfig, nearest
from unime_ray.errors import ConfigError, EvaluationError
from unime_ray.evaluation.aggregate import comparisons, differences, metric_rows, stack_arms
from unime_ray.evaluation.arms import BASE, RETRIEVE, Arm, arms_of, base_revision
from unime_ray.evaluation.judge_truth import measure_judges, truth_inputs
from unime_ray.evaluation.protocol import Protocol, load_protocol
from unime_ray.evaluation.reranking import reranked_row, to_rerank
from unime_ray.evaluation.retrieval import search
from unime_ray.evaluation.tables import per_query_schema
from unime_ray.evaluation.worker import Load, Workers, load_model
from unime_ray.ids import show
from unime_ray.schemas import METRICS, REJECTS

CODE_VERSION = 1
TABLES = ("images", "items", "qrels", "pools", "eval_candidates")


def run_evaluate(run: Run, config: RunConfig, name: str | None = None, load: Load = load_model) -> Manifest:
    """Measure all arms (or the one called `name`, without the comparison) and write `metrics`.

    `load` is how an actor gets a model. Needs a Ray cluster.

    Raises:
        ArtifactError: an arm has not been trained yet.
        EvaluationError: there are no test queries, or too many without a positive in their pool.
    """
    names = [arm.name for arm in arms_of(run, config)]
    arms = [arm for arm in arms_of(run, config) if name in (None, arm.name)]
    if not arms:
        raise ConfigError(f"evaluate: no arm named {name!r}{nearest(str(name), names)}")
    for arm in arms:
        if arm.trained is not None:
            arm.trained.require()
    evaluation = Evaluation(run, config, load)
    try:
        manifests = [evaluation.measure(arm) for arm in arms]
    finally:
        evaluation.workers.close()
    return manifests[-1] if name is not None else summarise(run, config)


class Evaluation:
    """One evaluate stage at work: the protocol is read and the actors are started only when an arm needs them."""

    def __init__(self, run: Run, config: RunConfig, load: Load = load_model) -> None:
        self.run, self.config = run, config
        self.workers = Workers(run, config.embed.resources, load)

    @cached_property
    def protocol(self) -> Protocol:
        """The test sets. Reading them also writes `rejects/evaluate`."""
        found = load_protocol(self.run, self.config)
        rejects = self.run.artifact("rejects", "evaluate")
        run_stage(
            rejects,
            stage="evaluate",
            code_version=CODE_VERSION,
            config=_settings(self.config),
            inputs=_tables(self.run),
            build=lambda: _write_rejects(rejects, found),
        )
        return found

    def measure(self, arm: Arm) -> Manifest:
        """The arm's per-query table, made unless it is there."""
        inputs = _tables(self.run) + ([arm.trained] if arm.trained else [])
        extra = {"base": base_revision(self.config)} if arm.name == BASE else {}
        settings = _settings(self.config) | {
            "dtype": arm.checkpoint.dtype,
            "pixels": arm.checkpoint.pixels.model_dump(),
            "dimensions": arm.checkpoint.dimensions,
        }
        if arm.stage != RETRIEVE:
            inputs.append(_artifact(self.run, arm.embedder))
            settings["mode"] = self.config.evaluate.reranker
        return run_stage(
            _artifact(self.run, arm.name),
            stage="evaluate",
            code_version=CODE_VERSION,
            config=settings,
            inputs=inputs,
            extra_inputs=extra,
            build=lambda: self._retrieve(arm) if arm.stage == RETRIEVE else self._rerank(arm),
        )

    def _retrieve(self, arm: Arm) -> StageResult:
        ids = self.protocol.item_ids()
        vectors = _stored_vectors(self.run, self.config, ids) if arm.name == BASE else {}
        missing = [item for item in ids if item not in vectors]
        vectors |= self.workers.embed(arm.name, arm.checkpoint, missing)
        failed = self._failed(arm, vectors)
        settings = self.config.evaluate
        rows: list[dict[str, Any]] = []
        for test_set in self.protocol.sets:
            rows += search(test_set, vectors, settings.ks, settings.rerank_top_k)
        counts = {"queries": len(rows), "items": len(ids), "embedded": len(missing), "failed": failed}
        return self._finish(arm, pa.Table.from_pylist(rows, per_query_schema(settings.ks)), counts)

    def _failed(self, arm: Arm, vectors: dict[bytes, np.ndarray]) -> int:
        """How many items have no vector: they are searched, and never found."""
        bad = [item for item, vector in vectors.items() if not np.isfinite(vector).all()]
        if len(bad) > self.config.corpus.max_error_rate * len(vectors):
            raise EvaluationError(
                f"evaluations/{arm.name}: {len(bad)} of {len(vectors)} items cannot be embedded, more than "
                f"corpus.max_error_rate allows; the first is {show(bad[0])}"
            )
        return len(bad)

    def _rerank(self, arm: Arm) -> StageResult:
        settings = self.config.evaluate
        table = _artifact(self.run, arm.embedder).read()
        places, rows = to_rerank(table), table.to_pylist()
        groups = [(rows[place]["query_id"], rows[place]["top_ids"]) for place in places]
        orders = self.workers.rerank(arm.name, arm.checkpoint, settings.reranker, groups)
        for place, order in zip(places, orders, strict=True):
            rows[place] = reranked_row(rows[place], order, settings.ks)
        counts = {"queries": len(rows), "reranked": len(places)}
        return self._finish(arm, pa.Table.from_pylist(rows, per_query_schema(settings.ks)), counts)

    def _finish(self, arm: Arm, table: pa.Table, counts: dict[str, int]) -> StageResult:
        _artifact(self.run, arm.name).write(table, table.schema)
        trained = arm.trained.require().revision if arm.trained else base_revision(self.config)
        return StageResult(rows=table.num_rows, counts=counts, model=arm.checkpoint.model, revision=trained)


def summarise(run: Run, config: RunConfig) -> Manifest:
    """Write `metrics` with `per_query.parquet`, `differences.json`, `arms.json` and `judges.json` beside its data."""
    arms = arms_of(run, config)
    metrics, settings = run.artifact("metrics"), config.evaluate
    judged, truth = truth_inputs(run, config)
    return run_stage(
        metrics,
        stage="evaluate",
        code_version=CODE_VERSION,
        config=settings.model_dump(mode="json", exclude={"batch_tokens"}) | {"beta": config.select.beta},
        inputs=[_artifact(run, arm.name) for arm in arms] + judged,
        extra_inputs=truth,
        build=lambda: _summarise(run, config, arms, metrics),
    )


def _summarise(run: Run, config: RunConfig, arms: list[Arm], metrics: Artifact) -> StageResult:
    settings = config.evaluate
    stacked = stack_arms({arm.name: _artifact(run, arm.name).read() for arm in arms}, settings.ks)
    rows = metric_rows(stacked, arms, settings)
    metrics.write(pa.Table.from_pylist(rows, METRICS), METRICS)
    _write_parquet(metrics.child("per_query.parquet"), stacked.long_table(arms))
    write_text(
        metrics.child("differences.json"), json.dumps(differences(stacked, comparisons(arms), settings), indent=1)
    )
    write_text(metrics.child("arms.json"), json.dumps([arm.describe() for arm in arms], indent=1))
    judges = measure_judges(run, config)
    write_text(metrics.child("judges.json"), json.dumps(judges, indent=1))
    rejects = run.artifact("rejects", "evaluate").manifest()
    counts: dict[str, Any] = {"queries": stacked.num_queries, "test_sets": len(stacked.groups), "arms": len(arms)}
    counts["rejected_queries"] = rejects.rows if rejects else 0
    for judge, found in judges.items():
        counts |= {f"{judge}_auc": found["auc"], f"{judge}_hidden_auc": found["hidden_auc"]}
    return StageResult(rows=len(rows), counts=counts)


def _settings(config: RunConfig) -> dict[str, Any]:
    """What of the config decides an arm's per-query table."""
    kept = {"splits", "ks", "rerank_top_k", "max_queries", "seed"}
    limit = config.corpus.max_error_rate
    return config.evaluate.model_dump(mode="json", include=kept) | {"max_error_rate": limit}


def _tables(run: Run) -> list[Artifact]:
    found = [run.artifact(table) for table in TABLES]
    return [one for one in found if one.table != "eval_candidates" or one.manifest() is not None]


def _artifact(run: Run, arm: str) -> Artifact:
    return run.artifact("evaluations", arm)


def _stored_vectors(run: Run, config: RunConfig, ids: list[bytes]) -> dict[bytes, Any]:
    """Vectors that the embed stage has already made with the base model; float16 ones would not compare fairly."""
    stored = run.artifact("embeddings", BASE)
    manifest = stored.manifest()
    if manifest is None or config.embed.half or manifest.revision != base_revision(config):
        return {}
    fs, path = filesystem(stored.data_uri)
    wanted = pc.field("item_id").isin(pa.array(ids, pa.binary(16)))
    table = pads.dataset(path, filesystem=fs, format="parquet").to_table(filter=wanted)
    column = table["embedding"].combine_chunks()
    vectors_ND = column.flatten().to_numpy().reshape(-1, column.type.list_size)
    return dict(zip(table["item_id"].to_pylist(), vectors_ND, strict=True))


def _write_rejects(rejects: Artifact, found: Protocol) -> StageResult:
    rejects.write(pa.Table.from_pylist(found.rejects, REJECTS), REJECTS)
    return StageResult(rows=len(found.rejects))


def _write_parquet(uri: str, table: pa.Table) -> None:
    import pyarrow.parquet as pq

    fs, path = filesystem(uri)
    pq.write_table(table, path, filesystem=fs)
