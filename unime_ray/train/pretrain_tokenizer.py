"""The tiny model's own tokenizer: Qwen2's pipeline with a vocabulary of two thousand entries.

Names and keywords of the training concepts make the merges. The method's fixed sentences are single (plain, not
special) tokens, so that a judge prompt costs a tiny model a dozen tokens and not sixty; any other sentence still
tokenises, byte by byte if need be.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers import Regex as TokenizerRegex
from transformers import Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from unime_ray import prompts
from unime_ray.corpus.demo_rows import NAME_QUERY, PICTURE_QUERY, PICTURE_TEXT

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
FIND_PICTURE = PICTURE_QUERY.format("")
"""Ends in a blank, so that a name starts with the same token as a query and as a candidate."""
NAME_PICTURE = f"\n{NAME_QUERY}"
REPRESENT_PICTURE = f"\n{PICTURE_TEXT}"
USER, ASSISTANT, TURN_END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"
TURN_TOKENS = (USER, ASSISTANT, TURN_END)
"""Single tokens too, and special ones: what a user writes must never end the user's turn."""
TONES = tuple(f": {tone} skin tone" for tone in ("light", "medium-light", "medium", "medium-dark", "dark"))
SENTENCE_TOKENS = (
    prompts.JUDGE_INSTRUCTION,
    prompts.LISTWISE_INSTRUCTION,
    prompts.QUERY_SLOT,
    prompts.CANDIDATE_SLOT,
    " Candidates:",
    ", Query:",
    USER,
    ASSISTANT,
    TURN_END,
    FIND_PICTURE,
    NAME_PICTURE,
    REPRESENT_PICTURE,
    *TONES,
    "10",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(texts: Iterable[str], vocab_size: int = 2048) -> Qwen2Tokenizer:
    """Trains the byte-level BPE on `texts` and adds special and sentence tokens; `vocab_size` counts all of them."""
    words = [*texts, *[prompts.YES, prompts.NO] * 2000]  # often enough to be one token each, as the judge needs
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(TokenizerRegex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS) - len(SENTENCE_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(words, trainer)
    vocab, merges = _vocab_and_merges(bpe)
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, padding_side="left", **ends)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    for token in SENTENCE_TOKENS:
        tokenizer.add_tokens([AddedToken(token, special=token in TURN_TOKENS, normalized=False)])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _vocab_and_merges(bpe: Tokenizer) -> tuple[dict[str, int], Any]:
    model = json.loads(bpe.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def special_ids(tokenizer: Any) -> dict[str, int]:
    """Id of every special token."""
    return dict(zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)), strict=True))


def encode_all(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, nothing added."""
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"]
