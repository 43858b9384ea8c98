"""The models of the graph inside one process: what the encoder and the reranker deployments compute. No Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from unime_ray.artifacts import local_folder
from unime_ray.corpus.payload import Item
from unime_ray.models.backbone import Backbone
from unime_ray.models.embedder import Embedder
from unime_ray.models.embedder_vllm import VllmEmbedder
from unime_ray.models.reranker import Reranker
from unime_ray.models.vllm_engine import Frontend
from unime_ray.serve.bundle import Checkpoint
from unime_ray.serve.stages import Encoded

NORM_TOLERANCE = 1e-2


class EncoderEngine:
    """Embeds many requests' items at once: in batches of the checkpoint's token budget, or as vLLM schedules them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.embedder: Embedder | VllmEmbedder
        self._encode_text: Callable[[str], list[int]]
        if checkpoint.vllm is None:
            backbone = load(checkpoint)
            self.embedder = Embedder(backbone, checkpoint.batch_tokens, checkpoint.dim)
            self._encode_text = backbone.encode_text
        else:
            front = Frontend.load(local_folder(checkpoint.path), checkpoint.hub_revision, checkpoint.pixels)
            self.embedder = VllmEmbedder(front, checkpoint.vllm, dtype=checkpoint.dtype, dimensions=checkpoint.dim)
            self._encode_text = front.tokens.encode_text

    def embed_groups(self, groups: Sequence[Sequence[Item]]) -> list[Encoded]:
        """One answer per request; equal items of several requests are computed once."""
        unique = list({item.item_id: item for group in groups for item in group}.values())
        vectors_ND, errors = self.embedder.embed_checked(unique) if unique else (np.empty((0, 0), np.float32), [])
        norms = np.linalg.norm(vectors_ND, axis=1)
        row_of = {item.item_id: row for row, item in enumerate(unique)}
        answers = []
        for group in groups:
            rows = [row_of[item.item_id] for item in group]
            reasons = [errors[row] or _broken(norms[row]) for row in rows]
            tokens = sum(len(self._encode_text(item.rendered)) for item in group)
            answers.append(Encoded(vectors_ND[rows], reasons, tokens, self.checkpoint.revision, self.checkpoint.name))
        return answers


class RerankerEngine:
    """Scores candidates of many requests at once."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.reranker = Reranker(load(checkpoint), checkpoint.batch_tokens)

    def score_groups(self, groups: Sequence[tuple[Item, Sequence[Item], str]]) -> list[list[float | None]]:
        """(query, candidates, mode) each: shares of the listwise vote (softmax of the index logits), or P(Yes)."""
        answers: list[list[float | None]] = [[] for _ in groups]
        for mode in ("listwise", "pointwise"):
            places = [place for place, group in enumerate(groups) if group[2] == mode and len(group[1])]
            pairs = [(groups[place][0], groups[place][1]) for place in places]
            if not pairs:
                continue
            listwise = mode == "listwise"
            scored = self.reranker.listwise_groups(pairs) if listwise else self.reranker.pointwise_groups(pairs)
            for place, values in zip(places, scored, strict=True):
                answers[place] = shares(values) if listwise else _finite(values)
        return answers


def load(checkpoint: Checkpoint) -> Backbone:
    return Backbone.load(
        local_folder(checkpoint.path),
        revision=checkpoint.hub_revision,
        dtype=checkpoint.dtype,
        pixels=checkpoint.pixels,
    )


def shares(logits_K: np.ndarray) -> list[float | None]:
    """Softmax over the candidates that could be shown; None for the others."""
    shown = np.isfinite(logits_K)
    if not shown.any():
        return [None] * len(logits_K)
    weights = np.exp(np.where(shown, logits_K - logits_K[shown].max(), -np.inf).astype(np.float64))
    return [float(w) if ok else None for w, ok in zip(weights / weights.sum(), shown, strict=True)]


def _finite(values_K: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values_K]


def _broken(norm: float) -> str | None:
    return None if abs(norm - 1) < NORM_TOLERANCE else "the model gave no finite vector"
