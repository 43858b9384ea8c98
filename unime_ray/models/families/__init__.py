"""One adapter a family of checkpoints: its prompt, its pooling, its image budget, its modules' names.

    base                the contract            qwen_vl             Qwen2-VL, Qwen2.5-VL, Qwen3-VL
    qwen3_vl_embedding  Qwen3-VL-Embedding      llava_onevision     LLaVA-OneVision
    internvl            InternVL3               dual_encoder        CLIP, SigLIP, SigLIP 2

A family is found by the `model_type` of a checkpoint's configuration.
"""

from __future__ import annotations

from typing import Any

from unime_ray.errors import ModelError
from unime_ray.models.families.base import Family
from unime_ray.models.families.dual_encoder import Clip, DualEncoder, Siglip, Siglip2
from unime_ray.models.families.internvl import InternVL
from unime_ray.models.families.llava_onevision import LlavaOnevision
from unime_ray.models.families.qwen3_vl_embedding import Qwen3VLEmbedding
from unime_ray.models.families.qwen_vl import Qwen2VL, Qwen3VL, Qwen25VL, QwenVL

__all__ = ["FAMILIES", "DualEncoder", "Family", "QwenVL", "check_judge", "family_of"]

FAMILIES: dict[str, type[Family]] = {
    family.name: family for family in (Qwen2VL, Qwen25VL, Qwen3VL, LlavaOnevision, InternVL, Clip, Siglip, Siglip2)
}
"""By the `model_type` of a configuration. Qwen3-VL-Embedding has Qwen3-VL's."""


def family_of(config: Any, name: str = "") -> Family:
    """The family of a checkpoint's configuration; `name` is what the checkpoint is called.

    Raises:
        ModelError: an architecture that no family here covers.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        found = ", ".join(config.architectures or [config.model_type])
        raise ModelError(f"model {name}: architecture {found} is not supported; supported: {', '.join(FAMILIES)}")
    if family is Qwen3VL and _is_embedding(config, name):
        return Qwen3VLEmbedding(config)
    return family(config)


def check_judge(family: Family, name: str) -> None:
    """Raise ModelError unless checkpoints of this family can judge and rerank."""
    if family.can_judge:
        return
    kind = "a dual encoder" if isinstance(family, DualEncoder) else "an embedding model"
    able = ", ".join(key for key, other in FAMILIES.items() if other.can_judge)
    raise ModelError(f"model {name}: {family.name} is {kind}: it embeds, but cannot judge or rerank; use one of {able}")


def _is_embedding(config: Any, name: str) -> bool:
    marked = getattr(config, "unime_ray_family", None)
    if marked is not None:
        return marked == Qwen3VLEmbedding.name
    return "qwen3-vl-embedding" in name.lower().replace("_", "-").rstrip("/").rsplit("/", 1)[-1]
