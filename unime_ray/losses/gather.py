"""All ranks' rows on every rank, with gradients: what in-batch losses need."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


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
