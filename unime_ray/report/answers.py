"""Test queries with their first answers before, after and reranked: some better, some worse, some as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from unime_ray.artifacts import Run
from unime_ray.report.pictures import Instructions, Payload, Pictures

NUM_BETTER, NUM_WORSE, NUM_ANY = 4, 4, 4
SHOWN = 5
COLUMNS = ["dataset", "query_id", "gold_ids", "gold_ranks", "top_ids", "top_scores"]

Answers = dict[tuple[str, bytes], dict[str, Any]]


def answers_section(
    run: Run, steps: Sequence[dict[str, Any]], pictures: Pictures, instructions: Instructions
) -> list[dict[str, Any]]:
    """Cards of test queries; `steps` are the headline's arms, before first. Empty with fewer than two arms."""
    arms = [step["arm"] for step in steps]
    if len(arms) < 2 or any(run.artifact("evaluations", arm["name"]).manifest() is None for arm in arms):
        return []
    found = [_answers(run, arm["name"]) for arm in arms]
    # Training moves the retriever; a reranker only its first ten, so change is read off the second arm.
    chosen = choose(found[0], found[1])
    needed: dict[bytes, None] = {}
    for key, _ in chosen:
        for answers in found:
            needed |= dict.fromkeys([key[1], *answers[key]["gold_ids"][:1], *answers[key]["top_ids"][:SHOWN]])
    items = Payload(run, list(needed), pictures, instructions)
    return [
        _card(key, why, [(arm, one[key]) for arm, one in zip(arms, found, strict=True)], items) for key, why in chosen
    ]


def choose(before: Answers, after: Answers) -> list[tuple[tuple[str, bytes], str]]:
    """(query, why it is here): the largest gains, the largest losses, and the first by id of the rest."""

    def gain(key: tuple[str, bytes]) -> float:
        return 1 / _rank(after[key]) - 1 / _rank(before[key])

    order = sorted(before, key=lambda key: (-gain(key), key[1]))
    better = [key for key in order[:NUM_BETTER] if gain(key) > 0]
    worse = [key for key in order[::-1][:NUM_WORSE] if gain(key) < 0]
    rest = [key for key in sorted(before, key=lambda key: key[1]) if key not in better + worse][:NUM_ANY]
    named = (("among the largest gains", better), ("among the largest losses", worse), ("picked by id", rest))
    return [(key, why) for why, keys in named for key in keys]


def _answers(run: Run, arm: str) -> Answers:
    rows = run.artifact("evaluations", arm).read(COLUMNS).to_pylist()
    return {(row["dataset"], row["query_id"]): row for row in rows}


def _rank(row: dict[str, Any]) -> int:
    return min(row["gold_ranks"])


def _card(
    key: tuple[str, bytes], why: str, rows: Sequence[tuple[dict[str, Any], dict[str, Any]]], items: Payload
) -> dict[str, Any]:
    golds = rows[0][1]["gold_ids"]
    lines = [
        {
            "arm": arm,
            "rank": _rank(row),
            "tiles": [items[item] | {"gold": item in golds} for item in row["top_ids"][:SHOWN]],
        }
        for arm, row in rows
    ]
    return {"dataset": key[0], "why": why, "query": items[key[1]], "gold": items[golds[0]], "lines": lines}
