"""The judges against a truth table: do their scores tell relevant from irrelevant, and is the filter right?

Truth is known for a pair when both items stand for a concept of the table. A pair is *relevant* when its relevance is
1 (the same concept); graded relatives, a variant or a synonym, count as irrelevant here, which is the harder question.
A *hidden positive* is a relevant candidate that the corpus does not declare: the false negative that mining must drop.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from unime_ray.artifacts import Artifact, Run, filesystem, read_text
from unime_ray.calibration import Calibration
from unime_ray.config import RunConfig
from unime_ray.corpus.truth import RELEVANT, TRUTH_FILES, Truth, concepts_of
from unime_ray.metrics import auc, calibration_error, precision_recall, reliability_bins

BETAS = tuple(round(-0.5 + 0.05 * step, 2) for step in range(29))
"""Margins that the filter is measured at, besides the run's own."""


def truth_inputs(run: Run, config: RunConfig) -> tuple[list[Artifact], dict[str, str]]:
    """The judgements to measure and the truth's content hash; nothing where the config names no truth."""
    folder = config.evaluate.truth
    if folder is None:
        return [], {}
    hasher = hashlib.blake2b(digest_size=12)
    for name in TRUTH_FILES:
        fs, path = filesystem(f"{folder}/{name}")
        with fs.open_input_stream(path) as stream:
            hasher.update(stream.read())
    judged = [run.artifact("judgements", judge) for judge in config.judges]
    found = [one for one in judged if one.manifest() is not None]
    extra = {"truth": hasher.hexdigest(), "beta": str(config.select.beta)}
    extra |= {f"calibration/{one.name}": str(_calibration(run, one)) for one in found}
    return found, extra


def measure_judges(run: Run, config: RunConfig) -> dict[str, dict[str, Any]]:
    """By judge: see `measure`. Empty without a truth table."""
    artifacts, _ = truth_inputs(run, config)
    if not artifacts or config.evaluate.truth is None:
        return {}
    truth = Truth.load(config.evaluate.truth)
    concepts = concepts_of(run, truth)
    found = {}
    for one in artifacts:
        found[str(one.name)] = measure(one.read(), concepts, truth, config.select.beta, _calibration(run, one))
    return found


def _calibration(run: Run, judged: Artifact) -> Calibration | None:
    """What select fitted for this judge, if it did."""
    text = read_text(run.artifact("hard_negatives", judged.name).child("calibration.json"))
    return None if text is None else Calibration.from_json(text)


def measure(
    table: pa.Table,
    concepts: dict[bytes, str],
    truth: Truth,
    beta: float,
    calibration: Calibration | None = None,
) -> dict[str, Any]:
    """Numbers of one judge over its `judgements` table.

    `auc` is over all pairs, declared positives included; `hidden_auc` over the mined candidates alone. `precision`
    and `recall` are those of the filter score > sigma(q, c+) - beta in finding hidden positives, `sweep` has them
    over beta; the false negative rates are the share of hidden positives among the candidates before and after it.
    With a calibration that select used, the filter sees calibrated scores, and `calibrated` has their reliability.
    """
    pairs = _known_pairs(table, concepts, truth)
    relevant, positive, score = pairs["relevant"], pairs["is_positive"], pairs["score"]
    hidden, mined = relevant & ~positive, ~positive
    found = {
        "pairs": len(score),
        "unknown_pairs": table.num_rows - len(score),
        "queries": pairs["queries"],
        "hidden_positives": int(hidden.sum()),
        "auc": auc(score[relevant], score[~relevant]),
        "hidden_auc": auc(score[hidden], score[mined & ~hidden]),
        "calibrated": None,
    }
    found |= _reliability(score, relevant)
    best = pairs["positive_score"]
    if calibration is not None:
        probability = calibration.apply(score)
        described = {"method": calibration.method, "use": calibration.use, "pairs": calibration.pairs}
        found["calibrated"] = described | _reliability(probability, relevant)
        if calibration.use != "targets":
            score, best = probability, calibration.apply(best)
    compared = mined & ~np.isnan(best)
    gap, wanted = (score - best)[compared], hidden[compared]
    found |= _filter(gap, wanted, beta) | {"beta": beta, "false_negative_rate_before": _share(hidden[mined])}
    return found | {"sweep": [_filter(gap, wanted, one) | {"beta": one} for one in sorted({*BETAS, beta})]}


def _filter(gap: np.ndarray, hidden: np.ndarray, beta: float) -> dict[str, Any]:
    """The filter score - sigma(q, c+) > -beta against what is hidden, over the mined candidates."""
    flagged = gap > -beta
    precision, recall = precision_recall(flagged, hidden)
    after = _share(hidden[~flagged])
    return {
        "flagged": int(flagged.sum()),
        "precision": precision,
        "recall": recall,
        "false_negative_rate_after": after,
    }


def _reliability(score: np.ndarray, relevant: np.ndarray) -> dict[str, Any]:
    bins = reliability_bins(score, relevant)
    return {"calibration_error": calibration_error(bins), "bins": [asdict(one) for one in bins]}


def _share(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _known_pairs(table: pa.Table, concepts: dict[bytes, str], truth: Truth) -> dict[str, Any]:
    """Arrays over the scored pairs whose two concepts are known; `positive_score` is the query's best declared one."""
    names = ("query_id", "candidate_id", "is_positive", "score")
    best: dict[bytes, float] = {}
    rows = list(zip(*(table[name].to_pylist() for name in names), strict=True))
    for query, _, is_positive, score in rows:
        if is_positive and score is not None:
            best[query] = max(score, best.get(query, score))
    kept = [row for row in rows if row[3] is not None and row[0] in concepts and row[1] in concepts]
    relevance = np.array([truth.relevance(concepts[row[0]], concepts[row[1]]) for row in kept], dtype=np.float64)
    return {
        "relevant": relevance >= RELEVANT,
        "is_positive": np.array([row[2] for row in kept], dtype=bool),
        "score": np.array([row[3] for row in kept], dtype=np.float64),
        "positive_score": np.array([best.get(row[0], np.nan) for row in kept], dtype=np.float64),
        "queries": len({row[0] for row in kept}),
    }
