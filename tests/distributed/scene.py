"""A small run to train on: pictures and texts, random hard negatives, and a tiny random checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import torch

from tests.unit.family_fixtures import save_family
from tests.unit.models_fixtures import FAMILIES, FakeItem, make_item, picture, save_checkpoint
from unime_ray.artifacts import Manifest, Run
from unime_ray.config import EmbedderConfig, LoraConfig, PixelBudget, RerankerConfig, TrainConfig
from unime_ray.schemas import HARD_NEGATIVES, IMAGES, ITEMS, teacher_schema
from unime_ray.train.data import prepare_examples
from unime_ray.train.job import TrainingJob
from unime_ray.train.text_data import prepare_texts

NUM_QUERIES = 14
NUM_NEGATIVES = 3
TEACHER_WIDTH = 12
ALL_WEIGHTS = LoraConfig(rank=0)
SECTION: dict[str, Any] = {
    "lora": {"rank": 4, "alpha": 8.0},
    "steps": 6,
    "batch_queries": 6,
    "micro_batch_queries": 3,
    "learning_rate": 1e-2,
    "num_negatives": NUM_NEGATIVES,
    "temperature": 0.2,
    "judge_temperature": 0.3,
}


def build_scene(root: Path, family: str = "qwen2_vl") -> Run:
    """Items, pictures, hard negatives of judge `judge`, and a checkpoint of `family` in `root/model`."""
    run = Run(str(root / "run"))
    queries = [make_item(f"query number {n}") for n in range(NUM_QUERIES)]
    pool = [make_item(None if n % 2 else f"thing {n}", picture(n, 32, 32)) for n in range(10)]
    pool += [make_item(f"a text about thing {n}") for n in range(6)]
    write_payload(run, [*queries, *pool])
    write_negatives(run, queries, pool)
    write_teacher(run)
    if family in FAMILIES:
        save_checkpoint(root / "model", family)
    else:
        save_family(root / "model", family)
    return run


def write_payload(run: Run, items: list[FakeItem]) -> None:
    rows = [
        {
            "item_id": item.item_id,
            "rendered": item.rendered,
            "text": item.text,
            "image_id": item.image_id,
            "source": "t",
        }
        for item in items
    ]
    pictures = {item.image_id: item.image for item in items if item.image_id is not None}
    images = [{"image_id": key, "bytes": data, "width": 32, "height": 32} for key, data in pictures.items()]
    lance.write_dataset(pa.Table.from_pylist(rows, schema=ITEMS), run.artifact("items").data_uri)
    lance.write_dataset(pa.Table.from_pylist(images, schema=IMAGES), run.artifact("images").data_uri)


def write_negatives(run: Run, queries: list[FakeItem], pool: list[FakeItem]) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for query in queries:
        chosen = rng.choice(len(pool), 1 + NUM_NEGATIVES, replace=False)
        rows.append({
            "query_id": query.item_id, "positive_id": pool[chosen[0]].item_id, "positive_score": 0.9,
            "negative_ids": [pool[index].item_id for index in chosen[1:]],
            "negative_scores": rng.random(NUM_NEGATIVES), "negative_similarities": rng.random(NUM_NEGATIVES),
            "negative_reasons": ["kept"] * NUM_NEGATIVES,
        })  # fmt: skip
    table = run.artifact("hard_negatives", "judge")
    table.write(pa.Table.from_pylist(rows, schema=HARD_NEGATIVES), HARD_NEGATIVES)
    table.finish(Manifest(table="hard_negatives", name="judge", stage="select", fingerprint="scene", rows=len(rows)))


def stepper_of(objective: Any, section: TrainConfig) -> Any:
    """A `Stepper` as a process of its own would make it: accelerate keeps the first one's precision otherwise."""
    from accelerate.state import AcceleratorState

    from unime_ray.train.loop import Stepper

    AcceleratorState._reset_state()
    return Stepper(objective, section)


def write_teacher(run: Run) -> None:
    """Texts with random vectors of teacher `teacher`."""
    vectors = np.random.default_rng(1).normal(size=(NUM_QUERIES, TEACHER_WIDTH)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    items = [make_item(f"a sentence about thing {n} " + "again " * (n % 3)) for n in range(NUM_QUERIES)]
    rows = [
        {"text_id": item.item_id, "text": item.rendered, "vector": vector}
        for item, vector in zip(items, vectors, strict=True)
    ]
    table, schema = run.artifact("teacher", "teacher"), teacher_schema(TEACHER_WIDTH)
    table.write(pa.Table.from_pylist(rows, schema=schema), schema)
    table.finish(Manifest(table="teacher", name="teacher", stage="teach", fingerprint="scene", rows=len(rows)))


def examples_of(run: Run, section: EmbedderConfig | RerankerConfig) -> str:
    if getattr(section, "teacher", None) is not None:
        return prepare_texts(run.artifact("teacher", "teacher"))
    return prepare_examples(run.artifact("hard_negatives", "judge"))


def job_of(root: Path, section: EmbedderConfig | RerankerConfig) -> TrainingJob:
    run = Run(str(root / "run"))
    return TrainingJob(
        section=section.model_dump(mode="json"),
        model=str(root / "model"),
        revision=None,
        pixels=PixelBudget(),
        examples_uri=examples_of(run, section),
        images_uri=run.artifact("images").data_uri,
        items_uri=run.artifact("items").data_uri,
        artifact_uri=run.artifact("embedder", "test").uri,
        identity={"model": "m", "config": "c"},
    )


def gradients(
    root: Path, section: EmbedderConfig | RerankerConfig, step: int = 1
) -> tuple[float, dict[str, torch.Tensor]]:
    """Global loss and gradient of one step on this process's rank, in the process group there is (or none)."""
    from unime_ray.train import distill_objective, embedder_objective, reranker_objective, worker
    from unime_ray.train.sharding import whole

    kind: Any = embedder_objective if isinstance(section, EmbedderConfig) else reranker_objective
    if getattr(section, "teacher", None) is not None:
        kind = distill_objective
    setting = worker.prepare(job_of(root, section), section, torch.device("cpu"))
    objective = kind.make_objective(setting)
    stepper = stepper_of(objective, section)
    stepper.module.train()
    batch = stepper.level(objective, objective.load(step, stepper.rank, stepper.world))
    result = objective.backward(stepper, batch)
    loss = stepper.totals([float(result.losses_B.sum())])[0] / batch.batch_size
    named = stepper.module.named_parameters()
    return loss, {name: whole(weight.grad).clone() for name, weight in named if weight.grad is not None}
