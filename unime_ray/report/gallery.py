"""The gallery: queries with their positive and what became of every mined candidate, as cards with pictures."""

from __future__ import annotations

from typing import Any

import numpy as np

from unime_ray.artifacts import Run
from unime_ray.config import RunConfig
from unime_ray.corpus.truth import Truth
from unime_ray.report.fates import Candidate, Mined, load_mined
from unime_ray.report.judges import sample_queries
from unime_ray.report.pictures import Instructions, Payload, Pictures
from unime_ray.selection import DELTA, FALSE_NEGATIVE, KEPT, SPARE, UNSCORED

NUM_QUERIES = 24
SHOWN = {KEPT: 10, FALSE_NEGATIVE: 8, DELTA: 4, SPARE: 5, UNSCORED: 3}
TITLES = {
    KEPT: "Kept as hard negatives",
    FALSE_NEGATIVE: "Dropped as false negatives",
    DELTA: "Dropped by similarity",
    SPARE: "Passed, not drawn",
    UNSCORED: "Not judged",
}
POOL = 600


def gallery(run: Run, config: RunConfig, pictures: Pictures, instructions: Instructions) -> list[dict[str, Any]]:
    """Cards of about NUM_QUERIES queries, each with one view per judge. Empty before mining is done."""
    judges = [name for name in config.judges if run.artifact("hard_negatives", name).manifest() is not None]
    if not judges:
        return []
    pool = sample_queries(run, POOL, seed=1)
    mined = {judge: load_mined(run, judge, pool, config.select) for judge in judges}
    chosen = choose(mined[judges[0]])
    views = {query: {judge: mined[judge][query] for judge in judges if query in mined[judge]} for query in chosen}
    truth = Truth.load(config.evaluate.truth) if config.evaluate.truth else None
    items = Payload(run, _needed(views), pictures, instructions, truth)
    return [_card(query, views[query], items) for query in chosen]


def choose(mined: dict[bytes, Mined], count: int = NUM_QUERIES) -> list[bytes]:
    """A third with the most false negatives dropped, a few that got no negative, the rest in the order of their ids.

    Ids are content hashes, so their order is as good as random and never changes.
    """
    with_drops = sorted(mined, key=lambda query: (-len(mined[query].of(FALSE_NEGATIVE)), query))
    with_drops = [query for query in with_drops if mined[query].of(KEPT) and mined[query].of(FALSE_NEGATIVE)]
    empty = [query for query in sorted(mined) if not mined[query].of(KEPT)]
    chosen = with_drops[: count // 3] + empty[: count // 8]
    chosen += [query for query in sorted(mined) if query not in chosen][: count - len(chosen)]
    order = np.random.default_rng(0).permutation(len(chosen))
    return [chosen[index] for index in order]


def _shown(mined: Mined) -> list[tuple[str, list[Candidate], int]]:
    """(fate, candidates shown, how many more) of each fate, as the card lists them."""
    groups = []
    for fate, limit in SHOWN.items():
        found = mined.of(fate)
        if found:
            groups.append((fate, found[:limit], max(0, len(found) - limit)))
    return groups


def _needed(views: dict[bytes, dict[str, Mined]]) -> list[bytes]:
    wanted: dict[bytes, None] = {}
    for query, by_judge in views.items():
        wanted[query] = None
        for mined in by_judge.values():
            wanted[mined.positive_id] = None
            wanted.update((one.item_id, None) for _, shown, _ in _shown(mined) for one in shown)
    return list(wanted)


def _card(query: bytes, by_judge: dict[str, Mined], items: Payload) -> dict[str, Any]:
    first = next(iter(by_judge.values()))
    shape = f"{_kind(items[query])} to {_kind(items[first.positive_id])}"
    views = [_view(judge, mined, items) for judge, mined in by_judge.items()]
    return {"query": items[query], "shape": shape, "views": views, "id": query.hex()}


def _kind(item: dict[str, Any]) -> str:
    if item["has_picture"]:
        return "picture and text" if item["text"] else "picture"
    return "text"


def _view(judge: str, mined: Mined, items: Payload) -> dict[str, Any]:
    groups = [
        {
            "fate": fate.replace(" ", "-"),
            "title": TITLES[fate],
            "count": len(shown) + more,
            "more": more,
            "tiles": [_tile(mined.query_id, one, items) for one in shown],
        }
        for fate, shown, more in _shown(mined)
    ]
    positive = items[mined.positive_id] | {"score": mined.positive_score, "similarity": mined.positive_similarity}
    dropped, empty = bool(mined.of(FALSE_NEGATIVE)), not mined.of(KEPT)
    return {"judge": judge, "positive": positive, "groups": groups, "dropped": dropped, "empty": empty}


def _tile(query: bytes, one: Candidate, items: Payload) -> dict[str, Any]:
    shared = {"rank": one.rank, "similarity": one.similarity, "score": one.score, "reason": one.reason}
    return items[one.item_id] | shared | {"relevance": items.relevance(query, one.item_id)}
