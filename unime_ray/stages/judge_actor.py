"""The actor of judge: takes queries, fetches what their new pairs need, scores these, and hands out all rows.

Only pairs that nobody has judged yet are scored. A pair that cannot be scored keeps its error in its row; an engine
that dies takes its process along, and Ray starts another (see `judge_watch` for what becomes of the pairs in hand).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from unime_ray.config import JudgeConfig
from unime_ray.corpus.payload import PayloadStore
from unime_ray.errors import EngineDied, ModelError
from unime_ray.ids import show
from unime_ray.models.judge import Group, Judge, Usage, Verdict, usage_of
from unime_ray.schemas import JUDGEMENTS, conform
from unime_ray.stages.candidates import CandidateRows
from unime_ray.stages.judge_known import KnownScores, Pair
from unime_ray.stages.judge_watch import POISON, Evidence, Watch

FIRST_REASONS = 10
PAIRS_BEFORE_GIVING_UP = 2000
"""An actor that has seen so many pairs stops the job at once when too many of them failed."""
DIED = 13
"""Exit status of an actor whose engine died."""

log = logging.getLogger(__name__)


class JudgeActor:
    """Ray Data: (query_id) -> `judgements` rows of all its pairs; the judge is loaded with the first new pair."""

    def __init__(
        self,
        settings: JudgeConfig,
        store: PayloadStore,
        candidates: CandidateRows,
        load: Callable[[JudgeConfig], Judge],
        watch: Watch,
        before: KnownScores | None = None,
        cache: KnownScores | None = None,
    ) -> None:
        """`before` and `cache` hold pairs that need no judging."""
        self._settings, self._store, self._candidates, self._load = settings, store, candidates, load
        self._watch, self._before, self._cache = watch, before, cache
        self._turn = threading.Lock()
        self._judge: Judge | None = None
        self._at_start = Usage()
        self._counters: dict[str, float] = defaultdict(float)
        self._seen, self._failed = 0, 0
        self._reasons: list[str] = []

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = self._candidates.take(batch.column("query_id").to_pylist()).to_pylist()
        found, tally = self._known(rows)
        groups = self._groups(rows, found)
        with self._turn:  # payload of the next batch is fetched by another call meanwhile
            if groups:
                found |= self._score(groups)
            self._count(tally)
        lines = [
            _line(row["query_id"], item, place < len(row["positive_ids"]), found[row["query_id"], item])
            for row in rows
            for place, item in enumerate(_members(row))
        ]
        self._give_up_if_hopeless(lines)
        return conform(pa.Table.from_pylist(lines, JUDGEMENTS), JUDGEMENTS, "judgements")

    def work(self, query_ids: list[bytes]) -> tuple[list[Group], int]:
        """(what would be scored of these queries, pairs of theirs that are known)."""
        rows = self._candidates.take(query_ids).to_pylist()
        found, _ = self._known(rows)
        return self._groups(rows, found), len(found)

    def _known(self, rows: list[dict[str, Any]]) -> tuple[dict[Pair, Verdict], Counter[str]]:
        """Verdicts of the pairs that were judged before, and how many came from where."""
        wanted = {(row["query_id"], item) for row in rows for item in _members(row)}
        queries, tally = [row["query_id"] for row in rows], Counter[str]()
        found: dict[Pair, Verdict] = {}
        if self._before is not None:
            found = {pair: one for pair, one in self._before.verdicts(queries).items() if pair in wanted}
            tally["pairs_reused"] = len(found)
        if self._cache is not None:
            cached = {p: v for p, v in self._cache.verdicts(queries).items() if p in wanted and p not in found}
            tally["cache_hits"], tally["cache_misses"] = len(cached), len(wanted) - len(found) - len(cached)
            found |= cached
        return found, tally

    def _groups(self, rows: list[dict[str, Any]], found: dict[Pair, Verdict]) -> list[Group]:
        """Per query with new pairs its payload and that of their candidates."""
        new = {row["query_id"]: [one for one in _members(row) if (row["query_id"], one) not in found] for row in rows}
        members = {query: list(dict.fromkeys(items)) for query, items in new.items() if items}
        ids = sorted({one for query, items in members.items() for one in (query, *items)})
        with_pictures = self._settings.engine != "oracle"  # it knows a picture by its id
        items = dict(zip(ids, self._store.items(ids, pictures=with_pictures), strict=True))
        return [(items[query], [items[one] for one in others]) for query, others in members.items()]

    def _score(self, groups: list[Group]) -> dict[Pair, Verdict]:
        evidence = self._watch.evidence([query.item_id for query, _ in groups])
        evidence.check()
        judge = self._ready(groups)
        found = _given_up(groups, evidence)
        clock = time.monotonic()
        for part in evidence.parts(groups):
            with self._in_hand(part):
                scored = judge.score_groups(part)
            for (query, candidates), verdicts in zip(part, scored, strict=True):
                pairs = ((query.item_id, candidate.item_id) for candidate in candidates)
                found.update(zip(pairs, verdicts, strict=True))
        self._counters["pairs_scored"] += len(found)
        self._counters["scoring_seconds"] += time.monotonic() - clock
        return found

    def _ready(self, groups: list[Group]) -> Judge:
        """The judge, loaded on first use; a process that dies over it leaves a mark too."""
        if self._judge is None:
            with self._in_hand(groups, loading=True):
                self._judge = self._load(self._settings)
            self._at_start = usage_of(self._judge)  # canary pairs are no work of the run
        return self._judge

    @contextmanager
    def _in_hand(self, groups: list[Group], loading: bool = False) -> Iterator[None]:
        """Leaves a mark meanwhile, which stays if this process dies. It ends itself if its engine has died."""
        self._watch.enter(groups, loading)
        try:
            yield
        except EngineDied as error:
            if self._settings.engine != "openai":  # a server is not ours to start again
                log.error("the engine died (%s); its actor ends and Ray starts another", error)
                os._exit(DIED)
            raise
        finally:
            self._watch.leave()

    def _count(self, tally: Counter[str]) -> None:
        for name, amount in tally.items():
            self._counters[name] += amount
        used = {} if self._judge is None else asdict(usage_of(self._judge).less(self._at_start))
        self._watch.save(self._counters | used)

    def _give_up_if_hopeless(self, lines: list[dict[str, Any]]) -> None:
        failed = [line for line in lines if line["error"] is not None]
        self._seen, self._failed = self._seen + len(lines), self._failed + len(failed)
        self._reasons = (self._reasons + [reason_of(line) for line in failed[:FIRST_REASONS]])[:FIRST_REASONS]
        limit = self._settings.max_error_rate
        if self._seen >= PAIRS_BEFORE_GIVING_UP and self._failed > limit * self._seen:
            raise too_many_errors(self._failed, self._seen, limit, self._reasons)


def too_many_errors(failed: int, seen: int, limit: float, reasons: list[str]) -> ModelError:
    """The error that ends a job whose pairs fail."""
    lines = "".join(f"\n  {reason}" for reason in reasons)
    return ModelError(
        f"{failed} of {seen} pairs could not be scored ({failed / seen:.1%}; the judge's max_error_rate is "
        f"{limit:.1%}); the first reasons:{lines}"
    )


def reason_of(line: dict[str, Any]) -> str:
    """A failed row of `judgements` in words."""
    return f"query {show(line['query_id'])}, candidate {show(line['candidate_id'])}: {line['error']}"


def _given_up(groups: list[Group], evidence: Evidence) -> dict[Pair, Verdict]:
    pairs = ((query.item_id, candidate.item_id) for query, candidates in groups for candidate in candidates)
    return {pair: Verdict.failed(POISON) for pair in pairs if evidence.gives_up(pair)}


def _members(row: dict[str, Any]) -> list[bytes]:
    """What a query is judged with, positives first."""
    return [*row["positive_ids"], *row["candidate_ids"]]


def _line(query: bytes, candidate: bytes, is_positive: bool, verdict: Verdict) -> dict[str, Any]:
    return {
        "query_id": query,
        "candidate_id": candidate,
        "is_positive": is_positive,
        "logit_yes": verdict.logit_yes,
        "logit_no": verdict.logit_no,
        "score": verdict.score,
        "error": verdict.error,
    }
