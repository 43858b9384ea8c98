"""UniME V1's first stage: texts embedded under its prompt, and the distillation from a teacher's vectors.

Only the language model can learn from texts; the vision tower and its projector stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unime_ray import losses
from unime_ray.config import EmbedderConfig
from unime_ray.errors import RejectedRow, TrainingError
from unime_ray.ids import show
from unime_ray.models.backbone import Backbone
from unime_ray.prompts import SUMMARY_PROMPT
from unime_ray.train.collate import MicroBatch, StepBatch, TeacherBatch, pack, split
from unime_ray.train.data import BatchOrder
from unime_ray.train.embedder_loss import check_widths
from unime_ray.train.embedder_objective import EmbeddingObjective
from unime_ray.train.text_data import TextExample, TextExamples
from unime_ray.train.worker import Setting


@dataclass(frozen=True)
class Prompted:
    """A text under the prompt, as an item without a picture."""

    item_id: bytes
    rendered: str
    text: str | None = None
    image_id: bytes | None = None
    image: bytes | None = None


class DistillObjective(EmbeddingObjective):
    """Texts whose similarities to each other are to be the teacher's."""

    def __init__(self, backbone: Backbone, texts: TextExamples, order: BatchOrder, config: EmbedderConfig) -> None:
        super().__init__(backbone, order, config)
        self.texts = texts

    def load(self, step: int, rank: int, world: int) -> StepBatch[MicroBatch]:
        """This rank's texts of a step, and the teacher's vectors of all ranks' texts."""
        batch = self.order.batch_rows(step)
        parts = [[self.texts[int(row)] for row in batch[other::world]] for other in range(world)]
        micro_batches = tuple(self._micro_batch(part) for part in split(parts[rank], self.config.micro_batch_queries))
        return StepBatch(step, len(batch), micro_batches, teacher_batch(parts, rank, self.backbone.device))

    def empty(self) -> MicroBatch:
        return self._micro_batch([])

    def _micro_batch(self, texts: Sequence[TextExample]) -> MicroBatch:
        prompted = [Prompted(text.query_id, f"{text.text} {SUMMARY_PROMPT}") for text in texts]
        segments = []
        for text, segment in zip(prompted, self.backbone.segments(prompted), strict=True):
            if isinstance(segment, RejectedRow):
                reason = f"text {show(text.item_id)} cannot be trained on: {segment.reason}"
                raise TrainingError(f"{reason}; leave it out of the teacher's texts")
            segments.append(segment)
        inputs, device = pack(segments, self.backbone), self.backbone.device
        return MicroBatch(
            inputs=inputs,
            query_B=torch.tensor(inputs.place, dtype=torch.long, device=device),
            candidate_BK=torch.zeros(len(texts), 0, dtype=torch.long, device=device),
            scores_BK=torch.zeros(len(texts), 0, device=device),
            examples=tuple(texts),
        )

    def _in_batch_loss(self, embeddings: Sequence[Tensor], batch: StepBatch[MicroBatch]) -> Tensor:
        teacher, config = batch.in_batch, self.config
        assert isinstance(teacher, TeacherBatch)
        rows = [rows_UD[micro.query_B] for rows_UD, micro in zip(embeddings, batch.micro_batches, strict=True)]
        own_BD = torch.cat(rows)
        all_MD = losses.gather_rows(own_BD, list(teacher.rows_per_rank))

        def loss(students_BD: Tensor, all_students_MD: Tensor) -> Tensor:
            return losses.text_distill(
                students_BD,
                all_students_MD,
                teacher.vectors_MT[teacher.own_B],
                teacher.vectors_MT,
                teacher.own_B,
                temperature=config.temperature,
                teacher_temperature=config.teacher_temperature or config.temperature,
                include_self=config.include_self,
            )

        if not config.matryoshka_dims:
            return loss(own_BD, all_MD)
        check_widths(config, own_BD.shape[-1])
        return losses.matryoshka(loss, [own_BD, all_MD], config.matryoshka_dims, config.matryoshka_weights)


def teacher_batch(parts: Sequence[Sequence[TextExample]], rank: int, device: torch.device) -> TeacherBatch:
    """The teacher's side of a global batch, whose texts stand rank after rank."""
    vectors_MT = np.stack([text.vector_T for part in parts for text in part])
    offset = sum(len(part) for part in parts[:rank])
    return TeacherBatch(
        vectors_MT=torch.from_numpy(vectors_MT).to(device),
        own_B=offset + torch.arange(len(parts[rank]), device=device),
        rows_per_rank=tuple(len(part) for part in parts),
    )


def make_objective(setting: Setting) -> DistillObjective:
    config = setting.config
    assert isinstance(config, EmbedderConfig)
    assert isinstance(setting.examples, TextExamples)
    return DistillObjective(setting.backbone, setting.examples, setting.order, config)
