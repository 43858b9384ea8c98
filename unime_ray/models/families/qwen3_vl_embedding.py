"""Qwen3-VL-Embedding: Qwen3-VL's class and weights' names, trained as an embedder with a chat prompt of its own.

As its authors' code has it: the instruction (by default `Represent the user's input.`) as the system turn, the picture
and then the text as the user's, the template's opening of an answer, and the vector at the last of these tokens; 4 to
1,800 image tokens a picture; the first dimensions of a vector are vectors too (`embed.dimensions`, 64 and up). Left
padding where they pad right: the same numbers. Where they cut an input at 8,192 tokens, here it is an error.

Its configuration says nothing that plain Qwen3-VL's doesn't, so a checkpoint is recognised by its name, or by the
entry `unime_ray_family` that training leaves in `config.json`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

from unime_ray.config import PixelBudget
from unime_ray.models.families.qwen_vl import Qwen3VL
from unime_ray.models.items import Item
from unime_ray.models.pixels import Picture, PixelPipeline
from unime_ray.models.tokens import PromptTokenizer, Segment, join
from unime_ray.prompts import IMAGE_MARKER

DEFAULT_INSTRUCTION = "Represent the user's input."
MIN_IMAGE_TOKENS, MAX_IMAGE_TOKENS = 4, 1800
SYSTEM_OPEN, USER_OPEN, TURN_CLOSE, ANSWER_OPEN = (
    "<|im_start|>system\n",
    "<|im_start|>user\n",
    "<|im_end|>\n",
    "<|im_start|>assistant\n",
)


class Qwen3VLEmbedding(Qwen3VL):
    name = "qwen3_vl_embedding"
    can_judge = False

    def segment(self, tokens: PromptTokenizer, item: Item, pictures: Sequence[Picture]) -> Segment:
        instruction, text = split_instruction(item)
        plain, special = tokens.text, lambda written: tokens.text(written, special=True)
        if len(pictures) != item.rendered.count(IMAGE_MARKER):
            return super().segment(tokens, item, pictures)  # raises, with the numbers
        if not pictures and not text:  # an instruction alone is what there is to read
            instruction, text = DEFAULT_INSTRUCTION, item.rendered
        if not pictures and not text:
            return plain("")
        parts = [special(SYSTEM_OPEN), plain(instruction), special(TURN_CLOSE + USER_OPEN)]
        parts += [tokens.picture(picture) for picture in pictures]
        parts += [plain(text)] if text else []
        return join([*parts, special(TURN_CLOSE + ANSWER_OPEN)])

    def pictures(self, processor: Any, budget: PixelBudget) -> PixelPipeline:
        token_pixels = (self.config.vision_config.patch_size * self.merge) ** 2
        published = PixelBudget(
            min_pixels=budget.min_pixels or MIN_IMAGE_TOKENS * token_pixels,
            max_pixels=budget.max_pixels or MAX_IMAGE_TOKENS * token_pixels,
        )
        return super().pictures(processor, published)


def split_instruction(item: Item) -> tuple[str, str]:
    """(instruction, text) of an item: its rendered text is the one before the other, with the picture's marker."""
    whole = _without_marker(item.rendered)
    text = _without_marker(item.text or "")
    instruction = whole[: len(whole) - len(text)].strip() if text and whole.endswith(text) else ""
    if not text:
        instruction = whole
    elif not whole.endswith(text):
        text = whole
    if instruction and not unicodedata.category(instruction[-1]).startswith("P"):
        instruction += "."
    return instruction or DEFAULT_INSTRUCTION, text


def _without_marker(text: str) -> str:
    return " ".join(part.strip() for part in text.split(IMAGE_MARKER) if part.strip())
