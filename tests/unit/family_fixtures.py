"""Tiny random checkpoints of the families beyond Qwen's plain three: real classes, everything made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CLIPConfig,
    CLIPModel,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from tests.unit.models_fixtures import build_tokenizer, randomise, save_checkpoint
from unime_ray import prompts

GENERATIVE = ("qwen3_vl_embedding", "llava_onevision", "internvl")
DUAL = ("clip", "siglip", "siglip2")
TILE, PATCH = 16, 8
PINPOINTS = [[TILE * rows, TILE * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]
# Pictures are not part of these templates: the project puts them where the text's marker is.
PARTS_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} \n"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_family(folder: Path, family: str, **changes: Any) -> Path:
    """Write a random checkpoint of `family` whose folder may carry the family's name; `changes` go to its config."""
    if family == "qwen3_vl_embedding":
        return save_checkpoint(folder / "Qwen3-VL-Embedding-tiny", "qwen3_vl", **changes)
    torch.manual_seed(0)
    made = {"llava_onevision": _llava, "internvl": _internvl, "clip": _clip, "siglip": _siglip, "siglip2": _siglip2}
    model, tokenizer, processor = made[family](**changes)
    randomise(model)
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)
    return folder


def text_config(tokenizer: Any, **changes: Any) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        **changes,
    }


def _tower(**changes: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return sizes | {"image_size": TILE, "patch_size": PATCH} | changes


def _llava(**changes: Any) -> tuple[Any, Any, Any]:
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<video>"]})
    tokenizer.chat_template = PARTS_TEMPLATE
    config = LlavaOnevisionConfig(
        text_config=text_config(tokenizer, **changes),
        vision_config=_tower(model_type="siglip_vision_model", vision_use_head=False),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_4",
        tie_word_embeddings=True,
    )
    processor = LlavaOnevisionImageProcessorPil(size={"height": TILE, "width": TILE}, image_grid_pinpoints=PINPOINTS)
    return LlavaOnevisionForConditionalGeneration(config), tokenizer, processor


def _internvl(**changes: Any) -> tuple[Any, Any, Any]:
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<img>", "</img>", "<IMG_CONTEXT>"]})
    config = InternVLConfig(
        text_config=text_config(tokenizer, **changes),
        vision_config=_tower(image_size=[TILE, TILE], patch_size=[PATCH, PATCH], attention_bias=True),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=1,
        tie_word_embeddings=True,
    )
    # The published files say crop_to_patches false too: InternVL's processor turns it on.
    processor = GotOcr2ImageProcessorPil(size={"height": TILE, "width": TILE}, crop_to_patches=False, max_patches=6)
    return InternVLForConditionalGeneration(config), tokenizer, processor


def clip_tokenizer() -> PreTrainedTokenizerFast:
    """Lower-cased words' pieces between a start and an end token, padded with the end token as CLIP's are."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|startoftext|>", "<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([prompts.JUDGE_INSTRUCTION], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=[(token, n) for n, token in enumerate(special)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1], pad_token=special[1]
    )


def _clip(**changes: Any) -> tuple[Any, Any, Any]:
    tokenizer = clip_tokenizer()
    text = _tower(vocab_size=len(tokenizer), max_position_embeddings=24, hidden_act="quick_gelu", **changes)
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = CLIPConfig(text_config=text, vision_config=_tower(), projection_dim=40)
    processor = CLIPImageProcessorPil(size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE})
    return CLIPModel(config), tokenizer, processor


def _siglip(**changes: Any) -> tuple[Any, Any, Any]:
    tokenizer = clip_tokenizer()
    text = _tower(vocab_size=len(tokenizer), max_position_embeddings=24, **changes)
    config = SiglipConfig(text_config=text, vision_config=_tower())
    return SiglipModel(config), tokenizer, SiglipImageProcessorPil(size={"height": TILE, "width": TILE})


def _siglip2(**changes: Any) -> tuple[Any, Any, Any]:
    tokenizer = clip_tokenizer()
    text = _tower(vocab_size=len(tokenizer), max_position_embeddings=24, **changes)
    vision = {key: value for key, value in _tower(num_patches=16).items() if key != "image_size"}
    config = Siglip2Config(text_config=text, vision_config=vision)
    return Siglip2Model(config), tokenizer, Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=12)
