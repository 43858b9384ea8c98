"""Prefixes computed once, suffixes run against them (the exact equal of running each prompt whole).

Suffixes and prefixes are padded on the right: a token then sees its own row's tokens before it and the group's prefix,
at the positions it would have in the whole prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from unime_ray.models.attention import Collector, Prefix
from unime_ray.models.backbone import Backbone, Batch
from unime_ray.models.tokens import Segment


def prefill(backbone: Backbone, segments: Sequence[Segment], past: Prefix | None = None) -> Prefix:
    """Keys and values of G prefixes; with `past` (of one group) each continues it."""
    batch = backbone.collate(segments, padding_side="right")
    collector = Collector()
    backbone.run_language_model(_after(batch, past), attention_mask=None, shared_prefix=past, collector=collector)
    spans = torch.tensor([segment.span for segment in segments], device=backbone.device)
    bias = _bias(batch, backbone.dtype)
    if past is None:
        return Prefix(collector.keys, collector.values, bias, spans)
    if bias is not None:
        bias = torch.nn.functional.pad(bias, (past.num_tokens, 0))
    keys = [_follow(old, new) for old, new in zip(past.keys, collector.keys, strict=True)]
    values = [_follow(old, new) for old, new in zip(past.values, collector.values, strict=True)]
    return Prefix(keys, values, bias, past.next_position + spans)


def extend(backbone: Backbone, prefix: Prefix, suffixes: Sequence[Sequence[Segment]]) -> Tensor:
    """Hidden state of each suffix's last token, (G * n, D); each of the G groups has n suffixes."""
    batch = backbone.collate([segment for group in suffixes for segment in group], padding_side="right")
    return backbone.last_hidden(_after(batch, prefix), attention_mask=None, shared_prefix=prefix)


def _after(batch: Batch, prefix: Prefix | None) -> Batch:
    """The batch with its positions moved behind the prefixes; consecutive rows share one."""
    if prefix is None:
        return batch
    offsets = prefix.next_position.repeat_interleave(len(batch) // len(prefix))
    return replace(batch, position_ids=batch.position_ids + offsets[None, :, None])


def _bias(batch: Batch, dtype: torch.dtype) -> Tensor | None:
    padding = batch.attention_mask == 0
    if not padding.any():
        return None
    zeros = torch.zeros(padding.shape, dtype=dtype, device=padding.device)
    return zeros.masked_fill(padding, float("-inf"))[:, None, None, :]


def _follow(old: Tensor, new: Tensor) -> Tensor:
    """(1, K, S, d) before each of (G, K, P, d)."""
    return torch.cat([old.expand(new.shape[0], -1, -1, -1), new], dim=2)
