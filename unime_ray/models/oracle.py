"""A judge that knows: scores from a truth table, noised to a chosen AUC if asked.

It answers "does the method work" apart from "is this judge good enough". Needs no model and no torch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from statistics import NormalDist

from unime_ray.corpus.truth import Truth
from unime_ray.models.items import Item
from unime_ray.models.judge import Group, Verdict

MAX_LOGIT = 8.0
"""A sure oracle says sigmoid(8) = 0.9997, so that logits stay finite."""
NOISE_BITS = 53


class OracleJudge:
    """Scores by true relevance r in [0, 1].

    Without noise the score is r (within MAX_LOGIT). With `noise_auc` A < 1 it is the binormal model's:
    sigmoid(mu * (r - 1/2) + noise), noise ~ N(0, 1), mu = sqrt(2) * Phi^-1(A), so that relevant against irrelevant
    pairs (r 1 against 0) have an expected AUC of A. A pair's noise is a function of its ids and `seed` alone.
    """

    def __init__(self, truth: Truth, noise_auc: float = 1.0, seed: int = 0) -> None:
        if not 0.5 < noise_auc <= 1.0:
            raise ValueError(f"noise_auc must be in (0.5, 1], not {noise_auc}")
        self.truth, self.seed = truth, seed
        self.separation = None if noise_auc == 1.0 else math.sqrt(2) * NormalDist().inv_cdf(noise_auc)

    def score(self, query: Item, candidates: Sequence[Item]) -> list[Verdict]:
        asked = self._concept(query)
        return [self._verdict(query, asked, candidate) for candidate in candidates]

    def score_groups(self, groups: Sequence[Group]) -> list[list[Verdict]]:
        return [self.score(query, candidates) for query, candidates in groups]

    def _concept(self, item: Item) -> str | None:
        return self.truth.concept(item.text, item.image_id)

    def _verdict(self, query: Item, asked: str | None, candidate: Item) -> Verdict:
        found = self._concept(candidate)
        if asked is None or found is None:
            missing = query if asked is None else candidate
            return Verdict.failed(f"the truth table does not know item {missing.item_id.hex()}")
        relevance = self.truth.relevance(asked, found)
        if self.separation is None:
            logit = _logit(relevance)
        else:
            logit = self.separation * (relevance - 0.5) + self._noise(query.item_id, candidate.item_id)
        return Verdict.of(logit / 2, -logit / 2)

    def _noise(self, query: bytes, candidate: bytes) -> float:
        """A standard normal draw, the same in every process."""
        key = self.seed.to_bytes(8, "little", signed=True)
        digest = hashlib.blake2b(query + candidate, digest_size=8, key=key, person=b"unime.noise").digest()
        uniform = ((int.from_bytes(digest, "little") >> (64 - NOISE_BITS)) + 0.5) / 2**NOISE_BITS
        return NormalDist().inv_cdf(uniform)


def _logit(probability: float) -> float:
    edge = 1 / (1 + math.exp(MAX_LOGIT))
    clipped = min(max(probability, edge), 1 - edge)
    return math.log(clipped / (1 - clipped))
