"""Losses of a query and its own candidates: c+ in column 0, hard negatives after it. No other query takes part, so
ranks exchange nothing but gradients.

Shapes: B queries, K = 1 + k candidates of a query, D embedding width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

MAX_LOGIT = 12.0
"""Scores within sigmoid(-12) = 6e-6 of 0 or 1 count as that close: float32 tells them apart no better."""


def wide(x: Tensor) -> Tensor:
    """At least float32: bfloat16 cosines divided by tau 0.02 would be off by 0.2."""
    return x if x.dtype == torch.float64 else x.float()


def cosines(queries_BD: Tensor, own_BKD: Tensor) -> Tensor:
    """Cosine of each query with its own K candidates, (B, K), for unit-norm embeddings."""
    return torch.einsum("bd,bkd->bk", wide(queries_BD), wide(own_BKD))


def score_logits(scores: Tensor) -> Tensor:
    """logit(s) = log(s / (1 - s)) = l_Yes - l_No of judge scores in [0, 1], within +-MAX_LOGIT.

    As targets these have a contrast that scores lack: two scores differ by at most 1, so softmax(s / tau) can never
    prefer one candidate by more than e^(1/tau), and 0.98 and 0.9998 are all but one target.
    """
    edge = torch.sigmoid(torch.tensor(-MAX_LOGIT, dtype=torch.float64)).item()
    return torch.logit(wide(scores), eps=edge)


def judge_kl(similarities_BK: Tensor, targets_BK: Tensor, temperature: float, judge_temperature: float) -> Tensor:
    """UniME-V2's judge-aligned loss, Eqs. 2-4: 1/2 (KL(P||Q) + KL(Q||P)) per query, shape (B,).

    P = softmax(similarities / temperature) over {c+, c-_1..k} (Eq. 2), similarities are cosines in [-1, 1];
    Q = softmax(targets / judge_temperature), targets are judge scores in [0, 1] (Eq. 3) or their `score_logits`.
    The paper calls Eq. 4 a JS-divergence; it is the symmetrised KL. The published code adds 1e-8 inside the
    logarithms, which bounds each log at -18.4 and bends the gradient wherever a probability is near 1e-8;
    log-softmax needs no such guard. It also has one temperature for both.
    """
    log_p = functional.log_softmax(wide(similarities_BK) / temperature, dim=-1)
    log_q = functional.log_softmax(wide(targets_BK) / judge_temperature, dim=-1)
    difference = log_p - log_q
    return 0.5 * ((log_p.exp() - log_q.exp()) * difference).sum(-1)


def hard_negative_ce(similarities_BK: Tensor, temperature: float) -> Tensor:
    """Hard labels: -log softmax(similarities / temperature) at c+ over {c+, c-_1..k}, shape (B,).

    UniME-V2's "hard negatives without soft scores": what `judge_kl` leaves of KL(Q||P) where Q is one-hot at c+.
    """
    logits_BK = wide(similarities_BK) / temperature
    return -functional.log_softmax(logits_BK, dim=-1)[:, 0]


def margin_mse(similarities_BK: Tensor, targets_BK: Tensor, temperature: float, judge_temperature: float) -> Tensor:
    """MarginMSE (Hofstaetter et al. 2020), mean over the negatives, shape (B,):

        1/k sum_j ( (cos(q,c+) - cos(q,c-_j)) / temperature - (s(q,c+) - s(q,c-_j)) / judge_temperature )^2

    The published loss compares unscaled dot products with a teacher's unscaled logits; cosines and scores have
    other ranges, so both sides are divided as in `judge_kl`, whose optimum this one then shares.

    Raises:
        ValueError: there is no negative.
    """
    if similarities_BK.shape[1] < 2:
        raise ValueError("margin_mse needs at least one negative")
    student_BK = wide(similarities_BK) / temperature
    judge_BK = wide(targets_BK) / judge_temperature
    gap_BK = (student_BK[:, :1] - student_BK[:, 1:]) - (judge_BK[:, :1] - judge_BK[:, 1:])
    return gap_BK.square().mean(-1)
