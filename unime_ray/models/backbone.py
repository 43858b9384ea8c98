"""A checkpoint: model, tokenizer and image processor, and what every task needs of them, whatever its family.

The language model is called directly with embedded tokens and explicit positions (segments carry them), so with M-RoPE
neither `get_rope_index` nor `rope_deltas` is involved, and picture features can come from a cache.

Shapes: B rows, T tokens of the longest, D hidden width, M image tokens of a picture, X = 1 + deepstack layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from unime_ray.config import PixelBudget
from unime_ray.errors import ModelError, RejectedRow
from unime_ray.models.cache import ByteCache
from unime_ray.models.families import DualEncoder, Family
from unime_ray.models.items import Item
from unime_ray.models.loading import first_line, read_processor, read_tokens
from unime_ray.models.names import resolve_model
from unime_ray.models.pixels import CHECKPOINT_BUDGET, Grid, Picture
from unime_ray.models.tokens import PromptTokenizer, Segment

FEATURE_CACHE_BYTES = {"cpu": 512 << 20, "cuda": 4 << 30}
CPU_BATCH_TOKENS = 4096
"""Measured with a 3M-parameter model: 2048 and 4096 are fastest, 16384 costs a quarter more."""
VISION_BATCH_PATCHES = 2048
"""Patches that go through the vision tower at once; a larger single picture still goes alone."""


@dataclass(frozen=True)
class Batch:
    """Rows padded to one length. Also what plain transformers takes: `model(**batch.model_inputs(backbone))`."""

    input_ids: Tensor
    """(B, T) int64"""
    attention_mask: Tensor
    """(B, T) int64: 1 where a token is"""
    position_ids: Tensor
    """(3, B, T) int64: M-RoPE positions (time, row, column); three times the same in families without"""
    last: Tensor
    """(B,) int64: index of each row's last token"""
    pictures: tuple[Picture, ...] = field(default=())
    """In order of their tokens, row after row."""

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        names = ("input_ids", "attention_mask", "position_ids", "last")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})

    def model_inputs(self, backbone: Backbone) -> dict[str, Tensor]:
        """Keyword arguments of transformers' own forward: pixel values, grids and token types included."""
        return backbone.family.plain_inputs(self, backbone.pixels)


class Backbone:
    """One loaded checkpoint. `model` is transformers' own class; adapters may be put into it in place."""

    def __init__(
        self, model: Any, family: Family, tokens: PromptTokenizer, processor: Any, pixels: PixelBudget, path: str
    ) -> None:
        self.model, self.family, self.tokens, self.processor, self.path = model, family, tokens, processor, path
        self.pixels = family.pictures(processor, pixels)
        self.max_tokens = family.max_tokens
        self.pad_id: int = tokens.tokenizer.pad_token_id or 0
        self._features: ByteCache[bytes, tuple[Grid, Tensor]] = ByteCache(
            FEATURE_CACHE_BYTES.get(self.device.type, 512 << 20)
        )
        self._shared: dict[bytes, Tensor] | None = None
        self.pictures_encoded = 0
        """Pictures that went through the vision tower without gradients so far."""
        family.attach(model)

    @classmethod
    def load(
        cls,
        model: str,
        *,
        revision: str | None = None,
        dtype: str = "float32",
        device: str | torch.device | None = None,
        pixels: PixelBudget = CHECKPOINT_BUDGET,
    ) -> Backbone:
        """Load `model` (`tiny`, a folder or a hub id) for inference; device: CUDA if there is one, else the CPU.

        Raises:
            ModelError: no such model, an architecture of no family, no image processor of the family, a tokenizer
                without the image token.
        """
        path = resolve_model(model)
        disable_progress_bar()  # one line per shard and actor would drown a job's own log
        family, tokens = read_tokens(model, revision)
        processor = read_processor(model, revision)
        try:
            loaded = family.auto_class.from_pretrained(
                path, config=family.config, revision=revision, dtype=getattr(torch, dtype)
            )
        except (OSError, ValueError) as error:
            raise ModelError(f"model {model}: cannot be loaded ({first_line(error)})") from error
        where = torch.device(device) if device is not None else default_device()
        if family.name != loaded.config.model_type:
            loaded.config.unime_ray_family = family.name  # a saved checkpoint tells what its folder's name may not
        return cls(loaded.eval().to(where), family, tokens, processor, pixels, path)

    @property
    def device(self) -> torch.device:
        return self.family.anchor(self.model).device

    @property
    def dtype(self) -> torch.dtype:
        return self.family.anchor(self.model).dtype

    @property
    def hidden_size(self) -> int:
        """Width of the vectors."""
        return self.family.embedding_dim

    @property
    def trains_vision(self) -> bool:
        """Whether picture features change in training, so that they must not be cached."""
        return any(weight.requires_grad for weight in self.family.vision_parameters(self.model))

    @property
    def yes_id(self) -> int:
        return self.tokens.answer_ids()[0]

    @property
    def no_id(self) -> int:
        return self.tokens.answer_ids()[1]

    def batch_budget(self, batch_tokens: int) -> int:
        """Tokens to run at once: `batch_tokens`, but on a CPU no more than its caches are good for."""
        return min(batch_tokens, CPU_BATCH_TOKENS) if self.device.type == "cpu" else batch_tokens

    @property
    def can_share_prefix(self) -> bool:
        """Whether suffixes may attend to all of a shared prefix (see `Family.can_share_prefix`)."""
        return self.family.can_share_prefix

    def encode_text(self, rendered: str) -> list[int]:
        """Token ids of a text without a picture."""
        return self.tokens.encode_text(rendered)

    def chat_wrap(self) -> tuple[str, str]:
        """What the chat template puts around a user's turn, up to where the answer starts."""
        return self.tokens.chat_wrap()

    def pictures(self, items: Sequence[Item]) -> list[Picture | RejectedRow | None]:
        """Each item's picture (`PicturePipeline.of_items`); one whose features are cached is not decoded again."""
        trained = torch.is_grad_enabled() and self.trains_vision
        return self.pixels.of_items(items, (lambda key: None) if trained else self._known_grid)

    def _known_grid(self, key: bytes) -> Grid | None:
        cached = self._features.get(key)
        return None if cached is None else cached[0]

    def segments(self, items: Sequence[Item]) -> list[Segment | RejectedRow]:
        """The exact input of each item to embed; an item that cannot be used is its reason instead."""
        return [self._segment(item, picture) for item, picture in zip(items, self.pictures(items), strict=True)]

    def prepare(self, items: Sequence[Item], padding_side: str | None = None) -> Batch:
        """A batch of items.

        Raises:
            RejectedRow: an item's picture does not decode, or its text has no place for it.
        """
        segments = self.segments(items)
        for segment in segments:
            if isinstance(segment, RejectedRow):
                raise segment
        return self.collate([segment for segment in segments if isinstance(segment, Segment)], padding_side)

    def collate(self, segments: Sequence[Segment], padding_side: str | None = None) -> Batch:
        """Rows padded to the longest, on the model's device. Padding takes part in nothing, whichever side it is on
        (default: the family's)."""
        padding_side = padding_side or self.family.padding_side
        lengths = np.array([len(segment) for segment in segments])
        width = int(lengths.max())
        starts = width - lengths if padding_side == "left" else np.zeros_like(lengths)
        ids = np.full((len(segments), width), self.pad_id, dtype=np.int64)
        positions = np.zeros((3, len(segments), width), dtype=np.int64)
        mask = np.zeros((len(segments), width), dtype=np.int64)
        for row, (segment, start) in enumerate(zip(segments, starts, strict=True)):
            span = slice(start, start + len(segment))
            ids[row, span], positions[:, row, span], mask[row, span] = segment.ids, segment.positions, 1
        pictures = tuple(picture for segment in segments for picture in segment.pictures)
        tensors = [torch.from_numpy(array) for array in (ids, mask, positions, starts + lengths - 1)]
        return Batch(tensors[0], tensors[1], tensors[2], tensors[3], pictures).to(self.device)

    def features(self, pictures: Sequence[Picture]) -> Tensor:
        """What the vision tower makes of pictures: (X, sum of M, D); deepstack features (Qwen3-VL) follow the first.

        A picture that repeats is computed once; its features are kept by content unless the tower is being trained.
        """
        trained = torch.is_grad_enabled() and self.trains_vision
        found = self._with_gradients(pictures) if trained else self._from_cache(pictures)
        return torch.cat([found[picture.key] for picture in pictures], dim=1)

    @contextmanager
    def sharing_pictures(self) -> Iterator[None]:
        """Within, a trained vision tower computes a picture once for all batches that show it, gradients included."""
        self._shared = {}
        try:
            yield
        finally:
            self._shared = None

    def _with_gradients(self, pictures: Sequence[Picture]) -> dict[bytes, Tensor]:
        found = {} if self._shared is None else self._shared
        missing = list({p.key: p for p in pictures if p.key not in found}.values())
        found |= zip((picture.key for picture in missing), self._encode(missing), strict=True)
        return found

    @torch.no_grad()
    def _from_cache(self, pictures: Sequence[Picture]) -> dict[bytes, Tensor]:
        cached = {picture.key: self._features.get(picture.key) for picture in pictures}
        found = {key: entry[1] for key, entry in cached.items() if entry is not None}
        missing = list({p.key: p for p in pictures if p.key not in found}.values())
        self.pictures_encoded += len(missing)
        for picture, encoded in zip(missing, self._encode(missing), strict=True):
            found[picture.key] = encoded
            # A copy: a view would keep the features of its whole batch alive.
            self._features.put(picture.key, (picture.grid, encoded.clone()), encoded.nbytes)
        return found

    def limit_feature_cache(self, max_bytes: int) -> None:
        """Keep at most so many bytes of picture features; 0 keeps none."""
        self._features = ByteCache(max_bytes)

    def forget_features(self) -> None:
        """Drop cached picture features: call it when the vision tower's weights have changed."""
        self._features.clear()

    def run_language_model(self, batch: Batch, **kwargs: Any) -> Tensor:
        """Last hidden states (B, T, D), after the final norm. `kwargs` go to the language model's forward.

        With `last=batch.last` or a `collector` the last layer does only what is asked for (see `last_token`).
        """
        embedded = self.family.language_model(self.model).embed_tokens(batch.input_ids)
        if batch.pictures:
            features = self.features(batch.pictures).to(embedded.dtype)
            where = batch.input_ids == self.tokens.image_token_id
            embedded = embedded.masked_scatter(where.unsqueeze(-1), features[0])
            if features.shape[0] > 1:
                # Added after the first layers; what comes after the last one's would reach no other token.
                deep = features[1 : len(list(self.family.layers(self.model)))]
                kwargs |= {"visual_pos_masks": where, "deepstack_visual_embeds": list(deep)}
        kwargs.setdefault("attention_mask", batch.attention_mask)
        return self.family.run(self.model, embedded, batch, **kwargs)

    def forward_hidden(self, batch: Batch) -> Tensor:
        """What embeds each row, (B, D): the last token's last hidden state, or what a dual encoder's towers say.

        With gradients if they are enabled.
        """
        if isinstance(self.family, DualEncoder):
            features = self.features(batch.pictures)[0] if batch.pictures else None
            return self.family.embed(self.model, batch, features, self.pad_id)
        return self.last_hidden(batch)

    def last_hidden(self, batch: Batch, **kwargs: Any) -> Tensor:
        """Last hidden state of each row's last token, (B, D); `kwargs` as in `run_language_model`."""
        if self.can_share_prefix and not torch.is_grad_enabled():
            return self.run_language_model(batch, last=batch.last, **kwargs)[:, 0]
        hidden = self.run_language_model(batch, **kwargs)
        return hidden[torch.arange(len(batch), device=hidden.device), batch.last]

    def answer_logits(self, hidden: Tensor, token_ids: Sequence[int]) -> Tensor:
        """Logits of a few tokens: hidden (..., D) -> (..., len(token_ids)) float32.

        Projected in float32 whatever the model's dtype: bfloat16 logits come in steps of 1/8.
        """
        rows = self.model.lm_head.weight[list(token_ids)].float()
        with torch.autocast(hidden.device.type, enabled=False):
            return hidden.float() @ rows.T

    def _segment(self, item: Item, picture: Picture | RejectedRow | None) -> Segment | RejectedRow:
        if isinstance(picture, RejectedRow):
            return picture
        try:
            segment = self.family.segment(self.tokens, item, [] if picture is None else [picture])
        except RejectedRow as reason:
            return reason
        if not len(segment):
            return RejectedRow("item is empty: no text and no picture")
        if len(segment) > self.max_tokens:
            return RejectedRow(f"item has {len(segment)} tokens; the model's context is {self.max_tokens}")
        return segment

    def _encode(self, pictures: Sequence[Picture]) -> list[Tensor]:
        """Features (X, M, D) of each picture, in forward passes of about VISION_BATCH_PATCHES."""
        order = sorted(range(len(pictures)), key=lambda index: pictures[index].grid)
        sizes = [self.family.num_patches(pictures[index]) for index in order]
        encoded: list[Tensor] = [torch.empty(0)] * len(pictures)
        for chunk in _chunks(order, sizes, VISION_BATCH_PATCHES):
            parts = self._encode_once([pictures[index] for index in chunk])
            for index, features in zip(chunk, parts, strict=True):
                encoded[index] = features
        return encoded

    def _encode_once(self, pictures: Sequence[Picture]) -> Sequence[Tensor]:
        values = self.pixels.normalise(pictures, self.device).to(self.dtype)
        return self.family.encode(self.model, pictures, values)


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _chunks(order: Sequence[int], sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Consecutive parts of `order` whose sizes sum to at most `budget`; at least one each."""
    parts: list[list[int]] = []
    room = 0
    for index, size in zip(order, sizes, strict=True):
        if not parts or size > room:
            parts.append([])
            room = budget
        parts[-1].append(index)
        room -= size
    return parts
