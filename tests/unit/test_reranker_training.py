"""What the reranker learns is what it is asked later: same prompts, text included, and the joint loss by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.scene import SECTION, job_of, stepper_of
from unime_ray.config import RerankerConfig
from unime_ray.corpus.payload import PayloadStore
from unime_ray.models.reranker import Reranker
from unime_ray.train import reranker_objective, worker
from unime_ray.train.collate import Packed

SHARED = {"lora", "steps", "batch_queries", "micro_batch_queries", "learning_rate"}


class Step:
    """The first step of a reranker's training, with what inference says of the same tasks."""

    def __init__(self, root: Path, **changes: Any) -> None:
        section = {name: value for name, value in SECTION.items() if name in SHARED} | {"max_list_length": 4}
        config = RerankerConfig.model_validate(section | changes)
        job = job_of(root, config)
        self.setting = worker.prepare(job, config, torch.device("cpu"))
        objective = reranker_objective.make_objective(self.setting)
        self.stepper = stepper_of(objective, config)
        self.stepper.module.eval()
        batch = objective.load(0, 0, 1)
        self.micros = batch.micro_batches
        self.losses = objective.backward(self.stepper, batch).losses_B.tolist()
        self.tasks = [task for micro in self.micros for task in micro.tasks]
        self.payload, self.reranker = PayloadStore(job.images_uri, job.items_uri), Reranker(self.setting.backbone)

    def pair_and_list(self, task: reranker_objective.RankingTask) -> tuple[float, float]:
        """L_pair (Eq. 5) and L_list (Eq. 6) of one task."""
        query, hardest, *shown = self.payload.items(task.ids)
        right, wrong = self.reranker.pointwise_scores(query, [shown[task.gold], hardest])
        logits = self.reranker.listwise_logits(query, shown)
        listwise = float(np.log(np.exp(logits).sum()) - logits[task.gold])
        return float(-np.log(right) - np.log1p(-wrong)), listwise


def test_the_joint_loss_is_what_inference_says_of_the_same_tasks(scene):
    step = Step(scene)
    assert len({len(task.list_ids) for task in step.tasks}) > 1
    for loss, task in zip(step.losses, step.tasks, strict=True):
        assert loss == pytest.approx(sum(step.pair_and_list(task)), rel=1e-4)


def test_each_part_has_its_weight(scene):
    step = Step(scene, pairwise_weight=0.25, listwise_weight=3.0)
    for loss, task in zip(step.losses, step.tasks, strict=True):
        pair, listwise = step.pair_and_list(task)
        assert loss == pytest.approx(0.25 * pair + 3.0 * listwise, rel=1e-4)


def texts_of(packed: Packed, tokenizer: Any) -> list[str]:
    rows = [
        ids[mask.bool()]
        for batch in packed.batches
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]
    return [tokenizer.decode(rows[place]) for place in packed.place]


def test_prompts_hold_the_text_of_query_and_candidates(scene):
    step = Step(scene)
    tokenizer = step.setting.backbone.tokens.tokenizer
    for micro in step.micros:
        pairs, lists = texts_of(micro.pairs, tokenizer), texts_of(micro.lists, tokenizer)
        for number, task in enumerate(micro.tasks):
            query, hardest, *shown = step.payload.items(task.ids)
            for prompt, items in (
                (pairs[number], [query, shown[task.gold]]),
                (pairs[len(micro.tasks) + number], [query, hardest]),
                (lists[number], [query, *shown]),
            ):
                assert all(item.text is None or item.text in prompt for item in items)
                assert prompt.count("<|vision_start|>") == sum(item.image is not None for item in items)
            assert f"({len(shown)})" in lists[number] and f"({len(shown) + 1})" not in lists[number]
