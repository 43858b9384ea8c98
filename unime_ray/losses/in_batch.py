"""Losses with in-batch negatives: a query against the candidates of the whole batch, all ranks' (see `gather_rows`).

Shapes: B queries, M candidates of the whole batch, K = 1 + k candidates of a query (column 0 is the positive),
D embedding width, P known positives of a query (padded).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from unime_ray.losses.judged import cosines, judge_kl, wide

PADDING_KEY = -1
"""Fills up the rows of `known_BP`; no candidate has this key."""
NEVER = float("-inf")


def in_batch_mask(candidate_keys_M: Tensor, known_BP: Tensor, targets_B: Tensor) -> Tensor:
    """Which candidates may stand in a query's InfoNCE denominator, bool (B, M).

    Out go all candidates that are known positives of the query (its own among them, at other places than
    `targets_B`) and every occurrence of a candidate but its first, since a batch repeats items. Published code of
    VLM2Vec and UniME V1 keeps both.

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
    logits_BM = wide(queries_BD) @ wide(candidates_MD).T / temperature
    if allowed_BM is not None:
        logits_BM = logits_BM.masked_fill(~allowed_BM, NEVER)
    return functional.cross_entropy(logits_BM, targets_B, reduction="none")


def hardness_infonce(
    queries_BD: Tensor,
    candidates_MD: Tensor,
    targets_B: Tensor,
    temperature: float,
    hardness: float,
    allowed_BM: Tensor | None = None,
) -> Tensor:
    """Hardness-weighted InfoNCE (after LLaVE, arXiv 2503.04812), shape (B,):

        -log( e^(cos(q,c+)/tau) / (e^(cos(q,c+)/tau) + sum_c w_c e^(cos(q,c)/tau)) ),  w_c = e^(hardness cos(q,c))

    No gradient flows through the weights; hardness 0 is `infonce`. Arguments as there.
    """
    similarities_BM = wide(queries_BD) @ wide(candidates_MD).T
    log_weights_BM = (hardness * similarities_BM.detach()).scatter(1, targets_B[:, None], 0.0)
    logits_BM = similarities_BM / temperature + log_weights_BM
    if allowed_BM is not None:
        logits_BM = logits_BM.masked_fill(~allowed_BM, NEVER)
    return functional.cross_entropy(logits_BM, targets_B, reduction="none")


def unime_v1(
    queries_BD: Tensor,
    candidates_MD: Tensor,
    targets_B: Tensor,
    temperature: float,
    *,
    top_k: int = 8,
    margin: float = 0.1,
    allowed_BM: Tensor | None = None,
) -> Tensor:
    """UniME V1's second stage, Eqs. 3, 4: InfoNCE over {c+, the batch's `top_k` hardest negatives}, shape (B,).

    Likely false negatives (`false_negative_mask`) go first, then the `top_k` most similar of the rest are taken;
    fewer than that are repeated in turn until there are `top_k`, and so weigh more. A query with none left has
    loss 0. What is chosen is decided on values, without gradient. Other arguments as for `infonce`: as published
    without `allowed_BM`, with it known positives and repeated items are no negatives either.
    """
    similarities_BM = wide(queries_BD) @ wide(candidates_MD).T
    with torch.no_grad():
        out_BM = false_negative_mask(similarities_BM, targets_B, margin).scatter(1, targets_B[:, None], True)
        if allowed_BM is not None:
            out_BM |= ~allowed_BM
        left_B1 = (~out_BM).sum(1, keepdim=True)
        ranked_BM = similarities_BM.masked_fill(out_BM, NEVER).argsort(dim=1, descending=True, stable=True)
        slots_BK = torch.arange(top_k, device=left_B1.device)[None, :] % left_B1.clamp(min=1)
        chosen_BK = ranked_BM.gather(1, slots_BK)
    positives_B1 = similarities_BM.gather(1, targets_B[:, None])
    negatives_BK = similarities_BM.gather(1, chosen_BK).masked_fill(left_B1 == 0, NEVER)
    logits_BK = torch.cat([positives_B1, negatives_BK], dim=1) / temperature
    return -functional.log_softmax(logits_BK, dim=1)[:, 0]


def hybrid(
    queries_BD: Tensor,
    own_BKD: Tensor,
    judge_targets_BK: Tensor,
    candidates_MD: Tensor,
    targets_B: Tensor,
    allowed_BM: Tensor,
    *,
    temperature: float,
    judge_temperature: float,
    infonce_weight: float,
    margin: float | None = 0.1,
) -> Tensor:
    """`judge_kl` over a query's own candidates + weight x `infonce` over positives and hard negatives of the batch.

    The InfoNCE part leaves out known positives and repeats (`allowed_BM`) and likely false negatives, decided on
    values without gradient (`false_negative_mask`; margin None: no such rule). Shape (B,). No paper has this loss:
    it is the sum of UniME-V2's and VLM2Vec's with UniME V1's mask.
    """
    if margin is not None:
        with torch.no_grad():
            similarities_BM = wide(queries_BD) @ wide(candidates_MD).T
            allowed_BM = allowed_BM & ~false_negative_mask(similarities_BM, targets_B, margin)
    aligned = judge_kl(cosines(queries_BD, own_BKD), judge_targets_BK, temperature, judge_temperature)
    return aligned + infonce_weight * infonce(queries_BD, candidates_MD, targets_B, temperature, allowed_BM)
