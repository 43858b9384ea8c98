"""The losses once more, written out from their equations: Python floats, one query and one candidate at a time.

Embeddings come as (rows, D) tensors of unit norm. Each gives a list of one loss per query.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

Floats = Sequence[float]


def dot(a: Floats, b: Floats) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def softmax(values: Floats) -> list[float]:
    weights = [math.exp(value) for value in values]
    return [weight / sum(weights) for weight in weights]


def kl(p: Floats, q: Floats) -> float:
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


def judge_kl(similarities: Tensor, targets: Tensor, tau: float, judge_tau: float) -> list[float]:
    found = []
    for cosines, scores in zip(similarities.tolist(), targets.tolist(), strict=True):
        p, q = softmax([c / tau for c in cosines]), softmax([s / judge_tau for s in scores])
        found.append(0.5 * (kl(p, q) + kl(q, p)))
    return found


def hard_negative_ce(similarities: Tensor, tau: float) -> list[float]:
    return [-math.log(softmax([c / tau for c in cosines])[0]) for cosines in similarities.tolist()]


def margin_mse(similarities: Tensor, targets: Tensor, tau: float, judge_tau: float) -> list[float]:
    found = []
    for cosines, scores in zip(similarities.tolist(), targets.tolist(), strict=True):
        gaps = [(cosines[0] - cosines[j]) / tau - (scores[0] - scores[j]) / judge_tau for j in range(1, len(cosines))]
        found.append(sum(gap * gap for gap in gaps) / len(gaps))
    return found


def infonce(queries: Tensor, candidates: Tensor, targets: Sequence[int], tau: float, keep: Tensor) -> list[float]:
    return hardness_infonce(queries, candidates, targets, tau, 0.0, keep)


def hardness_infonce(
    queries: Tensor, candidates: Tensor, targets: Sequence[int], tau: float, hardness: float, keep: Tensor
) -> list[float]:
    found = []
    for row, (query, target) in enumerate(zip(queries.tolist(), targets, strict=True)):
        cosines = [dot(query, candidate) for candidate in candidates.tolist()]
        positive = math.exp(cosines[target] / tau)
        others = [c for c in range(len(cosines)) if c != target and bool(keep[row, c])]
        total = positive + sum(math.exp(hardness * cosines[c]) * math.exp(cosines[c] / tau) for c in others)
        found.append(-math.log(positive / total))
    return found


def unime_v1(
    queries: Tensor, candidates: Tensor, targets: Sequence[int], tau: float, top_k: int, margin: float, keep: Tensor
) -> list[float]:
    """Eq. 3: out with cos > cos(q, c+) + margin; the top k of the rest, in turn until k. Eq. 4: InfoNCE over them."""
    found = []
    for row, (query, target) in enumerate(zip(queries.tolist(), targets, strict=True)):
        cosines = [dot(query, candidate) for candidate in candidates.tolist()]
        others = [c for c in range(len(cosines)) if c != target and bool(keep[row, c])]
        ranked = sorted((cosines[c] for c in others if cosines[c] <= cosines[target] + margin), reverse=True)
        hard = [ranked[place % len(ranked)] for place in range(top_k)] if ranked else []
        positive = math.exp(cosines[target] / tau)
        found.append(-math.log(positive / (positive + sum(math.exp(c / tau) for c in hard))))
    return found


def hybrid(
    queries: Tensor, own: Tensor, scores: Tensor, candidates: Tensor, targets: Sequence[int], keep: Tensor,
    tau: float, judge_tau: float, weight: float, margin: float,
) -> list[float]:  # fmt: skip
    cosines = [[dot(q, c) for c in mine] for q, mine in zip(queries.tolist(), own.tolist(), strict=True)]
    keep = keep.clone()
    for row, (query, target) in enumerate(zip(queries.tolist(), targets, strict=True)):
        positive = dot(query, candidates[target].tolist())
        for column, candidate in enumerate(candidates.tolist()):
            keep[row, column] &= dot(query, candidate) <= positive + margin
    aligned = judge_kl(own.new_tensor(cosines), scores, tau, judge_tau)
    contrast = infonce(queries, candidates, targets, tau, keep)
    return [a + weight * c for a, c in zip(aligned, contrast, strict=True)]


def text_distill(
    students: Tensor, teachers: Tensor, tau: float, teacher_tau: float, include_self: bool = True
) -> list[float]:
    found = []
    rows_s, rows_t = students.tolist(), teachers.tolist()
    for i in range(len(rows_s)):
        others = [j for j in range(len(rows_s)) if include_self or j != i]
        student = softmax([dot(rows_s[i], rows_s[j]) / tau for j in others])
        teacher = softmax([dot(rows_t[i], rows_t[j]) / teacher_tau for j in others])
        found.append(kl(teacher, student))
    return found
