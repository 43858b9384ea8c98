"""What tells one family of checkpoints from another; `Backbone` does the rest.

A family is made from a checkpoint's configuration alone, so that a run can be checked before any weights are read.

Shapes: B rows, T tokens, D hidden width, M image tokens of a picture, X = 1 + deepstack layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from unime_ray.config import PixelBudget
from unime_ray.models import attention
from unime_ray.models.items import Item
from unime_ray.models.last_token import spare_last_layer
from unime_ray.models.pixels import Picture, PicturePipeline
from unime_ray.models.tokens import Grid, PromptTokenizer, Segment

if TYPE_CHECKING:
    from unime_ray.models.backbone import Batch

SHARING_TEXT_MODELS = ("qwen2", "qwen3", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text")
"""Language models whose attention over a shared prefix is held to the whole prompt's by a test."""


class Family(ABC):
    """A vision-language model: pictures become tokens among the text's, and the last token says it all."""

    name: ClassVar[str]
    auto_class: ClassVar[Any] = AutoModelForImageTextToText
    can_judge: ClassVar[bool] = True
    padding_side: ClassVar[str] = "left"
    """Where rows to embed are padded, as the family's published code does."""
    num_axes: ClassVar[int] = 1
    """Axes of a token's position: 3 with M-RoPE."""
    language_path: ClassVar[str] = r"language_model\.layers\.\d+"
    vision_path: ClassVar[str]
    """Pattern of the vision tower's blocks in module names."""
    vision_linears: ClassVar[tuple[str, ...]]
    lora_names: ClassVar[dict[str, str]] = {}
    """What modules of the usual names (`o_proj`, `down_proj`) are called here."""

    def __init__(self, config: Any) -> None:
        self.config = config

    # -- from the configuration and the tokenizer -------------------------------------------------------------------

    @property
    def embedding_dim(self) -> int:
        """Width of the vectors."""
        return self.config.get_text_config().hidden_size

    @property
    def max_tokens(self) -> int:
        """Longest input in tokens."""
        return self.config.get_text_config().max_position_embeddings

    @property
    def can_share_prefix(self) -> bool:
        """Whether suffixes may attend to all of a shared prefix: not if some layer's attention slides, nor in a
        language model that was never tried."""
        text = self.config.get_text_config()
        kinds = getattr(text, "layer_types", None) or ["full_attention"]
        return text.model_type in SHARING_TEXT_MODELS and all(kind == "full_attention" for kind in kinds)

    def prompt_tokenizer(self, tokenizer: Any, name: str) -> PromptTokenizer:
        """The tokenizer as a maker of segments.

        Raises:
            ModelError: it does not know the tokens that pictures stand on.
        """
        opening, closing = self.picture_marks(tokenizer)
        image = self.config.image_token_id
        return PromptTokenizer(tokenizer, image, self.layout, name, needed=(image, *opening, *closing))

    def picture_marks(self, tokenizer: Any) -> tuple[list[int | None], list[int | None]]:
        """Tokens that open and close a picture."""
        return [], []

    @abstractmethod
    def layout(self, tokens: PromptTokenizer, grid: Grid) -> Segment:
        """The tokens of a picture."""

    def segment(self, tokens: PromptTokenizer, item: Item, pictures: Sequence[Picture]) -> Segment:
        """The exact input of an item to embed: raw text without chat template, as UniME-V2's published code has it.

        Raises:
            RejectedRow: as many markers as pictures are needed.
        """
        return tokens.rendered(item.rendered, pictures)

    # -- with the weights -------------------------------------------------------------------------------------------

    @abstractmethod
    def pictures(self, processor: Any, budget: PixelBudget) -> PicturePipeline:
        """What the checkpoint's image processor does, within a pixel budget.

        Raises:
            ModelError: the processor is another family's, or the budget cannot be kept.
        """

    def attach(self, model: Any) -> None:
        """Fit a loaded model for what `Backbone` asks of it, in place; weights and module names stay."""
        self.language_model(model).config._attn_implementation = attention.NAME
        if self.can_share_prefix:
            spare_last_layer(list(self.layers(model))[-1])

    def anchor(self, model: Any) -> Tensor:
        """A weight whose device and dtype are the model's."""
        return model.lm_head.weight

    def language_model(self, model: Any) -> Any:
        return model.model.language_model

    def layers(self, model: Any) -> Iterable[nn.Module]:
        """The language model's layers."""
        return self.language_model(model).layers

    def vision_modules(self, model: Any) -> list[nn.Module]:
        """All that turns pixels into picture features."""
        return [model.model.vision_tower, model.model.multi_modal_projector]

    def vision_parameters(self, model: Any) -> Iterator[nn.Parameter]:
        return (weight for module in self.vision_modules(model) for weight in module.parameters())

    def num_patches(self, picture: Picture) -> int:
        """Patches of a picture that pass the vision tower: what its forward pass costs."""
        return len(picture.patches)

    @abstractmethod
    def encode(self, model: Any, pictures: Sequence[Picture], values: Tensor) -> Sequence[Tensor]:
        """Features (X, M, D) of each picture; `values` is what `PicturePipeline.normalise` made of all."""

    def run(self, model: Any, embedded: Tensor, batch: Batch, **kwargs: Any) -> Tensor:
        """The language model over embedded tokens (B, T, D): last hidden states (B, T, D), after the final norm."""
        positions = batch.position_ids if self.num_axes > 1 else batch.position_ids[0]
        output = self.language_model(model)(inputs_embeds=embedded, position_ids=positions, use_cache=False, **kwargs)
        return output.last_hidden_state

    def plain_inputs(self, batch: Batch, pixels: PicturePipeline) -> dict[str, Tensor]:
        """Keyword arguments of transformers' own forward for the same rows."""
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if batch.pictures:
            inputs["pixel_values"] = pixels.normalise(batch.pictures, batch.input_ids.device)
        return inputs


def sizes_of(pictures: Sequence[Picture]) -> Tensor:
    """(N, 2): the pictures' grids."""
    return torch.tensor([picture.grid for picture in pictures])
