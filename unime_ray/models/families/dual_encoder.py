"""CLIP, SigLIP and SigLIP 2: two towers that meet in one space. Baseline embedders; they answer nothing.

Text goes in as written, a picture as the checkpoint's processor makes it, and an item with both is the sum of its two
unit vectors (score fusion). Captions are cut at the text tower's context (77 tokens for CLIP, 64 for SigLIP), as these
models are used everywhere. SigLIP reads its padding: its rows always have the full length.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel

from unime_ray.config import PixelBudget
from unime_ray.errors import ModelError, RejectedRow
from unime_ray.models.families.base import Family
from unime_ray.models.items import Item
from unime_ray.models.pixels import Picture, PicturePipeline, TilePipeline
from unime_ray.models.tokens import Grid, PromptTokenizer, Segment, join, text_segment
from unime_ray.prompts import IMAGE_MARKER

PICTURE = -1
"""Stands for the picture in a row's token ids; the text tower never sees it."""


class DualEncoder(Family):
    auto_class = AutoModel
    can_judge = False
    padding_side = "right"
    language_path = r"text_model\.encoder\.layers\.\d+"
    vision_path = r"vision_model\.encoder\.layers\.\d+"
    vision_linears = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    lora_names = {"o_proj": "out_proj", "up_proj": "fc1", "down_proj": "fc2"}
    fills_context = False
    """Whether texts are padded to the whole context because the padding is attended to."""

    @property
    def embedding_dim(self) -> int:
        return self.config.projection_dim

    @property
    def max_tokens(self) -> int:
        return self.config.text_config.max_position_embeddings + 1  # and the picture's

    @property
    def can_share_prefix(self) -> bool:
        return False

    def prompt_tokenizer(self, tokenizer: Any, name: str) -> PromptTokenizer:
        return PromptTokenizer(tokenizer, PICTURE, self.layout, name)

    def layout(self, tokens: PromptTokenizer, grid: Grid) -> Segment:
        return text_segment(np.array([PICTURE]))

    def segment(self, tokens: PromptTokenizer, item: Item, pictures: Sequence[Picture]) -> Segment:
        markers = item.rendered.count(IMAGE_MARKER)
        if markers != len(pictures):
            raise RejectedRow(f"the text has {markers} image markers {IMAGE_MARKER} for {len(pictures)} pictures")
        text = " ".join(part.strip() for part in item.rendered.split(IMAGE_MARKER) if part.strip())
        parts = [tokens.picture(picture) for picture in pictures]
        if text:
            context = self.config.text_config.max_position_embeddings
            ids = tokens.tokenizer(text, truncation=True, max_length=context, split_special_tokens=True)["input_ids"]
            parts.append(text_segment(np.asarray(ids, dtype=np.int64)))
        return join(parts) if parts else tokens.text("")

    def pictures(self, processor: Any, budget: PixelBudget) -> PicturePipeline:
        if budget != PixelBudget():
            raise ModelError(f"pixels: {self.name} takes pictures of one size; leave min_pixels and max_pixels out")

        def process(image: Image.Image) -> tuple[np.ndarray, Grid]:
            return processor(image, return_tensors="np")["pixel_values"], (1, 1)

        return TilePipeline(process)

    def attach(self, model: Any) -> None:
        """Nothing to fit: the towers run as transformers has them."""

    def anchor(self, model: Any) -> Tensor:
        return model.logit_scale

    def language_model(self, model: Any) -> Any:
        return model.text_model

    def layers(self, model: Any) -> Iterable[nn.Module]:
        return model.text_model.encoder.layers

    def vision_modules(self, model: Any) -> list[nn.Module]:
        modules = [model.vision_model, getattr(model, "visual_projection", None)]
        return [module for module in modules if module is not None]

    def num_patches(self, picture: Picture) -> int:
        vision = self.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2

    def encode(self, model: Any, pictures: Sequence[Picture], values: Tensor) -> Sequence[Tensor]:
        return list(model.get_image_features(pixel_values=values).pooler_output[:, None, None])

    def embed(self, model: Any, batch: Any, features: Tensor | None, pad_id: int) -> Tensor:
        """Vectors (B, D) of rows; `features` (N, D) are those of the rows that have a picture, in order."""
        total = torch.zeros(len(batch), self.embedding_dim, device=batch.input_ids.device)
        seen = batch.input_ids[:, 0] == PICTURE
        if features is not None:
            total = total.index_add(0, seen.nonzero().squeeze(1), functional.normalize(features.float(), dim=-1))
        texts = [
            row[kept][int(first) :]
            for row, kept, first in zip(batch.input_ids, batch.attention_mask.bool(), seen, strict=True)
        ]
        rows = [index for index, text in enumerate(texts) if len(text)]
        if rows:
            vectors = self._read(model, [texts[index] for index in rows], pad_id)
            where = torch.tensor(rows, device=total.device)
            total = total.index_add(0, where, functional.normalize(vectors.float(), dim=-1))
        return total

    def _read(self, model: Any, texts: Sequence[Tensor], pad_id: int) -> Tensor:
        ids = nn.utils.rnn.pad_sequence(list(texts), batch_first=True, padding_value=pad_id)
        if self.fills_context:
            missing = self.config.text_config.max_position_embeddings - ids.shape[1]
            return model.get_text_features(functional.pad(ids, (0, missing), value=pad_id)).pooler_output
        lengths = torch.tensor([len(text) for text in texts], device=ids.device)
        mask = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
        return model.get_text_features(ids, attention_mask=mask).pooler_output


class Clip(DualEncoder):
    name = "clip"


class Siglip(DualEncoder):
    name = "siglip"
    fills_context = True

    @property
    def embedding_dim(self) -> int:
        return self.config.text_config.projection_size


class Siglip2(Siglip):
    """The fixed-resolution SigLIP 2 checkpoints are of type `siglip`; these keep a picture's aspect (NaFlex)."""

    name = "siglip2"

    def pictures(self, processor: Any, budget: PixelBudget) -> PicturePipeline:
        """`pixels.max_pixels` bounds the patches of a picture (by default the processor's, 256)."""
        if budget.min_pixels is not None:
            raise ModelError("pixels.min_pixels: siglip2 enlarges pictures to its patch budget; leave it out")
        most = processor.max_num_patches
        if budget.max_pixels is not None:
            most = max(1, budget.max_pixels // processor.patch_size**2)

        def process(image: Image.Image) -> tuple[np.ndarray, Grid]:
            made = processor(image, max_num_patches=most, return_tensors="np")
            rows, columns = made["spatial_shapes"][0]
            return made["pixel_values"], (int(rows), int(columns))

        return TilePipeline(process)

    def num_patches(self, picture: Picture) -> int:
        return int(picture.patches.shape[1])

    def encode(self, model: Any, pictures: Sequence[Picture], values: Tensor) -> Sequence[Tensor]:
        shapes = torch.tensor([picture.grid for picture in pictures], device=values.device)
        used = shapes.prod(dim=1, keepdim=True)
        mask = (torch.arange(values.shape[1], device=values.device) < used).int()
        output = model.get_image_features(pixel_values=values, pixel_attention_mask=mask, spatial_shapes=shapes)
        return list(output.pooler_output[:, None, None])
