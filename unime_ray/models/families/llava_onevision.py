"""LLaVA-OneVision: a picture as a thumbnail and as tiles of it, each row of the tiles closed by a newline feature.

As UniME-V2 publishes it: raw text with the picture at its marker, no chat template, left padding, last token. With
`pixels.max_pixels` (336 x 336 in the paper) a larger picture is first made that small, and so takes fewer tiles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.models.llava_onevision.modeling_llava_onevision import get_anyres_image_grid_shape, unpad_image

from unime_ray.config import PixelBudget
from unime_ray.errors import ModelError
from unime_ray.models.families.base import Family, sizes_of
from unime_ray.models.pixels import Picture, PicturePipeline, TilePipeline
from unime_ray.models.tokens import Grid, PromptTokenizer, Segment, text_segment

SHRINK_ABOVE = 1.1
"""How far the tiles' features may exceed the checkpoint's maximum before they are made fewer."""


class LlavaOnevision(Family):
    name = "llava_onevision"
    vision_path = r"vision_tower\..*\blayers\.\d+"
    vision_linears = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.tile: int = config.vision_config.image_size
        self.side: int = self.tile // config.vision_config.patch_size
        """Patches along a tile's side."""

    def layout(self, tokens: PromptTokenizer, grid: Grid) -> Segment:
        """Image tokens alone; `grid` is the picture's (height, width)."""
        return text_segment(np.full(self.num_tokens(grid), tokens.image_token_id, dtype=np.int64))

    def num_tokens(self, size: Grid) -> int:
        """Features of a picture of (height, width): its thumbnail's, its tiles' without padding, one newline a row."""
        rows, columns = get_anyres_image_grid_shape(size, self.config.image_grid_pinpoints, self.tile)
        whole = torch.empty(1, rows * self.side, columns * self.side, device="meta")
        height, width = unpad_image(whole, size).shape[1:]
        most = int(self.config.vision_aspect_ratio.rsplit("_", 1)[-1])
        ratio = math.sqrt(height * width / (most * self.side**2))
        if ratio > SHRINK_ABOVE:
            height, width = int(height // ratio), int(width // ratio)
        return self.side**2 + height * (width + 1)

    def pictures(self, processor: Any, budget: PixelBudget) -> PicturePipeline:
        if getattr(processor, "image_grid_pinpoints", None) is None:
            raise ModelError(f"image processor {type(processor).__name__} cuts no tiles: not LLaVA-OneVision's")
        if budget.min_pixels is not None:
            raise ModelError("pixels.min_pixels: LLaVA-OneVision's tiles have one size; leave it out")

        def process(image: Image.Image) -> tuple[np.ndarray, Grid]:
            image = shrink(image, budget.max_pixels)
            made = processor(image, return_tensors="np")
            return made["pixel_values"][0], (image.height, image.width)

        return TilePipeline(process)

    def num_patches(self, picture: Picture) -> int:
        return len(picture.patches) * self.side**2

    def encode(self, model: Any, pictures: Sequence[Picture], values: Tensor) -> Sequence[Tensor]:
        sizes = sizes_of(pictures).to(values.device)
        output = model.model.get_image_features(pixel_values=values, image_sizes=sizes)
        return [features[None] for features in output.pooler_output]

    def plain_inputs(self, batch: Any, pixels: PicturePipeline) -> dict[str, Tensor]:
        inputs = super().plain_inputs(batch, pixels)
        return inputs | {"image_sizes": sizes_of(batch.pictures)} if batch.pictures else inputs

    def vision_parameters(self, model: Any) -> Any:
        yield from super().vision_parameters(model)
        yield model.model.image_newline


def shrink(image: Image.Image, max_pixels: int | None) -> Image.Image:
    """The picture with at most `max_pixels`, its aspect kept."""
    pixels = image.width * image.height
    if max_pixels is None or pixels <= max_pixels:
        return image
    scale = math.sqrt(max_pixels / pixels)
    size = max(1, int(image.width * scale)), max(1, int(image.height * scale))
    return image.resize(size, Image.Resampling.BICUBIC)
