"""`judge.prompt_order`: what each order costs and how good its scores are, on a run's own candidates.

    python benchmarks/prompt_order.py runs/demo --judge tiny-judge --queries 300

The first queries of each kind (text, picture) in the run's `candidates`; every pair is judged in both orders,
in batches of `--batch` neighbouring queries as the stage takes them, the two orders in turn. AUC is against the truth
table: `all` counts declared positives, `mined` only what retrieval found (a dash: nothing relevant in it). Time is CPU
time, picture features kept.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from typing import Any

import engines  # noqa: F401 - first: it puts the checkout on the path
import numpy as np
import pyarrow as pa
import torch

from unime_ray.artifacts import Run
from unime_ray.corpus.payload import PayloadStore
from unime_ray.corpus.truth import Truth, concepts_of
from unime_ray.evaluation.judge_truth import measure
from unime_ray.models.backbone import Backbone
from unime_ray.models.judge_transformers import TransformersJudge
from unime_ray.schemas import JUDGEMENTS

ORDERS = ("query_first", "candidate_first")
Rows = list[dict[str, Any]]


def by_kind(run: Run, store: PayloadStore) -> dict[str, Rows]:
    """The rows of `candidates` for each kind of query."""
    rows = run.artifact("candidates", "base").read().to_pylist()
    queries = {item.item_id: item for item in store.items([row["query_id"] for row in rows], pictures=False)}
    kinds: dict[str, Rows] = defaultdict(list)
    for row in rows:
        kinds["text query" if queries[row["query_id"]].image_id is None else "picture query"].append(row)
    return kinds


def print_reuse(store: PayloadStore, kind: str, rows: Rows, batch: int) -> None:
    """How often a candidate's picture comes back, in the whole run and among queries judged together."""
    told = []
    for part in (rows, rows[:batch]):
        ids = [item for row in part for item in dict.fromkeys([*row["positive_ids"], *row["candidate_ids"]])]
        found = {item.item_id: item.image_id for item in store.items(sorted(set(ids)), pictures=False)}
        shown = [found[item] for item in ids if found[item] is not None]
        different = len(set(shown))
        told.append(f"{len(part):,} queries: {len(ids):,} pairs, {different:,} different candidate pictures"
                    + (f" ({len(shown) / different:.2f} pairs each)" if different else ""))  # fmt: skip
    print(f"{kind}: " + "; of these the first ".join(told))


def judge_all(judge: TransformersJudge, store: PayloadStore, rows: Rows) -> tuple[list[dict[str, Any]], float]:
    """`judgements` rows of a batch of queries, and the CPU seconds that judging took."""
    members = {row["query_id"]: list(dict.fromkeys([*row["positive_ids"], *row["candidate_ids"]])) for row in rows}
    ids = sorted({one for query, items in members.items() for one in (query, *items)})
    items = dict(zip(ids, store.items(ids), strict=True))
    started = time.process_time()
    verdicts = judge.score_groups([(items[query], [items[one] for one in found]) for query, found in members.items()])
    seconds = time.process_time() - started
    lines = []
    for row, judged in zip(rows, verdicts, strict=True):
        for place, (item, verdict) in enumerate(zip(members[row["query_id"]], judged, strict=True)):
            line = {"query_id": row["query_id"], "candidate_id": item, "is_positive": place < len(row["positive_ids"])}
            lines.append(line | {"score": verdict.score, "error": verdict.error})
    return lines, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run folder with candidates")
    parser.add_argument("--judge", default="tiny-judge")
    parser.add_argument("--truth", default="demo://")
    parser.add_argument("--queries", type=int, default=300, help="of each kind")
    parser.add_argument("--batch", type=int, default=32, help="queries judged together")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    torch.set_num_threads(1)
    run = Run(options.run)
    store = PayloadStore(run.artifact("images").data_uri, run.artifact("items").data_uri)
    truth = Truth.load(options.truth)
    concepts = concepts_of(run, truth)
    backbones = {order: Backbone.load(options.judge, dtype=options.dtype) for order in ORDERS}
    judges = {order: TransformersJudge(backbone, prompt_order=order) for order, backbone in backbones.items()}
    kinds = by_kind(run, store)
    for kind, rows in kinds.items():
        print_reuse(store, kind, rows, options.batch)
    print(f"{options.judge}, {options.run}\n{'':<32}{'pairs':>8}{'pairs/s':>10}{'tokens saved':>14}"
          f"{'AUC all':>9}{'mined':>8}{'mean |difference|':>19}")  # fmt: skip
    for kind, rows in kinds.items():
        rows = rows[: options.queries]
        found: dict[str, list[dict[str, Any]]] = {order: [] for order in ORDERS}
        seconds = dict.fromkeys(ORDERS, 0.0)
        before = {order: (judge.usage.prompt_tokens, judge.usage.computed_tokens) for order, judge in judges.items()}
        for start in range(0, len(rows), options.batch):
            for order, judge in judges.items():
                lines, taken = judge_all(judge, store, rows[start : start + options.batch])
                found[order] += lines
                seconds[order] += taken
        scores = {order: np.array([line["score"] for line in lines]) for order, lines in found.items()}
        for order, lines in found.items():
            table = pa.Table.from_pylist(lines, JUDGEMENTS)
            quality = measure(table, concepts, truth, beta=0.01)
            tokens, computed = (now - old for now, old in zip(
                (judges[order].usage.prompt_tokens, judges[order].usage.computed_tokens), before[order], strict=True
            ))  # fmt: skip
            apart = np.abs(scores[order] - scores["query_first"]).mean()
            aucs = ["-" if quality[name] is None else f"{quality[name]:.3f}" for name in ("auc", "hidden_auc")]
            print(f"{kind + ', ' + order:<32}{len(lines):>8,}{len(lines) / seconds[order]:>10.0f}"
                  f"{1 - computed / tokens:>14.0%}{aucs[0]:>9}{aucs[1]:>8}{apart:>19.3f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
