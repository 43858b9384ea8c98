"""The embedder's objective: from a step's rows to the gradient of its loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from unime_ray import losses
from unime_ray.config import EmbedderConfig
from unime_ray.models.backbone import Backbone
from unime_ray.models.embedder import embed_batch
from unime_ray.train.collate import (
    InBatch,
    MicroBatch,
    Packed,
    SegmentStore,
    StepBatch,
    embedder_micro_batch,
    filler,
    in_batch_info,
    split,
)
from unime_ray.train.data import BatchOrder, Examples
from unime_ray.train.embedder_loss import Embedded, embedder_loss
from unime_ray.train.loop import StepLoss, Stepper
from unime_ray.train.worker import Setting


class EmbeddingModule(nn.Module):
    """Packed rows as unit vectors (U, D) float32, in packed order."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.model = backbone.model
        self._backbone = (backbone,)  # in a tuple, so that it is no submodule

    def forward(self, inputs: Packed) -> Tensor:
        with self._backbone[0].sharing_pictures():
            return torch.cat([embed_batch(self._backbone[0], batch) for batch in inputs.batches])


class EmbeddingObjective(ABC):
    """Whatever is embedded: the gradient of the loss that `EmbedderConfig.loss` names, carried into the weights."""

    def __init__(self, backbone: Backbone, order: BatchOrder, config: EmbedderConfig) -> None:
        self.backbone, self.order, self.config = backbone, order, config
        self.module = EmbeddingModule(backbone)
        self.filler = filler(backbone)

    @abstractmethod
    def load(self, step: int, rank: int, world: int) -> StepBatch[MicroBatch]:
        """This rank's part of a step."""

    @abstractmethod
    def empty(self) -> MicroBatch:
        """A micro-batch without queries."""

    @abstractmethod
    def _in_batch_loss(self, embeddings: Sequence[Tensor], batch: StepBatch[MicroBatch]) -> Tensor:
        """Loss of this rank's queries (B,) against the candidates of all ranks."""

    def backward(self, stepper: Stepper, batch: StepBatch[MicroBatch]) -> StepLoss:
        """One backward pass per micro-batch. A loss with in-batch negatives needs the embeddings of the whole batch
        first: it is then taken through them (gradient caching), for one more forward pass."""
        found = (self._per_query if self.config.is_per_query else self._in_batch)(stepper, batch)
        return StepLoss(
            losses_B=found.detach(),
            query_ids=[example.query_id for micro in batch.micro_batches for example in micro.examples],
            num_items=sum(micro.num_items for micro in batch.micro_batches),
            num_tokens=sum(micro.num_tokens for micro in batch.micro_batches),
        )

    def _per_query(self, stepper: Stepper, batch: StepBatch[MicroBatch]) -> Tensor:
        found: list[Tensor] = []

        def part(micro: MicroBatch) -> Tensor:
            queries_BD, own_BKD = _pick(stepper.model(micro.inputs), micro)
            loss_B = embedder_loss(self.config, Embedded(queries_BD, own_BKD, micro.scores_BK))
            found.append(loss_B.detach())
            return loss_B.sum()

        stepper.backward_parts([partial(part, micro) for micro in batch.micro_batches], batch)
        return torch.cat(found)

    def _in_batch(self, stepper: Stepper, batch: StepBatch[MicroBatch]) -> Tensor:
        """Embed all, take the loss's gradient at the embeddings, then carry it into the weights part by part.

        A single micro-batch keeps its graph; several are embedded once more. Up to the embeddings nothing is scaled,
        since `gather_rows` adds up what all ranks send back, whether they have one part or several.
        """
        alone = len(batch.micro_batches) == 1
        if self.backbone.trains_vision:
            self.backbone.forget_features()  # without gradients they would come from the cache, of older weights
        embedded = []
        for number, micro in enumerate(batch.micro_batches):
            stepper.seed(batch.step, number)
            with nullcontext() if alone else torch.no_grad():
                embedded.append(stepper.model(micro.inputs))
        leaves = [rows_UD.detach().requires_grad_() for rows_UD in embedded]
        loss_B = self._in_batch_loss(leaves, batch)
        loss_B.sum().backward()

        def part(number: int) -> Tensor:
            rows_UD = embedded[0] if alone else stepper.model(batch.micro_batches[number].inputs)
            return (rows_UD * leaves[number].grad).sum()

        stepper.backward_parts([partial(part, number) for number in range(len(leaves))], batch)
        return loss_B


class EmbedderObjective(EmbeddingObjective):
    """Queries with their positives and hard negatives."""

    def __init__(
        self, backbone: Backbone, examples: Examples, order: BatchOrder, store: SegmentStore, config: EmbedderConfig
    ) -> None:
        super().__init__(backbone, order, config)
        self.examples, self.store = examples, store

    def load(self, step: int, rank: int, world: int) -> StepBatch[MicroBatch]:
        """This rank's queries of a step; for in-batch losses also who stands in the whole batch."""
        config, batch = self.config, self.order.batch_rows(step)
        examples = [self.examples[int(row)] for row in self.order.rank_rows(step, rank, world)]
        micro_batches = tuple(
            embedder_micro_batch(part, config.num_negatives, self.store, self.backbone)
            for part in split(examples, config.micro_batch_queries)
        )
        in_batch = None
        if not config.is_per_query:
            in_batch = in_batch_info(batch, rank, world, self.examples, config.num_negatives, self.backbone.device)
        return StepBatch(step, len(batch), micro_batches, in_batch)

    def empty(self) -> MicroBatch:
        return embedder_micro_batch([], self.config.num_negatives, self.store, self.backbone)

    def _in_batch_loss(self, embeddings: Sequence[Tensor], batch: StepBatch[MicroBatch]) -> Tensor:
        picked = [_pick(rows_UD, micro) for rows_UD, micro in zip(embeddings, batch.micro_batches, strict=True)]
        queries_BD, own_BKD = torch.cat([queries for queries, _ in picked]), torch.cat([own for _, own in picked])
        known = batch.in_batch
        assert isinstance(known, InBatch)
        candidates_MD = losses.gather_rows(own_BKD.flatten(0, 1), list(known.rows_per_rank))
        scores_BK = torch.cat([micro.scores_BK for micro in batch.micro_batches])
        return embedder_loss(self.config, Embedded(queries_BD, own_BKD, scores_BK, candidates_MD, known))


def _pick(rows_UD: Tensor, micro: MicroBatch) -> tuple[Tensor, Tensor]:
    """Distinct items' vectors -> queries (B, D) and their own candidates (B, K, D)."""
    return rows_UD[micro.query_B], rows_UD[micro.candidate_BK]


def make_objective(setting: Setting) -> EmbedderObjective:
    config = setting.config
    assert isinstance(config, EmbedderConfig)
    assert isinstance(setting.examples, Examples)
    return EmbedderObjective(setting.backbone, setting.examples, setting.order, setting.store, config)
