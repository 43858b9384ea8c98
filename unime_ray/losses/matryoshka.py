"""Matryoshka representation learning (Kusupati et al. 2022) around any loss of embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn import functional

from unime_ray.losses.judged import wide


def matryoshka(
    loss: Callable[..., Tensor], embeddings: Sequence[Tensor], dims: Sequence[int], weights: Sequence[float] = ()
) -> Tensor:
    """sum_d w_d loss(embeddings cut to their first d numbers and normalised again) / sum_d w_d, shape (B,).

    The published loss is the plain weighted sum; the mean keeps the size of the gradient, and so the learning rate,
    whatever the number of dims. Masks that depend on similarities are decided for each d anew.

    Args:
        loss: takes as many tensors (..., D) as there are `embeddings` and gives one number per query.
        dims: widths to train, each at most D; name D itself too if the whole vector is to be used.
        weights: one per width (default: all 1).

    Raises:
        ValueError: a width over D, or another number of weights than of widths.
    """
    full = embeddings[0].shape[-1]
    if not dims or not 0 < min(dims) <= max(dims) <= full:
        raise ValueError(f"matryoshka dims {list(dims)} must lie in 1..{full}, the embedding's width")
    shares = list(weights) or [1.0] * len(dims)
    if len(shares) != len(dims):
        raise ValueError(f"{len(shares)} matryoshka weights for {len(dims)} dims")
    parts = [
        share * loss(*(functional.normalize(wide(rows)[..., :dim], dim=-1) for rows in embeddings))
        for dim, share in zip(dims, shares, strict=True)
    ]
    return sum(parts[1:], parts[0]) / sum(shares)
