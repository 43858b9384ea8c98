"""The reranker's two losses. Shapes: B prompts, L entries of a list."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from unime_ray.losses.judged import wide


def yes_no_loss(yes_B: Tensor, no_B: Tensor, is_yes_B: Tensor) -> Tensor:
    """Reranker, pairwise part (Eq. 5): cross-entropy over the two logits {Yes, No}, shape (B,).

    Over the two answers only, as the score sigma reads them, not over the vocabulary.
    """
    margins_B = wide(yes_B) - wide(no_B)
    return functional.binary_cross_entropy_with_logits(margins_B, is_yes_B.to(margins_B.dtype), reduction="none")


def listwise_loss(logits_BL: Tensor, gold_B: Tensor, lengths_B: Tensor) -> Tensor:
    """Reranker, listwise part (Eq. 6): cross-entropy over the index tokens of the list, shape (B,).

    Args:
        logits_BL: logits of the index tokens (1)..(L). gold_B: slot of c+, from 0. lengths_B: entries of each list;
            logits past them are ignored.
    """
    slots = torch.arange(logits_BL.shape[1], device=logits_BL.device)
    shown_BL = slots[None, :] < lengths_B[:, None]
    return functional.cross_entropy(wide(logits_BL).masked_fill(~shown_BL, float("-inf")), gold_B, reduction="none")
