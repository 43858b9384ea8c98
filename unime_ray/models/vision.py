"""The vision tower on many pictures at once, exactly as transformers computes it but without its loops in Python.

transformers' attention (all but flash) walks over the pictures, or windows, of a batch one by one, and its index
tables are built picture by picture. Here pictures of equal size attend in one product, and the tables are made once a
grid. `speed_up` changes only the instance it is given; weights and module names stay.

Shapes: S patches of all pictures of a batch, H heads, d width of a head, L patches of one picture (or window).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import QuickGELUActivation
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

Grid = tuple[int, int]


def speed_up(visual: nn.Module) -> None:
    """Give the blocks of a Qwen2-, Qwen2.5- or Qwen3-VL vision tower the batched attention below, in place."""
    for block in visual.blocks:  # type: ignore[union-attr]
        block.attn.forward = MethodType(_attention_forward, block.attn)
        if isinstance(getattr(block.mlp, "act", None), QuickGELUActivation):
            block.mlp.act.forward = MethodType(_quick_gelu_forward, block.mlp.act)
    visual.patch_embed.forward = MethodType(_patch_embed_forward, visual.patch_embed)  # type: ignore[union-attr]


class GridTables:
    """Index tables of a vision tower, one set a grid, concatenated for a batch."""

    def __init__(self, visual: Any) -> None:
        self.merge: int = visual.spatial_merge_size
        self.window: int | None = getattr(visual, "window_size", None)
        self.patch: int = visual.config.patch_size
        self._positions: dict[Grid, Tensor] = {}
        self._windows: dict[Grid, tuple[Tensor, Tensor]] = {}

    def of(self, grids: Sequence[Grid], device: torch.device) -> dict[str, Tensor]:
        """The keyword arguments that spare transformers from computing them: positions, lengths, windows."""
        lengths = torch.tensor([0, *(rows * columns for rows, columns in grids)])
        tables = {
            "position_ids": torch.cat([self._position(grid) for grid in grids]).to(device),
            "cu_seqlens": lengths.cumsum(0, dtype=torch.int32).to(device),
        }
        if self.window is not None:
            tables["window_index"], tables["cu_window_seqlens"] = (t.to(device) for t in self._joined_windows(grids))
        return tables

    def _position(self, grid: Grid) -> Tensor:
        if grid not in self._positions:
            self._positions[grid] = get_vision_position_ids(torch.tensor([[1, *grid]]), self.merge)
        return self._positions[grid]

    def _joined_windows(self, grids: Sequence[Grid]) -> tuple[Tensor, Tensor]:
        indices, lengths, offset = [], [torch.zeros(1, dtype=torch.long)], 0
        for grid in grids:
            if grid not in self._windows:
                index, bounds = get_vision_window_index(
                    torch.tensor([[1, *grid]]), self.merge, self.window or 0, self.patch
                )
                self._windows[grid] = index, bounds.diff().long()
            index, sizes = self._windows[grid]
            indices.append(index + offset)
            lengths.append(sizes)
            offset += len(index)
        return torch.cat(indices), torch.cat(lengths).cumsum(0, dtype=torch.int32)


def attend_segments(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scaling: float) -> Tensor:
    """Attention inside each of the consecutive segments: (S, H, d) thrice and the segments' lengths -> (S, H, d)."""
    distinct = sorted(set(lengths))
    if len(distinct) == 1:
        return _attend(query, key, value, distinct[0], scaling)
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    sizes = torch.tensor(lengths)
    out = torch.empty_like(query)
    for length in distinct:
        rows = (starts[sizes == length][:, None] + torch.arange(length)).flatten().to(query.device)
        out[rows] = _attend(query[rows], key[rows], value[rows], length, scaling)
    return out


def _attend(query: Tensor, key: Tensor, value: Tensor, length: int, scaling: float) -> Tensor:
    """Attention in segments of one length."""
    q, k, v = (part.unflatten(0, (-1, length)).transpose(1, 2) for part in (query, key, value))
    out = functional.scaled_dot_product_attention(q, k, v, scale=scaling)
    return out.transpose(1, 2).flatten(0, 1)


def _attention_forward(
    self: Any, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: Any
) -> Tensor:
    """Replaces `VisionAttention.forward` of the three families, which are alike."""
    patches = hidden_states.shape[0]
    query, key, value = self.qkv(hidden_states).view(patches, 3, self.num_heads, -1).unbind(1)
    cos, sin = (table.unsqueeze(1).float() for table in position_embeddings)
    query, key = (rotate(part.float(), cos, sin).to(part.dtype) for part in (query, key))
    out = attend_segments(query, key, value, cu_seqlens.diff().tolist(), self.scaling)
    return self.proj(out.reshape(patches, -1))


def _patch_embed_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """A convolution whose stride is its kernel is a matrix product, and on most devices a faster one."""
    weight = self.proj.weight
    return functional.linear(hidden_states.to(weight.dtype), weight.flatten(1), self.proj.bias)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (S, H, d) by tables (S, 1, d) whose halves are equal, in three passes over x."""
    half = x.shape[-1] // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), dim=-1)
    signed = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
    return torch.addcmul(x * cos, swapped, signed)


def _quick_gelu_forward(self: Any, input: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), in place where no gradient needs the parts."""
    if torch.is_grad_enabled():
        return input * torch.sigmoid(1.702 * input)
    return (1.702 * input).sigmoid_().mul_(input)
