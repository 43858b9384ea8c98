"""Low-rank adapters in a backbone, and full checkpoints out of them that plain transformers loads again.

The published embedder trains rank 16, alpha 64, dropout 0.1, DoRA, Gaussian start, on the language model's q, k, v, o
and down projections. Adapters are put into the backbone's own model in place, so its forward uses them at once.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
from torch import nn
from transformers.utils import cached_file

from unime_ray.config import LoraConfig
from unime_ray.errors import ModelError
from unime_ray.models.backbone import Backbone
from unime_ray.models.families import Family, family_of

SIDE_FILES = (
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
"""Copied beside saved weights if the base checkpoint has them: vLLM and AutoProcessor read some of these."""


def apply_lora(model: nn.Module, config: LoraConfig) -> nn.Module:
    """Make `model` trainable as `config` says, in place; returns what to train (a peft model, or `model` if rank 0).

    Everything but the adapters is frozen. With rank 0 all weights train; the vision tower's and its projector's only if
    `train_vision`.

    Raises:
        ModelError: no module of the model has one of `target_modules`.
    """
    family = family_of(model.config)
    if config.rank == 0:
        model.requires_grad_(True)
        for weight in family.vision_parameters(model):
            weight.requires_grad_(config.train_vision)
        return model
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        use_dora=config.dora,
        init_lora_weights="gaussian" if config.init == "gaussian" else True,
        target_modules=target_pattern(config, family),
    )
    try:
        return peft.get_peft_model(model, settings)  # type: ignore[arg-type]
    except ValueError as error:
        wanted = ", ".join(config.target_modules)
        raise ModelError(f"lora.target_modules: the model's language part has none of {wanted}") from error


def target_pattern(config: LoraConfig, family: Family) -> str:
    """Full-match pattern of adapted module names: the language model's targets and, with `train_vision`, the vision
    tower's (`vision_modules`, by default all linear layers of its blocks)."""
    pattern = _modules(family.language_path, [family.lora_names.get(name, name) for name in config.target_modules])
    if config.train_vision:
        vision = _modules(family.vision_path, config.vision_modules or family.vision_linears)
        pattern = f"({pattern}|{vision})"
    return pattern


def _modules(path: str, names: Sequence[str]) -> str:
    return rf".*{path}\..*\b({'|'.join(re.escape(name) for name in names)})"


def merge_and_save(model: Any, backbone: Backbone, path: str | Path, adapter: str | Path | None = None) -> None:
    """Write a full checkpoint to folder `path`: merged weights, tokenizer with chat template, processor.

    `model` is what `apply_lora` returned for `backbone.model`. Adapters are merged into the backbone for good: save at
    the end of training. `adapter`: a folder that gets the adapter alone, before it is merged.
    """
    if isinstance(model, peft.PeftModel):
        if adapter is not None:
            model.save_pretrained(str(adapter))
        model = model.merge_and_unload()
    if model is not backbone.model:
        raise ModelError("merge_and_save: the model is not the one this backbone holds")
    backbone.forget_features()
    backbone.model.save_pretrained(str(path))
    backbone.tokens.tokenizer.save_pretrained(str(path))
    backbone.processor.save_pretrained(str(path))
    _copy_side_files(backbone.path, Path(path))


def _copy_side_files(source: str, target: Path) -> None:
    options: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False, "local_files_only": True}
    for name in SIDE_FILES:
        found = cached_file(source, name, **options)
        if found is not None and not (target / name).exists():
            shutil.copyfile(found, target / name)
