"""Ranks after a reranker has put the first answers of a query in a new order.

Only the first `rerank_top_k` answers move, so a query whose golds are all further down keeps its metrics: it is not
sent to the reranker at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from unime_ray.evaluation.tables import with_metrics


def to_rerank(table: pa.Table) -> list[int]:
    """Rows of a per-query table whose metrics a new order of the first answers could change."""
    golds, tops = table["gold_ids"].to_pylist(), table["top_ids"].to_pylist()
    return [row for row, (gold, top) in enumerate(zip(golds, tops, strict=True)) if len(top) > 1 and {*gold} & {*top}]


def reranked_row(row: dict[str, object], order: Sequence[int], ks: tuple[int, ...]) -> dict[str, object]:
    """`row` of the per-query table with its first answers in `order` (positions in `top_ids`) and the new metrics.

    Scores become minus the place in the list, since a reranker's scores and cosines do not compare.
    """
    old: list[bytes] = row["top_ids"]  # type: ignore[assignment]
    top = [old[position] for position in order]
    golds: list[bytes] = row["gold_ids"]  # type: ignore[assignment]
    place = {item: index for index, item in enumerate(top)}
    ranks, scores = [], []
    for gold, rank, score in zip(golds, row["gold_ranks"], row["gold_scores"], strict=True):  # type: ignore[call-overload]
        if gold in place:
            before = top[: place[gold]]
            ranks.append(1 + sum(item not in golds for item in before))
            scores.append(-float(place[gold] + 1))
        else:
            ranks.append(rank)
            scores.append(score - 2.0 - len(top))  # cosines are at most 1: after everything that was reranked
    changed = {"top_ids": top, "top_scores": [-float(place) for place in range(1, len(top) + 1)]}
    return with_metrics(row | changed | {"gold_ranks": ranks, "gold_scores": scores}, ks)
