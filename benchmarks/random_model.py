"""A small random Qwen2-VL checkpoint whose prompts are as long as a real one's: for timing, its scores mean nothing."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.unit.models_fixtures import SPECIAL, build_tokenizer

PATCH, MERGE = 14, 2
TOKEN_SIDE = PATCH * MERGE
"""Side in pixels of what one picture token shows."""


def save_random_model(folder: Path, picture_tokens: int = 64, hidden: int = 128, layers: int = 3) -> str:
    """Write the checkpoint; pictures become about `picture_tokens` tokens (64: 224x224 pixels)."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": max(hidden // 128, 1),
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
        "tie_word_embeddings": True,
        "pad_token_id": ids["<|endoftext|>"],
    }
    vision = {
        "depth": layers,
        "embed_dim": hidden // 2,
        "num_heads": hidden // 128,
        "hidden_size": hidden,
        "mlp_ratio": 4,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
    }
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    pixels = picture_tokens * TOKEN_SIDE**2
    size = {"shortest_edge": pixels, "longest_edge": pixels}
    Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=MERGE, size=size).save_pretrained(folder)
    return str(folder)
