"""Items as unit vectors: the last token's last hidden state, L2-normalised (UniME-V2, section on the embedder).

Text goes in raw, without chat template, padded on the left, as in the published code.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from unime_ray.errors import ModelError, RejectedRow
from unime_ray.models.backbone import Backbone, Batch
from unime_ray.models.items import Item
from unime_ray.models.tokens import Segment

DEFAULT_BATCH_TOKENS = 8192


def embed_batch(backbone: Backbone, batch: Batch) -> Tensor:
    """Unit vectors (B, D) float32 of a batch's rows, with gradients if they are enabled."""
    return functional.normalize(backbone.forward_hidden(batch).float(), dim=-1)


class CheckedEmbedder(ABC):
    """What embedders of either engine share."""

    @abstractmethod
    def embed_checked(self, items: Sequence[Item]) -> tuple[np.ndarray, list[str | None]]:
        """Vectors (N, D) and each item's error or None; an item with an error has a zero vector."""

    def embed(self, items: Sequence[Item]) -> np.ndarray:
        """Vectors (N, D) float32 of unit norm, in the order of `items`.

        Raises:
            ModelError: an item cannot be embedded; the message has its id and the reason.
        """
        vectors, errors = self.embed_checked(items)
        for item, error in zip(items, errors, strict=True):
            if error is not None:
                raise ModelError(f"item {item.item_id.hex()} cannot be embedded: {error}")
        return vectors


class Embedder(CheckedEmbedder):
    """Embeds items in batches of similar length, each of at most `batch_tokens` padded tokens."""

    def __init__(
        self, backbone: Backbone, batch_tokens: int = DEFAULT_BATCH_TOKENS, dimensions: int | None = None
    ) -> None:
        """`dimensions`: keep the first so many numbers of each vector, normalised again (Matryoshka).

        Raises:
            ModelError: the vectors have fewer.
        """
        self.backbone, self.batch_tokens = backbone, backbone.batch_budget(batch_tokens)
        self.dimensions = check_dimensions(dimensions, backbone.hidden_size, backbone.tokens.name)

    def embed_checked(self, items: Sequence[Item]) -> tuple[np.ndarray, list[str | None]]:
        """Vectors (N, D) and each item's error or None; an item with an error has a zero vector."""
        segments = self.backbone.segments(items)
        errors = [segment.reason if isinstance(segment, RejectedRow) else None for segment in segments]
        vectors = np.zeros((len(items), self.dimensions), dtype=np.float32)
        usable = {index: segment for index, segment in enumerate(segments) if isinstance(segment, Segment)}
        for rows in token_budget_batches({index: len(s) for index, s in usable.items()}, self.batch_tokens):
            with torch.no_grad():
                batch = self.backbone.collate([usable[row] for row in rows])
                whole = embed_batch(self.backbone, batch)
                vectors[rows] = functional.normalize(whole[:, : self.dimensions], dim=-1).cpu().numpy()
        return vectors, errors


def check_dimensions(wanted: int | None, width: int, model: str) -> int:
    """Width of the vectors that `wanted` leaves of `width`.

    Raises:
        ModelError: there are fewer.
    """
    if wanted is not None and wanted > width:
        raise ModelError(f"embed.dimensions {wanted}: the vectors of {model} have {width} numbers; name fewer")
    return width if wanted is None else wanted


def token_budget_batches(lengths: dict[int, int], budget: int) -> list[list[int]]:
    """Keys in batches of at most `budget` padded tokens, sorted by length; a single longer row goes alone."""
    batches: list[list[int]] = []
    for index in sorted(lengths, key=lambda key: lengths[key]):
        # Ascending, so the newest row is the longest and sets the padded width.
        if not batches or (len(batches[-1]) + 1) * lengths[index] > budget:
            batches.append([])
        batches[-1].append(index)
    return batches
