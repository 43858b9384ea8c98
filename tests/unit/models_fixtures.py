"""Tiny random checkpoints of each family, saved to a folder and loaded like a real one; items with real pictures."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from unime_ray import prompts
from unime_ray.ids import image_id, item_id

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
PATCH, MERGE = 8, 2
# Qwen2's own pattern: digits one by one, a mark may stick to the word after it.
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class FakeItem:
    """The shape of an item as models see it."""

    item_id: bytes
    rendered: str
    text: str | None
    image_id: bytes | None
    image: bytes | None


def picture(seed: int, width: int = 48, height: int = 48) -> bytes:
    """A PNG of smooth random colours."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def make_item(text: str | None, image: bytes | None = None, instruction: str | None = None) -> FakeItem:
    rendered = prompts.render(text, image is not None, instruction)
    key = image_id(image) if image is not None else None
    return FakeItem(item_id(rendered, key), rendered, text, key, image)


def mixed_items() -> list[FakeItem]:
    """Text only, picture only, both; several sizes that need resizing; one long text."""
    return [
        make_item("a red fox"),
        make_item(None, picture(1, 64, 64)),
        make_item("a woman running: dark skin tone", picture(2, 90, 40)),
        make_item("keep it short", picture(3, 33, 120), "Find a picture like this one."),
        make_item("words upon words " * 12),
        make_item(None, picture(4, 17, 23)),
        make_item("No", picture(1, 64, 64)),
        make_item("Yes"),
    ]


def build_tokenizer(words: tuple[str, ...] = ("Yes", "No", "yes", "no")) -> PreTrainedTokenizerFast:
    """Byte-level BPE of a few hundred tokens, in which each of `words` is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PATTERN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [prompts.JUDGE_INSTRUCTION.replace("Yes", "y").replace("No", "n"), prompts.LISTWISE_INSTRUCTION]
    tokenizer.train_from_iterator([*corpus, *(word for word in words for _ in range(50))], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL[1:],
        chat_template=CHAT_TEMPLATE,
    )


def save_checkpoint(folder: Path, family: str = "qwen2_vl", tokenizer: Any = None, **text: Any) -> Path:
    """Write a random checkpoint of `family`; `text` overrides entries of its text config."""
    tokenizer = tokenizer or build_tokenizer()
    torch.manual_seed(0)
    model = _model(family, tokenizer, text)
    randomise(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=MERGE, size={"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    ).save_pretrained(folder)
    return folder


def randomise(model: torch.nn.Module) -> None:
    """Weights large enough that what a model is given shows in what it answers."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def _model(family: str, tokenizer: Any, overrides: dict[str, Any]) -> Any:
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "tie_word_embeddings": True,
        "pad_token_id": ids["<|endoftext|>"],
        **overrides,
    }
    vision: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": MERGE}
    common = {
        "text_config": text,
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": True,
    }
    if family == "qwen2_vl":
        vision |= {"embed_dim": 64, "hidden_size": 64, "mlp_ratio": 2}
        return Qwen2VLForConditionalGeneration(Qwen2VLConfig(vision_config=vision, **common))
    vision |= {"hidden_size": 64, "out_hidden_size": 64, "intermediate_size": 96}
    if family == "qwen2_5_vl":
        vision |= {"window_size": 32, "fullatt_block_indexes": [1]}
        return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(vision_config=vision, **common))
    # As published checkpoints say it: transformers always interleaves, vLLM reads whether to.
    text["rope_parameters"] |= {"mrope_section": [6, 5, 5], "mrope_interleaved": True}
    vision |= {"num_position_embeddings": 36, "deepstack_visual_indexes": [0]}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(vision_config=vision, **common))
