"""The hard negatives a training query was given, for whoever asks that very query: what the judge thought of them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from unime_ray.artifacts import Run
from unime_ray.corpus.payload import PayloadStore
from unime_ray.ids import show
from unime_ray.serve.schemas import NegativeItem, NegativesAnswer
from unime_ray.serve.search import image_url
from unime_ray.serve.tasks import caption

log = logging.getLogger("unime_ray.serve")
MAX_ROWS = 500_000
"""More are not held in an ingress replica (about 1 KB a row): the page then goes without."""


@dataclass(frozen=True)
class Negatives:
    """One judge's hard negatives, by query."""

    judge: str
    table: pa.Table
    row_of: dict[bytes, list[int]]
    payload: PayloadStore

    def of(self, query_id: bytes, item_instructions: Collection[str]) -> NegativesAnswer:
        """Positives and negatives of a training query, best judged first; empty lists for any other query."""
        rows = self.table.take(pa.array(self.row_of.get(query_id, []), pa.int64())).to_pylist()
        positives = [(row["positive_id"], row["positive_score"], None, None) for row in rows]
        negatives: dict[bytes, tuple[Any, ...]] = {}
        for row in rows:
            columns = ("negative_ids", "negative_scores", "negative_similarities", "negative_reasons")
            for found in zip(*(row[name] for name in columns), strict=True):
                negatives.setdefault(found[0], found)
        ordered = sorted(negatives.values(), key=lambda found: -found[1])
        return NegativesAnswer(
            query_id=show(query_id),
            judge=self.judge,
            positives=self._shown(positives, item_instructions),
            negatives=self._shown(ordered, item_instructions),
        )

    def _shown(self, found: Sequence[tuple[Any, ...]], item_instructions: Collection[str]) -> list[NegativeItem]:
        items = self.payload.items([each[0] for each in found], pictures=False)
        return [
            NegativeItem(
                id=show(identifier),
                caption=caption(item.text, item_instructions),
                image_url=image_url(show(identifier), item.image_id),
                judge_score=score,
                similarity=similarity,
                reason=reason,
            )
            for (identifier, score, similarity, reason), item in zip(found, items, strict=True)
        ]


def read_negatives(run: Run, judge: str | None, payload: PayloadStore) -> Negatives | None:
    """Those that `judge` chose, or else the run's first; None if the run has none (or too many to hold)."""
    there = [artifact for artifact in run.artifacts() if artifact.table == "hard_negatives" and artifact.name]
    if not there:
        return None
    artifact = next((each for each in there if each.name == judge), there[0])
    rows = artifact.require().rows
    if rows > MAX_ROWS:
        log.warning("%d hard negatives are not shown: more than %d", rows, MAX_ROWS)
        return None
    table = artifact.read()
    row_of: dict[bytes, list[int]] = {}
    for row, query in enumerate(table.column("query_id").to_pylist()):
        row_of.setdefault(query, []).append(row)
    return Negatives(str(artifact.name), table, row_of, payload)
