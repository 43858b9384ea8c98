"""Which judged candidates become hard negatives: UniME-V2's rule (arXiv 2510.13515, "hard negative sampling").

For one query q with one positive c+, candidates c ranked by similarity x:

1. delta: only candidates with x < delta stay (Eq. 1; `positive` is delta = sim(q, c+), as in the paper's Figure 2).
2. false negatives: a score above alpha = sigma(q, c+) - beta says that the candidate answers the query too; it goes.
3. cyclical sampling in five-step intervals over the rest: ranks 0, 5, 10, ..., then 1, 6, 11, ..., until n are taken.
4. fewer than n left: the taken ones repeat, in the same order, up to n. None left: the fallback.

Differs from the paper: a candidate without a score is dropped and counted; the fallback (n random candidates, scored
1.0) is off by default, because it pushes the positive away from what may be another positive. Pure: no ray, no torch.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice

from unime_ray.config import SelectConfig

KEPT, DELTA, UNSCORED, FALSE_NEGATIVE, POSITIVE = "kept", "delta", "unscored", "false negative", "positive"
SPARE = "not reached"
"""What can become of a candidate. `not reached`: good enough, but n others came first in the cycle."""

FALLBACK_SCORE = 1.0


@dataclass(frozen=True)
class Selection:
    """The negatives of one (query, positive): parallel lists of length n, or empty when the query is skipped.

    `fates` has one of the constants above per candidate, in the order they were given. `counts` says how many
    candidates or queries took each branch.
    """

    ids: list[bytes] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    similarities: list[float] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    fates: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def query_rng(seed: int, query_id: bytes) -> random.Random:
    """Random numbers of one query: the same whatever else is selected, and in whatever order."""
    digest = hashlib.blake2b(query_id, digest_size=8, key=str(seed).encode()).digest()
    return random.Random(int.from_bytes(digest, "big"))


def select_negatives(
    candidate_ids: Sequence[bytes],
    similarities: Sequence[float],
    scores: Sequence[float | None],
    positive_score: float,
    positive_similarity: float,
    config: SelectConfig,
    rng: random.Random,
    positives: Collection[bytes] = (),
) -> Selection:
    """The hard negatives of one query and one of its positives.

    Args:
        candidate_ids: the raw top-k, in any order; ranked here by descending similarity, ties by id.
        similarities: x in [-1, 1], one per candidate.
        scores: sigma(q, c) in [0, 1]; None or NaN where the judge failed.
        positive_score: sigma(q, c+), finite.
        positive_similarity: sim(q, c+), used by `delta: positive`.
        rng: used by the published fallback only; see `query_rng`.
        positives: ids that must never be negatives, whatever the candidates hold.

    Raises:
        ValueError: the lists differ in length, or the positive has no score.
    """
    if not len(candidate_ids) == len(similarities) == len(scores):
        raise ValueError("candidate_ids, similarities and scores differ in length")
    if not math.isfinite(positive_score):
        raise ValueError("the positive has no score, so there is no false-negative threshold")
    limit = _delta(config.delta, positive_similarity)
    alpha = positive_score - config.beta
    fates = [
        _fate(identifier in positives, x, s, limit, alpha)
        for identifier, x, s in zip(candidate_ids, similarities, scores, strict=True)
    ]
    order = sorted(range(len(fates)), key=lambda index: (-similarities[index], candidate_ids[index]))
    eligible = [index for index in order if fates[index] == KEPT]
    counts = Counter({f"candidates_{fate.replace(' ', '_')}": n for fate, n in Counter(fates).items() if fate != KEPT})
    counts["candidates"], counts["candidates_eligible"] = len(fates), len(eligible)
    if not eligible:
        return _fallback(candidate_ids, similarities, fates, counts, config, rng)
    taken = cycle_ranks(len(eligible), config.cycle)[: config.num_negatives]
    chosen, reasons = _filled(eligible, taken, config)
    for rank in set(range(len(eligible))) - set(taken):
        fates[eligible[rank]] = SPARE
    counts["negatives_cycle"], counts["negatives_repeat"] = len(taken), config.num_negatives - len(taken)
    counts["queries_filled" if len(taken) < config.num_negatives else "queries_full"] = 1
    # float() holds: an eligible candidate has a score.
    kept_scores = [float(scores[index]) for index in chosen]  # type: ignore[arg-type]
    return _selection(candidate_ids, similarities, chosen, kept_scores, reasons, fates, counts)


def cycle_ranks(count: int, step: int) -> list[int]:
    """All of range(count) in the order of cyclical sampling: 0, step, 2 step, ..., 1, step + 1, ...

    `cycle_ranks(7, 5)` is [0, 5, 1, 6, 2, 3, 4].
    """
    return [rank for start in range(min(step, count)) for rank in range(start, count, step)]


def _delta(delta: str | float, positive_similarity: float) -> float:
    if delta == "none":
        return math.inf
    return positive_similarity if delta == "positive" else float(delta)


def _fate(positive: bool, similarity: float, score: float | None, limit: float, alpha: float) -> str:
    if positive:
        return POSITIVE
    if not similarity < limit:
        return DELTA
    if score is None or math.isnan(score):
        return UNSCORED
    return FALSE_NEGATIVE if score > alpha else KEPT


def _filled(eligible: list[int], taken: list[int], config: SelectConfig) -> tuple[list[int], list[str]]:
    """Candidates and reasons of the taken ranks, repeated in order up to n."""
    first = [f"cycle {rank % config.cycle} rank {rank}" for rank in taken]
    repeats = config.num_negatives - len(taken)
    again = [f"repeat of rank {rank}" for rank in islice(cycle(taken), repeats)]
    ranks = list(islice(cycle(taken), config.num_negatives))
    return [eligible[rank] for rank in ranks], first + again


def _fallback(
    candidate_ids: Sequence[bytes],
    similarities: Sequence[float],
    fates: list[str],
    counts: Counter[str],
    config: SelectConfig,
    rng: random.Random,
) -> Selection:
    """No candidate is left: skip the query, or (as published) take n at random and score each 1.0."""
    allowed = sorted((i for i, fate in enumerate(fates) if fate != POSITIVE), key=lambda i: candidate_ids[i])
    if config.fallback == "skip" or not allowed:
        counts["queries_skipped"] = 1
        return Selection(fates=fates, counts=counts)
    drawn = rng.sample(allowed, min(config.num_negatives, len(allowed)))
    chosen = list(islice(cycle(drawn), config.num_negatives))
    counts["queries_fallback"], counts["negatives_fallback"] = 1, len(chosen)
    scores = [FALLBACK_SCORE] * len(chosen)
    return _selection(candidate_ids, similarities, chosen, scores, ["fallback"] * len(chosen), fates, counts)


def _selection(
    candidate_ids: Sequence[bytes],
    similarities: Sequence[float],
    chosen: list[int],
    scores: list[float],
    reasons: list[str],
    fates: list[str],
    counts: Counter[str],
) -> Selection:
    ids = [candidate_ids[index] for index in chosen]
    return Selection(ids, scores, [float(similarities[index]) for index in chosen], reasons, fates, counts)
