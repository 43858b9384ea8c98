"""The whole recipe, readable top to bottom. Every step is skipped when its artifact is already there.

corpus -> ingest -> embed -> (duplicates) -> retrieve -> judge -> select -> train embedders and rerankers -> evaluate
-> report
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import yaml

from unime_ray.artifacts import Manifest, Run, write_text
from unime_ray.config import RunConfig

log = logging.getLogger("unime_ray")


@dataclass(frozen=True)
class Step:
    """One step of the recipe: the stage, which of several (a judge's or a model's name), and how to run it."""

    stage: str
    name: str | None
    run: Callable[[], Manifest]

    @property
    def title(self) -> str:
        return self.stage if self.name is None else f"{self.stage} {self.name}"


def recipe(run: Run, config: RunConfig) -> Iterator[Step]:
    """The steps of a run, in order. Nothing heavy is imported before a step runs."""
    yield from mining(run, config)
    yield from training(run, config)
    yield Step("evaluate", None, lambda: _evaluate(run, config))
    yield Step("report", None, lambda: _report(run, config))


def mining(run: Run, config: RunConfig) -> Iterator[Step]:
    """Corpus to hard negatives: ingest, embed, retrieve, then judge and select once per judge.

    Without judges the hard negatives are those the corpus brings, and nothing is mined.
    """
    yield Step("ingest", None, lambda: _ingest(run, config))
    if not config.judges:
        return
    yield Step("embed", None, lambda: _embed(run, config))
    if config.duplicates.methods:
        yield Step("duplicates", None, lambda: _duplicates(run, config))
    yield Step("retrieve", None, lambda: _retrieve(run, config))
    for judge in config.judges:
        yield Step("judge", judge, lambda judge=judge: _judge(run, config, judge))  # type: ignore[misc]
        yield Step("select", judge, lambda judge=judge: _select(run, config, judge))  # type: ignore[misc]


def training(run: Run, config: RunConfig) -> Iterator[Step]:
    """Hard negatives to checkpoints: every embedder, then every reranker. Before them the teachers of UniME V1."""
    for name in config.teachers:
        yield Step("teach", name, lambda name=name: _teach(run, config, name))  # type: ignore[misc]
    for name in config.training_order():
        yield Step("train-embedder", name, lambda name=name: _train_embedder(run, config, name))  # type: ignore[misc]
    for name in config.rerankers:
        yield Step("train-reranker", name, lambda name=name: _train_reranker(run, config, name))  # type: ignore[misc]


def save_config(run: Run, config: RunConfig) -> None:
    """Leave the config in the run folder, so that a run says what it was, and can be run from there again."""
    found = config.model_dump(mode="json")
    for entry, source in zip(found["corpus"]["sources"], config.corpus.sources, strict=True):
        # A column that is named must be there; one that is only the default need not.
        entry["columns"] = source.columns.model_dump(mode="json", exclude_unset=True)
    write_text(run.child("config.yaml"), yaml.safe_dump(found, sort_keys=False))


def _ingest(run: Run, config: RunConfig) -> Manifest:
    from unime_ray.stages.ingest import run_ingest

    return run_ingest(run, config)


def _embed(run: Run, config: RunConfig) -> Manifest:
    from unime_ray.stages.embed import run_embed

    return run_embed(run, config)


def _duplicates(run: Run, config: RunConfig) -> Manifest:
    from unime_ray.stages.duplicates import run_duplicates

    return run_duplicates(run, config)


def _retrieve(run: Run, config: RunConfig) -> Manifest:
    from unime_ray.stages.retrieve import run_retrieve

    return run_retrieve(run, config)


def _judge(run: Run, config: RunConfig, name: str) -> Manifest:
    from unime_ray.stages.judge import run_judge

    return run_judge(run, config, name)


def _select(run: Run, config: RunConfig, name: str) -> Manifest:
    from unime_ray.stages.select import run_select

    return run_select(run, config, name)


def _teach(run: Run, config: RunConfig, name: str) -> Manifest:
    from unime_ray.stages.teach import run_teach

    return run_teach(run, config, name)


def _train_embedder(run: Run, config: RunConfig, name: str) -> Manifest:
    from unime_ray.train.embedder import run_train_embedder

    return run_train_embedder(run, config, name)


def _train_reranker(run: Run, config: RunConfig, name: str) -> Manifest:
    from unime_ray.train.reranker import run_train_reranker

    return run_train_reranker(run, config, name)


def _evaluate(run: Run, config: RunConfig) -> Manifest:
    from unime_ray.evaluation import run_evaluate

    return run_evaluate(run, config)


def _report(run: Run, config: RunConfig) -> Manifest:
    from unime_ray.report import run_report

    return run_report(run, config)
