"""The per-query table behind every metric: one row a query and test set, from which all intervals are drawn."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from unime_ray.metrics import Floats, metric_names, query_metrics
from unime_ray.schemas import FLOATS, ID, IDS

KEYS = ["dataset", "split", "query_id"]


def per_query_schema(ks: tuple[int, ...]) -> pa.Schema:
    """`evaluations/<arm>`: ranks and scores of the golds, the first answers, and one column a metric."""
    required = [
        ("dataset", pa.string()),
        ("split", pa.string()),
        ("query_id", ID),
        ("gold_ids", IDS),
        ("gold_relevances", FLOATS),
        ("gold_ranks", pa.list_(pa.int64())),
        ("gold_scores", pa.list_(pa.float64())),
        ("top_ids", IDS),
        ("top_scores", pa.list_(pa.float64())),
    ]
    fields = [pa.field(name, kind, nullable=False) for name, kind in required]
    fields.insert(2, pa.field("meta_task", pa.string()))
    return pa.schema(fields + [pa.field(name, pa.float64(), nullable=False) for name in metric_names(ks)])


def with_metrics(row: dict[str, object], ks: tuple[int, ...]) -> dict[str, object]:
    """`row` with one entry a metric, computed from its gold ranks, scores and relevances."""
    ranks = np.asarray(row["gold_ranks"], dtype=np.int64)
    values = query_metrics(ranks, row["gold_scores"], row["gold_relevances"], ks)  # type: ignore[arg-type]
    return row | dict(zip(metric_names(ks), values, strict=True))


def metric_values(table: pa.Table, ks: tuple[int, ...]) -> Floats:
    """(Q, M) values of every query in the table's order."""
    return np.stack([table[name].to_numpy() for name in metric_names(ks)], axis=1)
