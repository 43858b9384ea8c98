"""InternVL3 (the `-hf` checkpoints): a picture as up to twelve tiles and a thumbnail, 256 tokens each.

Here as a judge: UniME-V2 tried InternVL3-8B and 14B. No embedder of it is published; if one is trained, its text goes
in raw, as UniME-V2's does. `pixels.max_pixels` bounds the tiles: 336 x 336 leaves one of 448 x 448, the whole picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from unime_ray.config import PixelBudget
from unime_ray.errors import ModelError
from unime_ray.models.families.base import Family
from unime_ray.models.pixels import Picture, PicturePipeline, TilePipeline
from unime_ray.models.tokens import Grid, PromptTokenizer, Segment, text_segment

START_TOKEN, END_TOKEN = "<img>", "</img>"


class InternVL(Family):
    name = "internvl"
    vision_path = r"vision_tower\.encoder\.layer\.\d+"
    vision_linears = ("q_proj", "k_proj", "v_proj", "projection_layer", "fc1", "fc2")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        size, patch = config.vision_config.image_size, config.vision_config.patch_size
        self.tile_patches: int = (size[0] // patch[0]) * (size[1] // patch[1])
        self.tile_pixels: int = size[0] * size[1]
        self.tile_tokens = int(self.tile_patches * config.downsample_ratio**2)
        self._marks: tuple[int, int] | None = None

    def picture_marks(self, tokenizer: Any) -> tuple[list[int | None], list[int | None]]:
        start, end = (tokenizer.get_vocab().get(token) for token in (START_TOKEN, END_TOKEN))
        self._marks = start, end
        return [start], [end]

    def layout(self, tokens: PromptTokenizer, grid: Grid) -> Segment:
        """`<img>`, the tiles' tokens, `</img>`; `grid` is (tiles, 1)."""
        assert self._marks is not None
        start, end = self._marks
        middle = np.full(grid[0] * self.tile_tokens, tokens.image_token_id)
        return text_segment(np.concatenate([[start], middle, [end]]).astype(np.int64))

    def pictures(self, processor: Any, budget: PixelBudget) -> PicturePipeline:
        if getattr(processor, "max_patches", None) is None:
            raise ModelError(f"image processor {type(processor).__name__} has no `max_patches`: not InternVL's")
        if budget.min_pixels is not None:
            raise ModelError("pixels.min_pixels: InternVL's tiles have one size; leave it out")
        most = processor.max_patches
        if budget.max_pixels is not None:
            most = max(1, min(most, budget.max_pixels // self.tile_pixels))

        def process(image: Image.Image) -> tuple[np.ndarray, Grid]:
            # Its processor cuts tiles whatever the saved image processor says, hence the explicit flag.
            tiles = processor(image, crop_to_patches=True, max_patches=most, return_tensors="np")["pixel_values"]
            return tiles, (len(tiles), 1)

        return TilePipeline(process)

    def num_patches(self, picture: Picture) -> int:
        return len(picture.patches) * self.tile_patches

    def encode(self, model: Any, pictures: Sequence[Picture], values: Tensor) -> Sequence[Tensor]:
        features = model.model.get_image_features(pixel_values=values).pooler_output  # (tiles of all, M, D)
        return [part.flatten(0, 1)[None] for part in features.split([len(picture.patches) for picture in pictures])]
