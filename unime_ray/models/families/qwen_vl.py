"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: pictures at their own size, M-RoPE, deepstack features (Qwen3-VL).

As UniME-V2 publishes it for Qwen2-VL: raw text with the picture at its marker, no chat template, left padding, last
token. The image budget is the checkpoint's own, or `pixels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unime_ray.config import PixelBudget
from unime_ray.models import vision
from unime_ray.models.families.base import Family, sizes_of
from unime_ray.models.pixels import Picture, PicturePipeline, PixelPipeline
from unime_ray.models.tokens import Grid, PromptTokenizer, Segment


class QwenVL(Family):
    """Any of the three, which differ in their vision towers alone as far as this project can see."""

    name = "qwen_vl"
    num_axes = 3
    vision_path = r"visual\.blocks\.\d+"
    vision_linears = ("qkv", "proj", "fc1", "fc2", "gate_proj", "up_proj", "down_proj", "linear_fc1", "linear_fc2")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.merge: int = config.vision_config.spatial_merge_size
        self._tables: vision.GridTables | None = None

    def picture_marks(self, tokenizer: Any) -> tuple[list[int | None], list[int | None]]:
        return [self.config.vision_start_token_id], [self.config.vision_end_token_id]

    def layout(self, tokens: PromptTokenizer, grid: Grid) -> Segment:
        """vision_start, one image token per merged patch, vision_end, with the three-axis positions of M-RoPE."""
        rows, columns = grid[0] // self.merge, grid[1] // self.merge
        start, end = self.config.vision_start_token_id, self.config.vision_end_token_id
        ids = np.array([start, *[tokens.image_token_id] * (rows * columns), end], dtype=np.int64)
        positions = np.ones((3, len(ids)), dtype=np.int64)
        positions[:, 0] = 0
        positions[1, 1:-1] += np.repeat(np.arange(rows), columns)
        positions[2, 1:-1] += np.tile(np.arange(columns), rows)
        positions[:, -1] = 1 + max(rows, columns)
        return Segment(ids, positions, 2 + max(rows, columns))

    def pictures(self, processor: Any, budget: PixelBudget) -> PixelPipeline:
        return PixelPipeline(processor, budget)

    def attach(self, model: Any) -> None:
        super().attach(model)
        self._tables = vision.GridTables(model.model.visual)
        vision.speed_up(model.model.visual)

    def vision_modules(self, model: Any) -> list[nn.Module]:
        return [model.model.visual]

    def encode(self, model: Any, pictures: Sequence[Picture], values: Tensor) -> Sequence[Tensor]:
        """Features (X, M, D); deepstack features follow the first."""
        assert self._tables is not None
        grids = [picture.grid for picture in pictures]
        thw = torch.tensor([[1, *grid] for grid in grids], device=values.device)
        output = model.model.visual(values, grid_thw=thw, **self._tables.of(grids, values.device))
        layers = torch.stack([output.pooler_output, *(getattr(output, "deepstack_features", None) or [])])
        return layers.split([rows * columns // self.merge**2 for rows, columns in grids], dim=1)

    def plain_inputs(self, batch: Any, pixels: PicturePipeline) -> dict[str, Tensor]:
        inputs = super().plain_inputs(batch, pixels)
        inputs["mm_token_type_ids"] = (batch.input_ids == self.config.image_token_id).int()
        if batch.pictures:
            sizes = sizes_of(batch.pictures)
            inputs["image_grid_thw"] = torch.cat([torch.ones_like(sizes[:, :1]), sizes], dim=1)
        return inputs


class Qwen2VL(QwenVL):
    name = "qwen2_vl"


class Qwen25VL(QwenVL):
    name = "qwen2_5_vl"


class Qwen3VL(QwenVL):
    name = "qwen3_vl"
