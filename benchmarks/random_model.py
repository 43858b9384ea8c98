"""Random Qwen2-VL checkpoints whose prompts are as long as a real one's: for timing, their scores mean nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.unit.models_fixtures import SPECIAL, build_tokenizer

PATCH, MERGE = 14, 2
TOKEN_SIDE = PATCH * MERGE
"""Side in pixels of what one picture token shows."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen2-VL."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    vision_layers: int
    vision_width: int
    vision_heads: int
    vocabulary: int | None = None
    """None: the tokenizer's."""


PUBLISHED = {
    "2B": Shape(1536, 8960, 28, 12, 2, 32, 1280, 16, 151936),
    "7B": Shape(3584, 18944, 28, 28, 4, 32, 1280, 16, 152064),
}
"""Qwen2-VL-2B; Qwen2-VL-7B, whose language model Qwen2.5-VL-7B has too."""
SHAPES = tuple(PUBLISHED)


def small_shape(hidden: int = 128, layers: int = 3, vocabulary: int | None = None) -> Shape:
    """`hidden` a multiple of 128; the vision tower is half as wide."""
    key_heads = max(hidden // 128, 1)
    return Shape(hidden, 3 * hidden, layers, hidden // 64, key_heads, layers, hidden // 2, hidden // 128, vocabulary)


def config_of(shape: Shape, tokenizer: Any) -> Qwen2VLConfig:
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    half = shape.hidden // shape.heads // 2  # the axes share the rotary pairs 1 : 1.5 : 1.5
    text = {
        "vocab_size": max(shape.vocabulary or 0, len(tokenizer)),
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_heads,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [half // 4, 3 * half // 8, 3 * half // 8],
        },
        "tie_word_embeddings": True,
        "pad_token_id": ids["<|endoftext|>"],
    }
    vision = {
        "depth": shape.vision_layers,
        "embed_dim": shape.vision_width,
        "num_heads": shape.vision_heads,
        "hidden_size": shape.hidden,
        "mlp_ratio": 4,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
    }
    return Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def save_random_model(folder: Path, picture_tokens: int, shape: Shape, dtype: str = "float32") -> str:
    """Write the checkpoint; pictures become about `picture_tokens` tokens (64: 224x224 pixels)."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = Qwen2VLForConditionalGeneration._from_config(config_of(shape, tokenizer), dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    pixels = picture_tokens * TOKEN_SIDE**2
    size = {"shortest_edge": pixels, "longest_edge": pixels}
    Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=MERGE, size=size).save_pretrained(folder)
    return str(folder)
