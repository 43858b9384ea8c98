"""From per-query values to means, intervals and differences. All arms answered the same queries, so all is paired."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from unime_ray.config import EvaluateConfig
from unime_ray.errors import EvaluationError
from unime_ray.evaluation.arms import BASE, RERANK, RETRIEVE, Arm
from unime_ray.evaluation.tables import KEYS, metric_values
from unime_ray.metrics import Floats, bootstrap_means, difference, interval, metric_names

MEAN = "mean"
"""Stands for the dataset in rows that are unweighted means over datasets."""


@dataclass
class Group:
    """One test set: values (Q, A, M) of Q queries, A arms, M metrics."""

    dataset: str
    split: str
    meta_task: str | None
    query_ids: list[bytes]
    values_QAM: Floats


@dataclass
class Stacked:
    """The values of all arms on all test sets."""

    arms: list[str]
    metrics: list[str]
    groups: list[Group]

    @property
    def num_queries(self) -> int:
        return sum(len(group.query_ids) for group in self.groups)

    def long_table(self, arms: Sequence[Arm]) -> pa.Table:
        """One row a query and arm: what `metrics/per_query.parquet` holds."""
        parts = []
        for group in self.groups:
            for index, arm in enumerate(arms):
                size = len(group.query_ids)
                columns: dict[str, Any] = {"dataset": [group.dataset] * size, "split": [group.split] * size}
                columns |= {"query_id": pa.array(group.query_ids, pa.binary(16)), "model": [arm.name] * size}
                columns["stage"] = [arm.stage] * size
                columns |= {name: group.values_QAM[:, index, at] for at, name in enumerate(self.metrics)}
                parts.append(pa.table(columns))
        return pa.concat_tables(parts)


def stack_arms(tables: Mapping[str, pa.Table], ks: tuple[int, ...]) -> Stacked:
    """Align the arms' per-query tables by test set and query.

    Raises:
        EvaluationError: the arms did not answer the same queries.
    """
    ordered = {name: table.sort_by([(key, "ascending") for key in KEYS]) for name, table in tables.items()}
    first = next(iter(ordered.values()))
    for name, table in ordered.items():
        if not table.select(KEYS).equals(first.select(KEYS)):
            raise EvaluationError(f"evaluations/{name} answers other queries than the other arms; remove that folder")
    values_QAM = np.stack([metric_values(table, ks) for table in ordered.values()], axis=1)
    places: dict[tuple[str, str, str | None], list[int]] = {}
    columns = (first[name].to_pylist() for name in ("dataset", "split", "meta_task"))
    for row, key in enumerate(zip(*columns, strict=True)):
        places.setdefault(key, []).append(row)
    ids = first["query_id"].to_pylist()
    groups = [Group(*key, [ids[row] for row in rows], values_QAM[rows]) for key, rows in places.items()]
    return Stacked(list(tables), metric_names(ks), groups)


def resample(stacked: Stacked, settings: EvaluateConfig) -> list[tuple[str, list[Group], Floats, Floats]]:
    """(label, groups, means (A, M), bootstrap samples (B, A, M)) for each test set, then the mean of each split.

    Queries are drawn within their test set; the mean over test sets averages the samples of its parts.
    """
    results = []
    shape = (settings.bootstrap_samples, len(stacked.arms), len(stacked.metrics))
    for group in stacked.groups:
        flat = group.values_QAM.reshape(len(group.query_ids), -1)
        samples = bootstrap_means(flat, settings.bootstrap_samples, settings.seed).reshape(shape)
        results.append((group.dataset, [group], group.values_QAM.mean(axis=0), samples))
    for split in dict.fromkeys(group.split for group in stacked.groups):
        parts = [result for result in results if result[1][0].split == split and result[0] != MEAN]
        groups = [group for part in parts for group in part[1]]
        mean = np.mean([part[2] for part in parts], axis=0)
        results.append((MEAN, groups, mean, np.mean([part[3] for part in parts], axis=0)))
    return results


def metric_rows(stacked: Stacked, arms: Sequence[Arm], settings: EvaluateConfig) -> list[dict[str, Any]]:
    """Rows of the `metrics` table."""
    rows = []
    for label, groups, means_AM, samples_BAM in resample(stacked, settings):
        meta_task = groups[0].meta_task if label != MEAN else None
        shared = {"dataset": label, "split": groups[0].split, "meta_task": meta_task}
        shared["queries"] = sum(len(group.query_ids) for group in groups)  # type: ignore[assignment]
        for a, arm in enumerate(arms):
            for m, metric in enumerate(stacked.metrics):
                low, high = interval(samples_BAM[:, a, m]) if len(samples_BAM) else (None, None)
                found = {"model": arm.name, "stage": arm.stage, "metric": metric, "value": float(means_AM[a, m])}
                rows.append(shared | found | {"low": low, "high": high})
    return rows


def comparisons(arms: Sequence[Arm]) -> list[tuple[str, str, str]]:
    """(kind, arm, against): each adapted arm against base, against each InfoNCE one, and reranked against not."""
    pairs = []
    baselines = [arm for arm in arms if arm.stage == RETRIEVE and arm.loss == "infonce"]
    for arm in arms:
        if arm.name != BASE:
            pairs.append(("base", arm.name, BASE))
        if arm.stage == RETRIEVE:
            pairs += [("infonce", arm.name, other.name) for other in baselines if arm.name not in (other.name, BASE)]
        if arm.stage == RERANK and arm.embedder != BASE:
            pairs.append(("not reranked", arm.name, arm.embedder))
    return pairs


def differences(
    stacked: Stacked, pairs: Sequence[tuple[str, str, str]], settings: EvaluateConfig
) -> list[dict[str, Any]]:
    """Paired differences of each pair on each test set and their mean, per metric, with 95 % intervals."""
    rows = []
    place = {name: index for index, name in enumerate(stacked.arms)}
    for label, groups, means_AM, samples_BAM in resample(stacked, settings):
        for kind, name, against in pairs:
            a, b = place[name], place[against]
            for m, metric in enumerate(stacked.metrics):
                found = difference(float(means_AM[a, m] - means_AM[b, m]), samples_BAM[:, a, m] - samples_BAM[:, b, m])
                shared = {"dataset": label, "split": groups[0].split, "kind": kind, "model": name, "against": against}
                rows.append(
                    shared
                    | {"metric": metric, "value": found.value, "low": found.low, "high": found.high}
                    | {"share_not_better": found.share_not_better}
                )
    return rows
