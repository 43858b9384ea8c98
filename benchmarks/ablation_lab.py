"""Trains and measures one arm of the ablation in this process, with the library's own code and without Ray.

The stages mine once (`mine`, on Ray). After that an arm is: judge scores of the mined candidates (an oracle is asked
here, a model's come from its stage), `select_query`, `EmbedderObjective` or `RerankerObjective` under `run_steps`, and
`search`. Decoded pictures and tokenised texts are shared by all arms, since none of them changes either.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from unime_ray.artifacts import Artifact, Manifest, Run
from unime_ray.config import EmbedderConfig, PixelBudget, RerankerConfig, RunConfig, SelectConfig, TrainConfig
from unime_ray.corpus.payload import Item, PayloadStore
from unime_ray.corpus.truth import Truth, concepts_of
from unime_ray.evaluation.judge_truth import measure
from unime_ray.evaluation.protocol import Protocol, load_protocol
from unime_ray.evaluation.reranking import reranked_row, to_rerank
from unime_ray.evaluation.retrieval import search
from unime_ray.evaluation.tables import per_query_schema
from unime_ray.models.backbone import Backbone
from unime_ray.models.embedder import embed_batch, token_budget_batches
from unime_ray.models.oracle import OracleJudge
from unime_ray.models.reranker import Reranker
from unime_ray.models.tokens import Segment
from unime_ray.schemas import HARD_NEGATIVES
from unime_ray.stages.select import select_query
from unime_ray.train import embedder_objective, reranker_objective
from unime_ray.train.collate import SegmentStore
from unime_ray.train.data import prepare_examples
from unime_ray.train.job import TrainingJob
from unime_ray.train.loop import Stepper, run_steps
from unime_ray.train.worker import Setting, prepare

KS = (1, 10)
TOP_K = 10
EVALUATION_TOKENS = 16384
TRAIN, TRAINED_QUERIES = "train", 250
NO_JUDGE = "none"
ORACLE = "oracle"


class Losses:
    """A training log that keeps the losses: what `run_steps` asks of one."""

    seconds = 0.0

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)

    def flush(self, force: bool = False) -> None:
        """Nothing is written."""


class Lab:
    """One mined run and everything that arms share."""

    def __init__(self, run: Run, config: RunConfig, out: Path, threads: int = 1) -> None:
        self.run, self.config, self.out = run, config, out
        torch.set_num_threads(threads)
        self.payload = PayloadStore(run.artifact("images").data_uri, run.artifact("items").data_uri)
        self.reference = Backbone.load(config.embed.model)
        self._store = SegmentStore(self.payload, self.reference)
        # Bound methods as cached functions: they live as long as the lab does.
        self.judged, self.protocol, self._segments = cache(self._judged), cache(self._protocol), cache(self._tokenised)

    # --- tables -------------------------------------------------------------------------------------------------------

    @cached_property
    def candidates(self) -> list[dict[str, Any]]:
        return self.run.artifact("candidates", "base").read().to_pylist()

    @cached_property
    def truth(self) -> Truth:
        return Truth.load(str(self.config.evaluate.truth))

    @cached_property
    def _items(self) -> dict[bytes, Item]:
        """Payload of every query, candidate and positive: what an oracle looks up."""
        wanted = {item for row in self.candidates for item in _ids(row)}
        return {item.item_id: item for item in self.payload.items(sorted(wanted))}

    def _judged(self, judge: str) -> dict[bytes, list[dict[str, Any]]]:
        """Rows of `judgements` by query. `oracle`, `oracle@0.8` (noised to that AUC), `none` (every candidate 0, every
        positive 1: hard labels, no filter), or a judge whose stage has run."""
        if judge == NO_JUDGE:
            rows = [row | {"score": float(row["is_positive"])} for row in self._pairs()]
        elif judge.startswith(ORACLE):
            rows = self._ask_oracle(float(judge.partition("@")[2] or 1.0))
        else:
            rows = self.run.artifact("judgements", judge).read().to_pylist()
        found = defaultdict(list)
        for row in rows:
            found[row["query_id"]].append(row)
        return found

    def _pairs(self) -> list[dict[str, Any]]:
        pairs = []
        for row in self.candidates:
            for name, positive in (("candidate_ids", False), ("positive_ids", True)):
                pairs += [
                    {"query_id": row["query_id"], "candidate_id": item, "is_positive": positive} for item in row[name]
                ]
        return pairs

    def _ask_oracle(self, noise_auc: float) -> list[dict[str, Any]]:
        oracle, items = OracleJudge(self.truth, noise_auc), self._items
        rows = self._pairs()
        for row in rows:
            row["score"] = oracle.score(items[row["query_id"]], [items[row["candidate_id"]]])[0].score
        return rows

    def judge_figures(self, judge: str) -> dict[str, Any]:
        """AUC, and the filter's precision and recall, of a judge against the truth: see `judge_truth.measure`."""
        rows = [row for judged in self.judged(judge).values() for row in judged]
        columns = ("query_id", "candidate_id", "is_positive", "score")
        table = pa.table({name: [row[name] for row in rows] for name in columns})
        return measure(table, self._concepts, self.truth, self.config.select.beta)

    @cached_property
    def _concepts(self) -> dict[bytes, str]:
        return concepts_of(self.run, self.truth)

    def negatives(self, judge: str, settings: SelectConfig, hard_labels: bool = False) -> tuple[str, Counter[str]]:
        """The `examples` file of a judge's hard negatives under `settings`, made once, and what select counted.

        `hard_labels` keeps the judge's choice and throws its scores away: 1 for the positive, 0 for the negatives.
        """
        name = "-".join([judge, str(hard_labels), *(str(value) for value in settings.model_dump().values())])
        table, counts = Artifact(str(self.out / "tables"), "hard_negatives", name), Counter[str]()
        judged = self.judged(judge)
        lines = [
            line for row in self.candidates for line in select_query(row, judged[row["query_id"]], settings, counts)
        ]
        if table.manifest() is None:
            for line in lines if hard_labels else ():
                line |= {"positive_score": 1.0, "negative_scores": [0.0] * len(line["negative_scores"])}
            table.write(pa.Table.from_pylist(lines, HARD_NEGATIVES), HARD_NEGATIVES)
            table.finish(Manifest(table="hard_negatives", name=name, stage="select", fingerprint="ablation"))
        return prepare_examples(table), counts

    # --- training -----------------------------------------------------------------------------------------------------

    def train(self, config: TrainConfig, examples: str) -> tuple[Setting, dict[str, Any]]:
        """A trained model and what it cost: steps, items encoded, seconds, first and last losses."""
        setting = self._prepare(config, examples)
        make = embedder_objective if isinstance(config, EmbedderConfig) else reranker_objective
        objective = make.make_objective(setting)
        stepper, log, began = Stepper(objective, config), Losses(), time.perf_counter()
        items = _count_items(objective)
        run_steps(stepper, objective, start=0, position=setting.order.position, log=log, save=_no_checkpoint)  # type: ignore[arg-type]
        setting.adapted.eval()
        setting.backbone.forget_features()
        found = [line["loss"] for line in log.lines]
        tail = max(1, len(found) // 10)
        cost = {"steps": len(found), "items": items[0], "train_seconds": time.perf_counter() - began}
        return setting, cost | {"first_loss": float(np.mean(found[:tail])), "last_loss": float(np.mean(found[-tail:]))}

    def _prepare(self, config: TrainConfig, examples: str) -> Setting:
        job = TrainingJob(
            section=config.model_dump(mode="json"),
            model=config.model or self.config.embed.model,
            revision=None,
            pixels=PixelBudget(),
            examples_uri=examples,
            images_uri=self.run.artifact("images").data_uri,
            items_uri=self.run.artifact("items").data_uri,
            artifact_uri="",
            identity={},
        )
        setting = prepare(job, config, torch.device("cpu"))
        setting.backbone.pixels = self.reference.pixels  # decoded pictures, whatever the weights
        return dataclasses.replace(setting, store=self._store if isinstance(config, EmbedderConfig) else setting.store)

    # --- measuring ----------------------------------------------------------------------------------------------------

    def _protocol(self, split: str) -> Protocol:
        """The test sets of a split. Of `train` they are a sample of the queries trained with, in the mined pool."""
        changes: dict[str, Any] = {"splits": (split,)} | ({"max_queries": TRAINED_QUERIES} if split == TRAIN else {})
        settings = self.config.evaluate.model_copy(update=changes)
        protocol = load_protocol(self.run, self.config.model_copy(update={"evaluate": settings}))
        if split == TRAIN:
            self._pass_over_hidden_positives(protocol)
        return protocol

    def _pass_over_hidden_positives(self, protocol: Protocol) -> None:
        """The pool shows an emoji more than once, and a training query declares one of the pictures its positive."""
        about = defaultdict(set)
        for item, concept in self._concepts.items():
            about[concept].add(item)
        for query in (query for one in protocol.sets for query in one.queries):
            query.known |= about.get(self._concepts.get(query.query_id, ""), set())

    def _tokenised(self, split: str) -> dict[bytes, Segment]:
        ids = self.protocol(split).item_ids()
        return dict(zip(ids, self._store.segments(ids), strict=True))

    def retrieve(self, backbone: Backbone, split: str) -> pa.Table:
        """The per-query table of a split, as the evaluate stage writes it."""
        vectors = self._embed(backbone, self._segments(split))
        rows = [row for one in self.protocol(split).sets for row in search(one, vectors, KS, TOP_K)]
        return pa.Table.from_pylist(rows, per_query_schema(KS))

    def _embed(self, backbone: Backbone, segments: Mapping[bytes, Segment]) -> dict[bytes, np.ndarray]:
        """As `Embedder.embed`, of segments that are there already."""
        ids, vectors = list(segments), {}
        lengths = {index: len(segments[item]) for index, item in enumerate(ids)}
        for rows in token_budget_batches(lengths, backbone.batch_budget(EVALUATION_TOKENS)):
            with torch.no_grad():
                batch = backbone.collate([segments[ids[row]] for row in rows])
                vectors.update(zip([ids[row] for row in rows], embed_batch(backbone, batch).numpy(), strict=True))
        return vectors

    def rerank(self, backbone: Backbone, table: pa.Table, mode: str, length: int) -> pa.Table:
        """The first `length` answers of `table` in the reranker's order."""
        rows = table.to_pylist()
        for row in rows:
            row["top_ids"], row["top_scores"] = row["top_ids"][:length], row["top_scores"][:length]
        short = pa.Table.from_pylist(rows, table.schema)
        places = to_rerank(short)
        groups = [
            (item, self.payload.items(rows[place]["top_ids"]))
            for place, item in zip(places, self.payload.items([rows[p]["query_id"] for p in places]), strict=True)
        ]
        orders = Reranker(backbone, EVALUATION_TOKENS).rerank_groups(groups, mode)
        for place, order in zip(places, orders, strict=True):
            rows[place] = reranked_row(rows[place], [int(index) for index in order], KS)
        return pa.Table.from_pylist(rows, table.schema)


def _ids(row: dict[str, Any]) -> Iterable[bytes]:
    return (row["query_id"], *row["candidate_ids"], *row["positive_ids"])


def _no_checkpoint(done: int, metrics: dict[str, float]) -> None:
    """Arms are short: one that is cut off starts again."""


def _count_items(objective: Any) -> Sequence[int]:
    """Counts the items that go through the model, in a list of one that grows."""
    total, backward = [0], objective.backward

    def counted(stepper: Stepper, batch: Any) -> Any:
        result = backward(stepper, batch)
        total[0] += result.num_items
        return result

    objective.backward = counted
    return total


def mine(run: Run, config: RunConfig, judges: Sequence[str]) -> None:
    """Ingest, embed, retrieve, and the model judges among `judges`, each unless it is there: Ray starts only then."""
    needed = [run.artifact("candidates", "base"), *(run.artifact("judgements", judge) for judge in judges)]
    if all(artifact.manifest() is not None for artifact in needed):
        return
    from unime_ray.cluster import connected
    from unime_ray.pipeline import mining

    wanted = {"ingest", "embed", "retrieve"}
    with connected():
        for step in mining(run, config):
            if step.stage in wanted or (step.stage == "judge" and step.name in judges):
                step.run()


def reranker_config(changes: Mapping[str, Any], base: RerankerConfig) -> RerankerConfig:
    return RerankerConfig.model_validate(base.model_dump() | dict(changes))
