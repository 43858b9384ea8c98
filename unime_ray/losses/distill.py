"""UniME V1's first stage: a language model learns a sentence embedder's geometry, from texts alone.

Shapes: B texts of this rank, M of the whole batch, D student's and T teacher's width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from unime_ray.losses.judged import wide

NEVER = -1e30
"""Finite, so that a batch of one text, with nothing but itself to compare, has loss 0."""


def text_distill(
    students_BD: Tensor,
    all_students_MD: Tensor,
    teachers_BT: Tensor,
    all_teachers_MT: Tensor,
    own_B: Tensor,
    *,
    temperature: float,
    teacher_temperature: float,
    include_self: bool = True,
) -> Tensor:
    """Textual discriminative knowledge distillation (UniME V1, Eq. 2), shape (B,):

        KL( softmax_j(e_t,j . e_t,i / teacher_temperature) || softmax_j(e_s,j . e_s,i / temperature) )

    over all texts j of the batch. All embeddings have unit norm; widths of student and teacher may differ.

    Args:
        own_B: place of each text in the batch. include_self: whether j = i takes part, as published. A text's cosine
            with itself is 1, so at a small temperature both distributions are all but one-hot there and say little
            of the other texts; without it the whole target is about them.
    """
    student_BM = wide(students_BD) @ wide(all_students_MD).T / temperature
    teacher_BM = wide(teachers_BT) @ wide(all_teachers_MT).T / teacher_temperature
    own_BM = torch.zeros_like(student_BM, dtype=torch.bool).scatter(1, own_B[:, None], not include_self)
    log_s = functional.log_softmax(student_BM.masked_fill(own_BM, NEVER), dim=-1)
    log_t = functional.log_softmax(teacher_BM.masked_fill(own_BM, NEVER), dim=-1)
    return (log_t.exp() * (log_t - log_s).masked_fill(own_BM, 0.0)).sum(-1)
