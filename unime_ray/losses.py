"""The losses of the method: pure functions of tensors, one value per query.

Every loss returns one number per query, so that the caller forms the mean over the queries of the *global* batch
however they are spread over micro-batches and ranks. Losses with in-batch negatives need the candidates of all
ranks: see `gather_rows`. All arithmetic is float32 or wider, in log space.

Shapes: B queries, K = 1 + k candidates of a query (column 0 is the positive), M candidates of the whole batch,
D embedding width, L entries of a list, P known positives of a query (padded).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

PADDING_KEY = -1
"""Fills up the rows of `known_BP`; no candidate has this key."""


def _wide(x: Tensor) -> Tensor:
    """At least float32: bfloat16 cosines divided by tau 0.02 would be off by 0.2."""
    return x if x.dtype == torch.float64 else x.float()


def judge_kl(similarities_BK: Tensor, scores_BK: Tensor, temperature: float, judge_temperature: float) -> Tensor:
    """UniME-V2's judge-aligned loss, Eqs. 2-4: 1/2 (KL(P||Q) + KL(Q||P)) per query, shape (B,).

    P = softmax(similarities / temperature) over {c+, c-_1..k} (Eq. 2), similarities are cosines in [-1, 1];
    Q = softmax(scores / judge_temperature), judge scores in [0, 1] (Eq. 3). The paper calls Eq. 4 a JS-divergence; it
    is the symmetrised KL. The published code adds 1e-8 inside the logarithms, which bounds each log at -18.4 and
    bends the gradient wherever a probability is near 1e-8; log-softmax needs no such guard.
    """
    log_p = functional.log_softmax(_wide(similarities_BK) / temperature, dim=-1)
    log_q = functional.log_softmax(_wide(scores_BK) / judge_temperature, dim=-1)
    difference = log_p - log_q
    return 0.5 * ((log_p.exp() - log_q.exp()) * difference).sum(-1)


def infonce(
    queries_BD: Tensor,
    candidates_MD: Tensor,
    targets_B: Tensor,
    temperature: float,
    allowed_BM: Tensor | None = None,
) -> Tensor:
    """In-batch InfoNCE (VLM2Vec): -log softmax(q . c / temperature) at the query's own positive, shape (B,).

    Args:
        queries_BD, candidates_MD: unit-norm embeddings. targets_B: index of each query's positive in the candidates.
        allowed_BM: False where a candidate must not count as a negative (None: all do); see `in_batch_mask`.
    """
    logits_BM = _wide(queries_BD) @ _wide(candidates_MD).T / temperature
    if allowed_BM is not None:
        logits_BM = logits_BM.masked_fill(~allowed_BM, float("-inf"))
    return functional.cross_entropy(logits_BM, targets_B, reduction="none")


def in_batch_mask(candidate_keys_M: Tensor, known_BP: Tensor, targets_B: Tensor) -> Tensor:
    """Which candidates may stand in a query's InfoNCE denominator, bool (B, M).

    Out go all candidates that are known positives of the query (its own among them, at other places than
    `targets_B`) and every occurrence of a candidate but its first, since a batch repeats items.

    Args:
        candidate_keys_M: integer identity of each candidate; equal keys are the same item.
        known_BP: keys of each query's known positives, padded with `PADDING_KEY`.
    """
    known_BM = (candidate_keys_M[None, :, None] == known_BP[:, None, :]).any(-1)
    same_MM = candidate_keys_M[:, None] == candidate_keys_M[None, :]
    first_M = same_MM.int().argmax(dim=1) == torch.arange(len(candidate_keys_M), device=same_MM.device)
    allowed_BM = ~known_BM & first_M[None, :]
    return allowed_BM.scatter(1, targets_B[:, None], True)


def false_negative_mask(similarities_BM: Tensor, targets_B: Tensor, margin: float) -> Tensor:
    """True where cos(q, c) > cos(q, c+) + margin: likely false negatives (UniME V1, Eq. 3, margin 0.1)."""
    positives_B1 = similarities_BM.gather(1, targets_B[:, None])
    return (similarities_BM > positives_B1 + margin).scatter(1, targets_B[:, None], False)


def hybrid(
    queries_BD: Tensor,
    own_BKD: Tensor,
    scores_BK: Tensor,
    candidates_MD: Tensor,
    targets_B: Tensor,
    allowed_BM: Tensor,
    *,
    temperature: float,
    judge_temperature: float,
    infonce_weight: float,
    margin: float = 0.1,
) -> Tensor:
    """`judge_kl` over a query's own candidates + weight x `infonce` over positives and hard negatives of the batch.

    The false-negative mask of the InfoNCE part joins known positives (`allowed_BM`) and the similarity rule of
    `false_negative_mask`, decided on values without gradient. Shape (B,).
    """
    own_BK = cosines(queries_BD, own_BKD)
    with torch.no_grad():
        likely_BM = false_negative_mask(_wide(queries_BD) @ _wide(candidates_MD).T, targets_B, margin)
    aligned = judge_kl(own_BK, scores_BK, temperature, judge_temperature)
    contrast = infonce(queries_BD, candidates_MD, targets_B, temperature, allowed_BM & ~likely_BM)
    return aligned + infonce_weight * contrast


def cosines(queries_BD: Tensor, own_BKD: Tensor) -> Tensor:
    """Cosine of each query with its own K candidates, (B, K), for unit-norm embeddings."""
    return torch.einsum("bd,bkd->bk", _wide(queries_BD), _wide(own_BKD))


def yes_no_loss(yes_B: Tensor, no_B: Tensor, is_yes_B: Tensor) -> Tensor:
    """Reranker, pairwise part (Eq. 5): cross-entropy over the two logits {Yes, No}, shape (B,).

    Over the two answers only, as the score sigma reads them, not over the vocabulary.
    """
    margins_B = _wide(yes_B) - _wide(no_B)
    return functional.binary_cross_entropy_with_logits(margins_B, is_yes_B.to(margins_B.dtype), reduction="none")


def listwise_loss(logits_BL: Tensor, gold_B: Tensor, lengths_B: Tensor) -> Tensor:
    """Reranker, listwise part (Eq. 6): cross-entropy over the index tokens of the list, shape (B,).

    Args:
        logits_BL: logits of the index tokens (1)..(L). gold_B: slot of c+, from 0. lengths_B: entries of each list;
            logits past them are ignored.
    """
    slots = torch.arange(logits_BL.shape[1], device=logits_BL.device)
    shown_BL = slots[None, :] < lengths_B[:, None]
    return functional.cross_entropy(_wide(logits_BL).masked_fill(~shown_BL, float("-inf")), gold_B, reduction="none")


class _GatherRows(torch.autograd.Function):
    """All ranks' rows in rank order; the gradient of a rank's rows is the sum over what all ranks made of them."""

    @staticmethod
    def forward(ctx, rows: Tensor, sizes: list[int]) -> Tensor:  # type: ignore[override]
        ctx.sizes = sizes
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        rank = dist.get_rank()
        start = sum(ctx.sizes[:rank])
        return gradient[start : start + ctx.sizes[rank]], None


def gather_rows(rows: Tensor, sizes: list[int] | None = None) -> Tensor:
    """Concatenate `rows` (n_r, ...) of all ranks in rank order, with gradients; itself without a process group.

    Args:
        sizes: rows of every rank, where they differ (default: all have as many as this one).
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    return _GatherRows.apply(rows, sizes or [len(rows)] * dist.get_world_size())
