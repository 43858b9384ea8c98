"""Select: judged candidates become hard negatives by the published rule; one row per (query, positive).

A unit of work is a few files of judgements: judge writes each query's pairs into one file. Each file gives one file of
hard negatives of the same name, so that a second attempt replaces what the first wrote. Needs a Ray cluster.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from unime_ray.artifacts import Artifact, Manifest, Run, StageResult, filesystem, remove, run_stage, write_text
from unime_ray.calibration import Calibration
from unime_ray.config import JudgeConfig, RunConfig, SelectConfig
from unime_ray.errors import ArtifactError, ConfigError
from unime_ray.ids import show
from unime_ray.schemas import HARD_NEGATIVES, JUDGEMENTS, conform
from unime_ray.selection import Selection, query_rng, select_negatives
from unime_ray.stages.calibrate import FILE, fit_judge, labels_digest
from unime_ray.stages.candidates import CandidateRows
from unime_ray.stages.engine import blocks_of, map_tasks, parquet_files, stage_context

CODE_VERSION = 1
FILES_PER_TASK = 64
FALLBACK_WARNING = 0.01
"""Share of queries without a candidate above which the run says so (the paper has fewer than 1 %)."""

Scores = dict[tuple[bytes, bool], float | None]
"""By (candidate id, whether it is a positive)."""

log = logging.getLogger(__name__)


def run_select(run: Run, config: RunConfig, judge_name: str) -> Manifest:
    """Write `hard_negatives/<judge_name>`; the manifest counts how often each branch of the rule was taken.

    Raises:
        ConfigError: the config has no such judge.
        ArtifactError: judge has not run, or its table and `candidates` do not belong together.
    """
    if judge_name not in config.judges:
        raise ConfigError(f"judges: no judge {judge_name!r}; the config has {', '.join(config.judges)}")
    judge = config.judges[judge_name]
    judgements, candidates = run.artifact("judgements", judge_name), run.artifact("candidates", "base")
    artifact = run.artifact("hard_negatives", judge_name)
    calibrated = judge.calibration != "none"
    told = judge.model_dump(mode="json", include={"calibration", "calibrate"}) if calibrated else {}
    return run_stage(
        artifact,
        stage="select",
        code_version=CODE_VERSION,
        config=config.select.model_dump(mode="json") | told,
        inputs=[judgements, candidates],
        extra_inputs={"labels": labels_digest(judge)} if calibrated else None,
        build=lambda: _build(run, config.select, judge, artifact),
    )


def _build(run: Run, settings: SelectConfig, judge: JudgeConfig, artifact: Artifact) -> StageResult:
    remove(artifact.data_uri)
    judgements, candidates = run.artifact("judgements", artifact.name), run.artifact("candidates", "base")
    calibration = fit_judge(run, judge, judgements)
    if calibration is not None:
        write_text(artifact.child(FILE), calibration.to_json())
    paths, _ = parquet_files(judgements.data_uri)
    arguments = {
        "calibration": calibration,
        "settings": settings,
        "judgements": judgements,
        "candidates": CandidateRows(candidates.data_uri),
        "artifact": artifact,
    }
    blocks = blocks_of(pa.table({"path": paths}), FILES_PER_TASK)
    with stage_context():
        told = map_tasks(blocks, select_files, arguments).take_all()
    counts: Counter[str] = Counter()
    for row in told:
        counts.update(json.loads(row["counts"]))
    if not counts["rows"]:
        artifact.write(HARD_NEGATIVES.empty_table(), HARD_NEGATIVES)
    _warn(counts)
    if calibration is not None:
        counts["calibration_pairs"], counts["calibration_positives"] = calibration.pairs, calibration.positives
    return StageResult(rows=counts.pop("rows", 0), counts=dict(sorted(counts.items())))


def _warn(counts: Counter[str]) -> None:
    without = counts["queries_skipped"] + counts["queries_fallback"]
    total = without + counts["queries_full"] + counts["queries_filled"]
    if without > FALLBACK_WARNING * total:
        log.warning(
            "%d of %d queries (%.1f %%) have no candidate that is a hard negative: %d skipped, %d with random ones; "
            "see select.delta and select.beta, and whether the judge is good enough",
            without,
            total,
            100 * without / total,
            counts["queries_skipped"],
            counts["queries_fallback"],
        )


def select_files(
    batch: pa.Table,
    settings: SelectConfig,
    judgements: Artifact,
    candidates: CandidateRows,
    artifact: Artifact,
    calibration: Calibration | None = None,
) -> pa.Table:
    """Ray Data: (path of a file of judgements) -> (counts as JSON); the rows go into the artifact, file by file."""
    counts: Counter[str] = Counter()
    fs, _ = filesystem(judgements.data_uri)
    for path in batch.column("path").to_pylist():
        table = conform(pq.read_table(path, filesystem=fs), JUDGEMENTS, "judgements").sort_by("query_id")
        judged = {query: list(rows) for query, rows in groupby(table.to_pylist(), key=lambda row: row["query_id"])}
        lines: list[dict[str, Any]] = []
        for row in candidates.take(list(judged)).to_pylist():
            lines += select_query(row, judged[row["query_id"]], settings, counts, calibration)
        counts["rows"] += len(lines)
        if lines:
            name = path.rsplit("/", 1)[-1].removesuffix(".parquet")
            artifact.write(pa.Table.from_pylist(lines, HARD_NEGATIVES), HARD_NEGATIVES, part=name)
    return pa.table({"counts": [json.dumps(counts)]})


def select_query(
    candidates: dict[str, Any],
    judged: list[dict[str, Any]],
    settings: SelectConfig,
    counts: Counter[str],
    calibration: Calibration | None = None,
) -> list[dict[str, Any]]:
    """`hard_negatives` rows of one query, one per positive; adds to `counts`.

    Args:
        candidates: the query's row of `candidates`.
        judged: its rows of `judgements`.
        calibration: makes probabilities of scores, for the rule, for what is written, or for both.

    Raises:
        ArtifactError: a candidate or positive was not judged.
    """
    query = candidates["query_id"]
    raw = {(row["candidate_id"], row["is_positive"]): row["score"] for row in judged}
    scores, targets = _views(raw, calibration)
    wanted = [(item, False) for item in candidates["candidate_ids"]]
    wanted += [(item, True) for item in candidates["positive_ids"]]
    missing = [item for item in wanted if item not in scores]
    if missing or len(judged) != len(wanted):
        raise ArtifactError(
            f"query {show(query)}: {len(judged)} judgements for {len(wanted)} pairs; judgements and candidates do not "
            "belong together, run judge again"
        )
    lines = []
    for positive, similarity in zip(candidates["positive_ids"], candidates["positive_similarities"], strict=True):
        score = scores[(positive, True)]
        if score is None or math.isnan(score):
            counts["positives_unscored"] += 1
            continue
        chosen = select_negatives(
            candidates["candidate_ids"],
            candidates["similarities"],
            [scores[(item, False)] for item in candidates["candidate_ids"]],
            score,
            similarity,
            settings,
            query_rng(settings.seed, query + positive),
            positives=set(candidates["positive_ids"]),
        )
        counts.update(chosen.counts)
        if chosen.ids:
            lines.append(
                {
                    "query_id": query,
                    "positive_id": positive,
                    "positive_score": targets[(positive, True)],
                    "negative_ids": chosen.ids,
                    "negative_scores": _targets(chosen, targets),
                    "negative_similarities": chosen.similarities,
                    "negative_reasons": chosen.reasons,
                }
            )
    return lines


def _views(raw: Scores, calibration: Calibration | None) -> tuple[Scores, Scores]:
    """(scores the rule sees, scores that are written)."""
    if calibration is None:
        return raw, raw
    found = {pair: calibration.one(score) for pair, score in raw.items()}
    return raw if calibration.use == "targets" else found, raw if calibration.use == "selection" else found


def _targets(chosen: Selection, targets: Scores) -> list[float | None]:
    """What is written for each negative; the fallback's own score stays."""
    drawn = zip(chosen.ids, chosen.scores, chosen.reasons, strict=True)
    return [score if reason == "fallback" else targets[(item, False)] for item, score, reason in drawn]
