"""What a pair costs: tokens x floating-point operations, for pairs run whole and for openings that are shared.

Embeddings, the language head and elementwise work are left out. Our own ways run the last layer's queries, output
projection and feed-forward for one token a prompt (`unime_ray.models.last_token`), so all they pay there is keys and
values. MMEB's hours are arithmetic with assumed lengths.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from engines import BenchItem

from unime_ray.models.backbone import Backbone
from unime_ray.models.prompt_ids import PromptIds

PUBLISHED_PAIRS = 33_800_000
"""MMEB's 662k queries with 51 candidates each."""
Groups = list[tuple[BenchItem, list[BenchItem]]]


@dataclass
class Sizes:
    """What a token or a picture costs: parameters passed through, layers and width for attention."""

    language: float
    layers: int
    hidden: int
    vision: float
    """Floating-point operations of the vision tower for one picture."""
    keys: float
    """Parameters of one layer's key and value projections."""

    def tokens(self, count: float, context: float) -> float:
        """Floating-point operations of `count` tokens that each attend to `context` others."""
        return count * (2 * self.language + 4 * self.layers * self.hidden * context)

    def spared(self, count: float, context: float) -> float:
        """`tokens` with nothing of the last layer but its keys and values."""
        share = (self.layers - 1) / self.layers if self.layers else 1.0
        return share * self.tokens(count, context) + 2 * count * self.keys


@dataclass
class Work:
    """Means over the pairs of one direction, for one order of the prompt."""

    prefix: float
    """Tokens before the second item."""
    suffix: float
    openings: float
    """Distinct first items a pair: 1 / candidates if the query comes first."""
    pictures: float
    """Pictures a pair shows, and distinct ones a pair."""
    distinct: float

    def naive(self, sizes: Sizes) -> float:
        """Operations of a pair run whole, every picture encoded every time."""
        total = self.prefix + self.suffix
        return sizes.tokens(total, total / 2) + self.pictures * sizes.vision

    def whole(self, sizes: Sizes) -> float:
        """Operations of a pair run whole, picture features kept between pairs."""
        total = self.prefix + self.suffix
        return sizes.spared(total, total / 2) + self.distinct * sizes.vision

    def prefix_cached(self, sizes: Sizes, hit_rate: float) -> float:
        """Operations of a pair of which a share of the tokens is found in vLLM's prefix cache."""
        total = self.prefix + self.suffix
        return (1 - hit_rate) * sizes.tokens(total, total / 2) + self.distinct * sizes.vision

    def shared(self, sizes: Sizes) -> float:
        """Operations of a pair whose opening runs once for all that share it."""
        once = self.openings * sizes.spared(self.prefix, self.prefix / 2)
        return once + sizes.spared(self.suffix, self.prefix + self.suffix / 2) + self.distinct * sizes.vision


def work_of(backbone: Backbone, groups: Groups, order: str, known: Sequence[BenchItem] = ()) -> Work:
    """`known` are items whose pictures were met before."""
    ids = PromptIds(backbone.tokens, order)
    pairs = [(query, candidate) for query, candidates in groups for candidate in candidates]
    items = {item.item_id: item for pair in pairs for item in pair}
    found = dict(zip(items, backbone.pictures(list(items.values())), strict=True))
    shown = {key: [] if picture is None else [picture] for key, picture in found.items()}
    prefixes, suffixes = [], []
    for pair in pairs:
        first, second = pair if order == "query_first" else pair[::-1]
        prefixes.append(len(ids.judge_prefix(first.rendered, shown[first.item_id])))  # type: ignore[arg-type]
        suffixes.append(len(ids.judge_suffix(second.rendered, shown[second.item_id])))  # type: ignore[arg-type]
    openings = {pair[0 if order == "query_first" else 1].item_id for pair in pairs}
    pictures = [item.image_id for pair in pairs for item in pair if item.image_id is not None]
    return Work(
        statistics.mean(prefixes),
        statistics.mean(suffixes),
        len(openings) / len(pairs),
        len(pictures) / len(pairs),
        len(set(pictures) - {item.image_id for item in known}) / len(pairs),
    )


def sizes_of(backbone: Backbone, patches: int) -> Sizes:
    """Sizes of a loaded model, for pictures of so many patches."""
    core, config = backbone.model.model, backbone.model.config
    language = sum(p.numel() for p in core.language_model.layers.parameters())
    blocks = sum(p.numel() for p in core.visual.blocks.parameters())
    merger = sum(p.numel() for p in core.visual.merger.parameters())
    width = core.visual.blocks[0].norm1.weight.shape[0]
    attention = 4 * patches**2 * width * len(core.visual.blocks)
    vision = 2 * blocks * patches + 2 * merger * patches / config.vision_config.spatial_merge_size**2 + attention
    text = config.get_text_config()
    return Sizes(language, text.num_hidden_layers, text.hidden_size, vision, keys_of(text))


def keys_of(text: Any) -> float:
    """Parameters of the key and value projections of a layer."""
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return float(2 * text.hidden_size * text.num_key_value_heads * width)


def flops_of(name: str, works: dict[str, Work], sizes: Sizes, hit_rate: float | None = None) -> float:
    """Operations a pair that a way computes; vLLM's by the share of its tokens that were in the prefix cache."""
    work = works["candidate_first" if name.endswith("turned") else "query_first"]
    if name == "naive":
        return work.naive(sizes)
    if name == "batched":
        return work.whole(sizes)
    return work.shared(sizes) if hit_rate is None else work.prefix_cached(sizes, hit_rate)


PUBLISHED_SIZES = {
    "Qwen2-VL-2B": Sizes(1.31e9, 28, 1536, 0.0, 2 * 1536 * 256),
    "Qwen2.5-VL-7B": Sizes(6.53e9, 28, 3584, 0.0, 2 * 3584 * 512),
}
"""Language layers without embeddings and head. Vision is added below."""
VISION_PARAMETERS, VISION_LAYERS, VISION_WIDTH = 6.7e8, 32, 1280
OPENING, AROUND, TEXT = 75, 20, 25
"""Tokens of the judge's instruction, of the words after the candidate, and of a text: assumed."""


def extrapolate(rate: float) -> None:
    """GPU-hours of MMEB's pairs by arithmetic alone: operations a pair / `rate` (FLOP/s that a GPU keeps up)."""
    print(f"\nMMEB's {PUBLISHED_PAIRS / 1e6:.1f}M pairs by arithmetic at {rate / 1e12:.0f} TFLOP/s kept up, hours:")
    print(f"{'':<36}{'naive':>10}{'batched':>10}{'shared':>10}")
    for model, sizes in PUBLISHED_SIZES.items():
        for side in (336, 672):
            picture, patches = side**2 // 28**2, side**2 // 14**2
            vision = 2 * VISION_PARAMETERS * patches + 4 * patches**2 * VISION_WIDTH * VISION_LAYERS
            full = replace(sizes, vision=vision)
            for direction, (query, candidate) in (("picture -> text", (picture, TEXT)),
                                                  ("text -> picture", (TEXT, picture)),
                                                  ("picture -> picture", (picture, picture))):  # fmt: skip
                shown = (query == picture) + (candidate == picture)
                # A picture's features are kept: a query's for its 51 pairs, a candidate's for as many.
                work = Work(OPENING + query, candidate + AROUND, 1 / 51, shown, shown / 51)
                hours = [PUBLISHED_PAIRS * flops / rate / 3600
                         for flops in (work.naive(full), work.whole(full), work.shared(full))]  # fmt: skip
                label = f"{model} {side}x{side} {direction}"
                print(f"{label:<44}{hours[0]:>6,.0f}{hours[1]:>10,.0f}{hours[2]:>10,.0f}")
