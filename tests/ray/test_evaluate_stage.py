"""The evaluate stage on a local cluster, with models that know the concepts more or less well."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from synthetic_run import SyntheticRun, full_run

from unime_ray import schemas
from unime_ray.artifacts import Manifest
from unime_ray.errors import ArtifactError, ConfigError, EvaluationError, ModelError
from unime_ray.evaluation import render_results, results_table, run_evaluate
from unime_ray.evaluation.arms import Checkpoint
from unime_ray.report import run_report

NOISE = {"base": 2.2, "infonce": 1.5, "unime_v2": 0.9}


@dataclass
class FakeModels:
    """What actors load: vectors by id, and a reranker that finds the query's concept. `log` notes what was loaded."""

    vectors: dict[str, dict[bytes, np.ndarray]]
    concepts: dict[bytes, int]
    log: str
    broken: bytes | None = None
    error: str | None = None

    def __call__(self, kind: str, checkpoint: Checkpoint) -> Any:
        if self.error:
            raise ModelError(self.error)
        name = "base" if checkpoint.model == "tiny" else Path(checkpoint.model).parent.name
        with open(self.log, "a") as file:
            file.write(f"{kind} {name}\n")
        return FakeEmbedder(self, name) if kind == "embedder" else FakeReranker(self)


@dataclass
class FakeEmbedder:
    models: FakeModels
    name: str

    def embed_checked(self, items: list[Any]) -> tuple[np.ndarray, list[str | None]]:
        vectors = np.stack([self.models.vectors[self.name][item.item_id] for item in items])
        return vectors, ["broken" if item.item_id == self.models.broken else None for item in items]


@dataclass
class FakeReranker:
    models: FakeModels

    def rerank_groups(self, groups: list[Any], mode: str) -> list[list[int]]:
        assert mode == "listwise"
        known = self.models.concepts
        orders = []
        for query, candidates in groups:
            same = [known[item.item_id] == known[query.item_id] for item in candidates]
            orders.append(sorted(range(len(candidates)), key=lambda place, same=same: (not same[place], place)))
        return orders


@pytest.fixture(scope="module", autouse=True)
def no_checkpoint(ray_cluster: None) -> Iterator[None]:
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the actors cannot import a test module
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unime_ray.evaluation.evaluate.base_revision", lambda config: "0" * 32)
        yield


@pytest.fixture
def made(tmp_path: Path) -> SyntheticRun:
    """Trained, not evaluated."""
    return SyntheticRun(tmp_path).corpus().mining().training()


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, no_checkpoint: None) -> tuple[SyntheticRun, Manifest]:
    """Evaluated once for all tests that only look."""
    made = SyntheticRun(tmp_path_factory.mktemp("evaluated")).corpus().mining().training()
    return made, run_evaluate(made.run, made.config, load=models(made))


def models(made: SyntheticRun, **extra: Any) -> FakeModels:
    vectors = {name: made.vectors(noise) for name, noise in NOISE.items()}
    return FakeModels(vectors, made.concept_of, f"{made.run.root}/loads.txt", **extra)


def loads(made: SyntheticRun) -> set[str]:
    path = Path(made.run.root) / "loads.txt"
    return set(path.read_text().splitlines()) if path.exists() else set()


def values(made: SyntheticRun, metric: str = "hit@1") -> dict[str, float]:
    mean = next(row for row in results_table(made.run, metric) if row["dataset"] == "mean")
    return {name: arm["value"] for name, arm in mean["arms"].items()}


def test_every_arm_is_measured_and_a_rerun_loads_nothing(measured: tuple[SyntheticRun, Manifest]) -> None:
    made, manifest = measured
    assert manifest.counts["arms"] == 5 and manifest.counts["queries"] == 60
    found = values(made)
    assert list(found) == ["base", "infonce", "unime_v2", "base+reranker", "unime_v2+reranker"]
    assert found["base"] < found["unime_v2"] < found["unime_v2+reranker"]
    recall = values(made, "recall@10")
    assert recall["base"] == recall["base+reranker"] == pytest.approx(found["base+reranker"]), "it finds what is there"
    assert loads(made) == {f"embedder {name}" for name in NOISE} | {"reranker reranker"}

    again = run_evaluate(made.run, made.config, load=models(made, error="no model may be loaded"))
    assert again == manifest


def test_only_what_is_new_is_measured_again(made: SyntheticRun) -> None:
    config = made.config.model_copy(update={"embedders": {"unime_v2": made.config.embedders["unime_v2"]}})
    run_evaluate(made.run, config, load=models(made))
    (Path(made.run.root) / "loads.txt").unlink()
    trained = made.run.artifact("embedder", "unime_v2")
    trained.finish(trained.require().model_copy(update={"fingerprint": "trained anew"}))
    run_evaluate(made.run, config, load=models(made))
    assert loads(made) == {"embedder unime_v2", "reranker reranker"}


def test_values_equal_a_plain_computation(measured: tuple[SyntheticRun, Manifest]) -> None:
    made, _ = measured
    vectors = made.vectors(NOISE["infonce"])
    pools = made.run.artifact("pools").read().to_pylist()
    for row in results_table(made.run):
        if row["dataset"] == "mean":
            continue
        pool = [vectors[one["item_id"]] for one in pools if one["dataset"] == row["dataset"]]
        hits = []
        for qrel in made.run.artifact("qrels").read().to_pylist():
            if qrel["dataset"] == row["dataset"]:
                scores = np.stack(pool) @ vectors[qrel["query_id"]]
                own = vectors[qrel["item_id"]] @ vectors[qrel["query_id"]]
                hits.append((scores > own + 1e-6).sum() == 0)
        assert row["arms"]["infonce"]["value"] == pytest.approx(np.mean(hits))


def test_an_item_without_a_vector_is_never_found(made: SyntheticRun) -> None:
    qrel = next(row for row in made.run.artifact("qrels").read().to_pylist() if row["split"] == "test")
    config = made.config.model_copy(update={"embedders": {}, "rerankers": {}})
    manifest = run_evaluate(made.run, config, load=models(made, broken=qrel["item_id"]))
    assert manifest.counts["arms"] == 1
    rows = {row["query_id"]: row for row in made.run.artifact("evaluations", "base").read().to_pylist()}
    assert rows[qrel["query_id"]]["gold_ranks"] == [30], "last of its pool"
    assert made.run.artifact("evaluations", "base").require().counts["failed"] == 1


def test_errors_of_an_actor_keep_their_class(made: SyntheticRun) -> None:
    with pytest.raises(ModelError, match="^no Yes token$"):
        run_evaluate(made.run, made.config, load=models(made, error="no Yes token"))
    with pytest.raises(ConfigError, match="no arm named 'unime_v3'; did you mean 'unime_v2'"):
        run_evaluate(made.run, made.config, name="unime_v3")


def test_an_untrained_arm_is_named_before_anything_is_loaded(made: SyntheticRun) -> None:
    shutil.rmtree(made.run.artifact("embedder", "unime_v2").uri)
    with pytest.raises(ArtifactError, match="embedder/unime_v2"):
        run_evaluate(made.run, made.config, load=models(made))
    assert loads(made) == set()


def test_too_many_queries_without_a_positive_stop_it(made: SyntheticRun) -> None:
    pools = [row for row in made.run.artifact("pools").read().to_pylist() if row["dataset"] != "t2i_new"]
    made.write("pools", pools, schemas.POOLS, stage="ingest")
    qrels = made.run.artifact("qrels").read().to_pylist()
    lost = min(row["query_id"] for row in qrels if row["dataset"] == "t2i_new")
    pools.append({"dataset": "t2i_new", "split": "test", "item_id": pools[0]["item_id"]})
    made.write("pools", pools, schemas.POOLS, stage="ingest")
    with pytest.raises(EvaluationError, match=f"30 of 60 test queries.*{lost.hex()}"):
        run_evaluate(made.run, made.config, load=models(made))


def test_results_and_report_follow(measured: tuple[SyntheticRun, Manifest], capsys: pytest.CaptureFixture[str]) -> None:
    made, _ = measured
    render_results(made.run, Console(width=120))
    shown = capsys.readouterr().out
    assert "before" in shown and "reranked" in shown and "unime_v2 + reranker" in shown
    assert run_report(made.run, made.config).counts["queries_shown"] > 0


def test_the_synthetic_run_is_what_evaluate_writes(measured: tuple[SyntheticRun, Manifest], tmp_path: Path) -> None:
    """Keeps the fixture that the report is tested against honest."""
    made, _ = measured
    fake = full_run(tmp_path / "fake")
    for key in ("metrics", "evaluations/base"):
        table, _, name = key.partition("/")
        real, copy = (run.artifact(table, name or None) for run in (made.run, fake.run))
        assert real.read().schema == copy.read().schema
    names = {path.name for path in Path(made.run.artifact("metrics").uri).iterdir()}
    assert {"differences.json", "arms.json", "judges.json", "per_query.parquet"} < names
