"""Why each mined candidate was kept or dropped, from the stored tables and the rule of select."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from unime_ray.artifacts import Artifact, Run, filesystem, read_text
from unime_ray.calibration import Calibration
from unime_ray.config import SelectConfig
from unime_ray.selection import DELTA, FALSE_NEGATIVE, KEPT, POSITIVE, SPARE, UNSCORED, query_rng, select_negatives


@dataclass(frozen=True)
class Candidate:
    """One candidate of a query with the judge's score and what became of it."""

    item_id: bytes
    rank: int
    similarity: float
    score: float | None
    fate: str
    reason: str


@dataclass(frozen=True)
class Mined:
    """A query, one of its positives, and all its candidates in order of similarity."""

    query_id: bytes
    positive_id: bytes
    positive_score: float | None
    positive_similarity: float
    candidates: list[Candidate]

    def of(self, fate: str) -> list[Candidate]:
        return [one for one in self.candidates if one.fate == fate]


def rows_of(artifact: Artifact, query_ids: Sequence[bytes], columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of these queries only, whatever the size of the table."""
    fs, path = filesystem(artifact.data_uri)
    wanted = pc.field("query_id").isin(pa.array(list(query_ids), pa.binary(16)))
    dataset = pads.dataset(path, filesystem=fs, format="parquet")
    return dataset.to_table(filter=wanted, columns=list(columns) if columns else None)


def load_mined(run: Run, judge: str, query_ids: Sequence[bytes], config: SelectConfig) -> dict[bytes, Mined]:
    """What became of the candidates of `query_ids` under one judge. A query's first positive stands for it."""
    candidates = {row["query_id"]: row for row in rows_of(run.artifact("candidates", "base"), query_ids).to_pylist()}
    scores: dict[tuple[bytes, bytes], float | None] = {}
    for row in rows_of(run.artifact("judgements", judge), query_ids).to_pylist():
        scores[row["query_id"], row["candidate_id"]] = row["score"]
    text = read_text(run.artifact("hard_negatives", judge).child("calibration.json"))
    if text is not None and (calibration := Calibration.from_json(text)).use != "targets":
        scores = {pair: calibration.one(score) for pair, score in scores.items()}  # as the rule saw them
    kept: dict[bytes, dict[str, Any]] = {}
    negatives = run.artifact("hard_negatives", judge)
    if negatives.manifest() is not None:
        for row in rows_of(negatives, query_ids).to_pylist():
            kept.setdefault(row["query_id"], row)
    return {query: _mined(row, scores, kept.get(query), config) for query, row in candidates.items()}


def _mined(
    row: dict[str, Any],
    scores: dict[tuple[bytes, bytes], float | None],
    kept: dict[str, Any] | None,
    config: SelectConfig,
) -> Mined:
    query, items, similarities = row["query_id"], row["candidate_ids"], row["similarities"]
    positive = kept["positive_id"] if kept else row["positive_ids"][0]
    similarity = row["positive_similarities"][row["positive_ids"].index(positive)]
    positive_score = scores.get((query, positive))
    judged = [scores.get((query, item)) for item in items]
    fates = _fates(row, judged, positive_score, similarity, config)
    reasons = _first_reasons(kept) if kept else {}
    found = []
    for rank, (item, sim, score, fate) in enumerate(zip(items, similarities, judged, fates, strict=True), 1):
        # The stored table decides what was kept, the fallback's random ones included.
        if item in reasons:
            fate = KEPT
        reason = reasons.get(item) or why(fate, sim, score, positive_score, similarity, config)
        found.append(Candidate(item, rank, sim, score, fate, reason))
    return Mined(query, positive, positive_score, similarity, found)


def _first_reasons(kept: dict[str, Any]) -> dict[bytes, str]:
    reasons: dict[bytes, str] = {}
    for item, reason in zip(kept["negative_ids"], kept["negative_reasons"], strict=True):
        reasons.setdefault(item, reason)
    return reasons


def _fates(
    row: dict[str, Any],
    judged: list[float | None],
    positive_score: float | None,
    similarity: float,
    config: SelectConfig,
) -> Sequence[str]:
    if positive_score is None or not math.isfinite(positive_score):
        return [UNSCORED] * len(judged)
    rng, positives = query_rng(config.seed, row["query_id"]), set(row["positive_ids"])
    return select_negatives(
        row["candidate_ids"], row["similarities"], judged, positive_score, similarity, config, rng, positives
    ).fates


def why(
    fate: str,
    similarity: float,
    score: float | None,
    positive_score: float | None,
    positive_similarity: float,
    config: SelectConfig,
) -> str:
    """The rule behind a fate, with its numbers."""
    if fate == DELTA:
        limit = positive_similarity if config.delta == "positive" else float(config.delta)
        return f"similarity {similarity:.3f} ≥ δ {limit:.3f}"
    if fate == FALSE_NEGATIVE and score is not None and positive_score is not None:
        return f"{score:.3f} > {positive_score:.3f} − {config.beta:g}"
    words = {SPARE: "passed, others came first", UNSCORED: "not scored", POSITIVE: "a known positive"}
    return words.get(fate, fate)
