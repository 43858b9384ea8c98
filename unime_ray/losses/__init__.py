"""The losses of the method: pure functions of tensors, one value per query.

Every loss returns one number per query, so that the caller forms the mean over the queries of the *global* batch
however they are spread over micro-batches and ranks. Losses with in-batch negatives need the candidates of all
ranks: see `gather_rows`. All arithmetic is float32 or wider, in log space.

judged      a query and its own candidates: judge_kl (UniME-V2), hard_negative_ce, margin_mse
in_batch    all candidates of a batch: infonce (VLM2Vec), hardness_infonce, unime_v1 (its stage 2), hybrid
distill     text_distill (UniME V1, stage 1)
matryoshka  any of these on the first dimensions of the embeddings too
reranking   yes_no_loss and listwise_loss (UniME-V2-Reranker)

Shapes: B queries, K = 1 + k candidates of a query (column 0 is the positive), M candidates of the whole batch,
D embedding width, L entries of a list, P known positives of a query (padded).
"""

from __future__ import annotations

from unime_ray.losses.distill import text_distill
from unime_ray.losses.gather import gather_rows
from unime_ray.losses.in_batch import (
    PADDING_KEY,
    false_negative_mask,
    hardness_infonce,
    hybrid,
    in_batch_mask,
    infonce,
    unime_v1,
)
from unime_ray.losses.judged import cosines, hard_negative_ce, judge_kl, margin_mse, score_logits
from unime_ray.losses.matryoshka import matryoshka
from unime_ray.losses.reranking import listwise_loss, yes_no_loss

__all__ = [
    "PADDING_KEY",
    "cosines",
    "false_negative_mask",
    "gather_rows",
    "hard_negative_ce",
    "hardness_infonce",
    "hybrid",
    "in_batch_mask",
    "infonce",
    "judge_kl",
    "listwise_loss",
    "margin_mse",
    "matryoshka",
    "score_logits",
    "text_distill",
    "unime_v1",
    "yes_no_loss",
]
