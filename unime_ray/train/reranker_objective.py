"""The reranker's objective: Yes/No pairs and lists in one loss (UniME-V2-Reranker, Eqs. 5 and 6), text included.

Published code loses the text in training and puts c+ near the front of the list; here text stays and the slot is
uniform (`gold_position: published` for parity).

Shapes: B queries of a micro-batch, L slots of the longest list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from unime_ray import losses
from unime_ray.config import RerankerConfig
from unime_ray.errors import RejectedRow, TrainingError
from unime_ray.ids import show
from unime_ray.models.backbone import Backbone
from unime_ray.models.prompt_ids import PromptIds, check_length
from unime_ray.models.tokens import Segment
from unime_ray.train.collate import Content, Packed, StepBatch, filler, pack, split
from unime_ray.train.data import Example, Examples
from unime_ray.train.loop import StepLoss, Stepper
from unime_ray.train.worker import Setting

PUBLISHED_SLOTS = (0.32, 0.32, 0.20, 0.11, 0.05)
"""Where the published training data has c+ in its lists of six; never in the last slot."""


@dataclass(frozen=True)
class RankingTask:
    """What one query is asked: is c+ right, is the hardest negative wrong, which entry of the list is c+."""

    example: Example
    hardest_id: bytes
    list_ids: tuple[bytes, ...]
    gold: int
    """Slot of c+ in `list_ids`, from 0."""

    @property
    def ids(self) -> tuple[bytes, ...]:
        return (self.example.query_id, self.hardest_id, *self.list_ids)


@dataclass(frozen=True)
class RankingBatch:
    """A micro-batch of tasks as prompts: `pairs` has the B positives, then the B hardest negatives."""

    pairs: Packed
    lists: Packed
    gold_B: Tensor
    lengths_B: Tensor
    tasks: tuple[RankingTask, ...]

    @property
    def packs(self) -> tuple[Packed, ...]:
        return (self.pairs, self.lists)

    def with_packs(self, pairs: Packed, lists: Packed) -> RankingBatch:
        return replace(self, pairs=pairs, lists=lists)


def ranking_task(example: Example, step: int, config: RerankerConfig) -> RankingTask:
    """Sample the list of one query; the draw depends on seed, step and row alone.

    The list holds c+ and the top x of the negatives by judge score, x + 1 uniform in 2..max_list_length (less where
    there are fewer distinct negatives), the negatives in that order with c+ inserted at a random slot.
    """
    rng = np.random.default_rng([config.seed, step, example.row])
    scored = dict(zip(example.negative_ids, example.negative_scores, strict=True))
    hardest = sorted(scored, key=lambda identifier: (-scored[identifier], identifier))
    shown = hardest[: int(rng.integers(2, config.max_list_length + 1)) - 1]
    slots = len(shown) + 1
    gold = int(rng.choice(slots, p=_slot_probabilities(slots, config.gold_position)))
    return RankingTask(example, hardest[0], (*shown[:gold], example.positive_id, *shown[gold:]), gold)


def _slot_probabilities(slots: int, gold_position: str) -> np.ndarray:
    if gold_position == "uniform":
        return np.full(slots, 1.0 / slots)
    weights = np.array((PUBLISHED_SLOTS + (0.0,) * slots)[:slots])
    return weights / weights.sum()


class RankingModule(nn.Module):
    """Prompts -> logits of the answers, (rows, 2) of Yes and No and (B, 10) of the list's labels."""

    def __init__(self, backbone: Backbone, prompts: PromptIds) -> None:
        super().__init__()
        self.model = backbone.model
        self._backbone, self._prompts = (backbone,), prompts  # in a tuple, so that it is no submodule

    def forward(self, pairs: Packed, lists: Packed) -> tuple[Tensor, Tensor]:
        yes_no = [self._prompts.yes_id, self._prompts.no_id]
        with self._backbone[0].sharing_pictures():
            return self._logits(pairs, yes_no), self._logits(lists, self._prompts.index_ids)

    def _logits(self, rows: Packed, answers: Sequence[int]) -> Tensor:
        backbone = self._backbone[0]
        found = [backbone.answer_logits(backbone.forward_hidden(batch), answers) for batch in rows.batches]
        return torch.cat(found)[list(rows.place)]


class RerankerObjective:
    """L = pairwise_weight x L_pair + listwise_weight x L_list, the mean over the queries of the batch."""

    def __init__(self, setting: Setting, config: RerankerConfig) -> None:
        assert isinstance(setting.examples, Examples)
        self.setting, self.examples, self.config = setting, setting.examples, config
        self.prompts = PromptIds(setting.backbone.tokens)
        self.module = RankingModule(setting.backbone, self.prompts)
        self.filler = filler(setting.backbone)

    def load(self, step: int, rank: int, world: int) -> StepBatch[RankingBatch]:
        setting, config = self.setting, self.config
        rows = setting.order.rank_rows(step, rank, world)
        tasks = [ranking_task(self.examples[int(row)], step, config) for row in rows]
        parts = tuple(self._batch(part) for part in split(tasks, config.micro_batch_queries))
        return StepBatch(step, setting.order.batch_size, parts)

    def empty(self) -> RankingBatch:
        """A micro-batch without queries."""
        return self._batch([])

    def backward(self, stepper: Stepper, batch: StepBatch[RankingBatch]) -> StepLoss:
        found: list[Tensor] = []

        def part(micro: RankingBatch) -> Tensor:
            loss_B = self._loss(stepper, micro)
            found.append(loss_B.detach())
            return loss_B.sum()

        stepper.backward_parts([partial(part, micro) for micro in batch.micro_batches], batch)
        inputs = [rows for micro in batch.micro_batches for rows in (micro.pairs, micro.lists)]
        return StepLoss(
            losses_B=torch.cat(found),
            query_ids=[task.example.query_id for micro in batch.micro_batches for task in micro.tasks],
            num_items=sum(len(rows) for rows in inputs),
            num_tokens=sum(rows.num_tokens for rows in inputs),
        )

    def _loss(self, stepper: Stepper, micro: RankingBatch) -> Tensor:
        pairs_R2, lists_BL = stepper.model(micro.pairs, micro.lists)
        count = len(micro.tasks)
        is_yes_R = torch.arange(2 * count, device=pairs_R2.device) < count
        pair_R = losses.yes_no_loss(pairs_R2[:, 0], pairs_R2[:, 1], is_yes_R)
        list_B = losses.listwise_loss(lists_BL, micro.gold_B, micro.lengths_B)
        return self.config.pairwise_weight * (pair_R[:count] + pair_R[count:]) + self.config.listwise_weight * list_B

    def _batch(self, tasks: Sequence[RankingTask]) -> RankingBatch:
        backbone = self.setting.backbone
        contents = self.setting.store.contents([identifier for task in tasks for identifier in task.ids])
        pairs = [self._pair(task.example, task.example.positive_id, contents) for task in tasks]
        pairs += [self._pair(task.example, task.hardest_id, contents) for task in tasks]
        return RankingBatch(
            pairs=pack(pairs, backbone),
            lists=pack([self._list(task, contents) for task in tasks], backbone),
            gold_B=torch.tensor([task.gold for task in tasks], dtype=torch.long, device=backbone.device),
            lengths_B=torch.tensor([len(task.list_ids) for task in tasks], dtype=torch.long, device=backbone.device),
            tasks=tuple(tasks),
        )

    def _pair(self, example: Example, candidate: bytes, contents: dict[bytes, Content]) -> Segment:
        (query, of_query), (text, of_candidate) = contents[example.query_id], contents[candidate]
        return self._fitting(self.prompts.build_judge_ids(query, text, (of_query, of_candidate)), example)

    def _list(self, task: RankingTask, contents: dict[bytes, Content]) -> Segment:
        query, pictures = contents[task.example.query_id]
        shown = [contents[identifier] for identifier in task.list_ids]
        all_pictures = [*pictures, *(picture for _, own in shown for picture in own)]
        return self._fitting(
            self.prompts.build_listwise_ids(query, [text for text, _ in shown], all_pictures), task.example
        )

    def _fitting(self, prompt: Segment, example: Example) -> Segment:
        too_long: RejectedRow | None = check_length([len(prompt)], self.setting.backbone.max_tokens)
        if too_long is not None:
            query = show(example.query_id)
            raise TrainingError(f"query {query}: {too_long.reason}; lower max_list_length or pixels.max_pixels")
        return prompt


def make_objective(setting: Setting) -> RerankerObjective:
    config = setting.config
    assert isinstance(config, RerankerConfig)
    return RerankerObjective(setting, config)
