"""What can be known of a checkpoint without its weights: family, tokenizer, and which roles it can take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
from transformers.utils import cached_file

from unime_ray.config import PixelBudget
from unime_ray.errors import ModelError
from unime_ray.models.families import Family, check_judge, family_of
from unime_ray.models.names import resolve_model
from unime_ray.models.pixels import CHECKPOINT_BUDGET
from unime_ray.models.prompt_ids import UNIME_V2, PromptIds
from unime_ray.models.tokens import PromptTokenizer
from unime_ray.prompts import JudgePrompt


def read_tokens(model: str, revision: str | None = None) -> tuple[Family, PromptTokenizer]:
    """A checkpoint's family and tokenizer; its weights are not touched.

    Raises:
        ModelError: no such model, an architecture of no family, a tokenizer without the image token.
    """
    path, family = resolve_model(model), read_family(model, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, padding_side="left")
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"model {model}: its tokenizer cannot be loaded ({first_line(error)})") from error
    if not tokenizer.chat_template:
        tokenizer.chat_template = _processor_template(path, revision)
    return family, family.prompt_tokenizer(tokenizer, model)


def read_family(model: str, revision: str | None = None) -> Family:
    """The family of a checkpoint, from its configuration.

    Raises:
        ModelError: no such model, a configuration that cannot be read, or an architecture of no family.
    """
    try:
        config = AutoConfig.from_pretrained(resolve_model(model), revision=revision)
    except (OSError, ValueError) as error:
        raise ModelError(f"model {model}: cannot read its config ({first_line(error)})") from error
    return family_of(config, model)


def _processor_template(path: str, revision: str | None) -> str | None:
    """The chat template where some checkpoints keep it: in the processor's `chat_template.json`."""
    found = cached_file(path, "chat_template.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    if found is None:
        return None
    template = json.loads(Path(found).read_text()).get("chat_template")
    return template if isinstance(template, str) else None


def read_processor(model: str, revision: str | None = None) -> Any:
    """A checkpoint's image processor.

    Raises:
        ModelError: it has none, so it cannot take pictures.
    """
    try:
        # The PIL backend: the default one needs torchvision.
        return AutoImageProcessor.from_pretrained(resolve_model(model), revision=revision, backend="pil")
    except (OSError, ValueError, ImportError) as error:
        reason = first_line(error)
        raise ModelError(f"model {model}: no image processor, so it cannot take pictures ({reason})") from error


def check_model(
    model: str,
    *,
    revision: str | None = None,
    needs_answers: bool = False,
    prompt: JudgePrompt = UNIME_V2,
    pixels: PixelBudget = CHECKPOINT_BUDGET,
) -> None:
    """Raise ModelError unless `model` can embed within `pixels` and, with `needs_answers`, judge and rerank.

    Reads the configuration, the tokenizer and the image processor only: cheap enough to do before any work starts.
    """
    family, tokens = read_tokens(model, revision)
    family.pictures(read_processor(model, revision), pixels)
    if needs_answers:
        check_judge(family, model)
        PromptIds(tokens, judge_prompt=prompt)


def embedding_dim(model: str, revision: str | None = None) -> int:
    """Width of a checkpoint's vectors.

    Raises:
        ModelError: no such model, or an architecture of no family.
    """
    return read_family(model, revision).embedding_dim


def shares_prefix(model: str, revision: str | None = None) -> bool:
    """Whether a judge of this checkpoint computes a prompt's shared part once.

    Raises:
        ModelError: no such model, or an architecture of no family.
    """
    return read_family(model, revision).can_share_prefix


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
