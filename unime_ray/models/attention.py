"""Attention of many suffixes to one prefix whose keys and values were computed once.

Registered with transformers under its own name; without a prefix it is transformers' own sdpa. A prefix reaches the
layers as the keyword argument `shared_prefix` of the language model's forward, so no cache object is expanded: the
queries of all suffixes of a group meet the group's keys in one product, or, where that is faster (long suffixes on a
CPU), the prefix's keys are laid before each row's own for torch's fused kernel, which never holds all weights at once.

Shapes: G groups, n suffixes each, B = G * n rows, T suffix tokens, P prefix tokens, H query heads, K key heads,
R = H / K, d width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "unime_shared_prefix"
FUSED_TOKENS = 24
"""Suffixes so long or longer go through the fused kernel on a CPU: 1.0 to 2.7 times as fast, shorter ones less."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """Keys and values of G prefixes, padded on the right to P tokens, and where their suffixes' positions start."""

    keys: list[Tensor]
    """One a layer: (G, K, P, d)."""
    values: list[Tensor]
    bias: Tensor | None
    """(G, 1, 1, P): 0 where a token is, minus infinity where padding is; None: no padding."""
    next_position: Tensor
    """(G,)"""

    def __len__(self) -> int:
        return self.next_position.shape[0]

    @property
    def num_tokens(self) -> int:
        return self.keys[0].shape[2]


class Collector:
    """Gathers each layer's keys and values during a forward pass (keyword argument `collector`)."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    shared_prefix: Prefix | None = None,
    collector: Collector | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention contract: query (B, H, T, d), key and value (B, K, T, d) -> (B, T, H, d), None.

    With `shared_prefix` the suffixes must be padded on the right: what a token may see of its own row is then what
    comes before it, and `attention_mask` is not needed.
    """
    if collector is not None:
        collector.keys.append(key)
        collector.values.append(value)
    if shared_prefix is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    attend = fused if query.device.type == "cpu" and query.shape[2] >= FUSED_TOKENS else attend_to_both
    found = shared_prefix.keys[layer], shared_prefix.values[layer], shared_prefix.bias
    return attend(query * scale, key, value, *found), None


def fused(
    query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor, bias: Tensor | None
) -> Tensor:
    """`attend_to_both` by torch's own kernel."""
    rows, _, tokens, _ = query.shape
    keys, values = prepend(prefix_key, key), prepend(prefix_value, value)
    mask = torch.full((tokens, tokens), float("-inf"), dtype=query.dtype, device=query.device).triu(1)
    mask = torch.nn.functional.pad(mask, (prefix_key.shape[2], 0))[None, None]
    if bias is not None:
        mask = (mask + torch.nn.functional.pad(bias, (0, tokens))).repeat_interleave(rows // len(bias), dim=0)
    out = scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=1.0, enable_gqa=True)
    return out.transpose(1, 2)


def prepend(prefix: Tensor, own: Tensor) -> Tensor:
    """(G, K, P, d) before the rows of each group, (B, K, T, d): (B, K, P + T, d)."""
    groups, heads, length, width = prefix.shape
    rows, _, tokens, _ = own.shape
    both = own.new_empty(rows, heads, length + tokens, width)
    both.view(groups, rows // groups, heads, -1, width)[..., :length, :] = prefix[:, None]
    both[..., length:, :] = own
    return both


def attend_to_both(
    query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor, bias: Tensor | None
) -> Tensor:
    """Softmax over prefix and own tokens together: scaled query (B, H, T, d) -> (B, T, H, d)."""
    rows, heads, tokens, width = query.shape
    groups, key_heads, length, _ = prefix_key.shape
    share = heads // key_heads
    # Grouped heads lie along the token axis, so that no key is copied for them.
    own_query = query.reshape(rows, key_heads, share * tokens, width)
    own = own_query @ key.transpose(-1, -2)
    hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).triu(1)
    own = own.view(rows, key_heads, share, tokens, tokens).masked_fill(hidden, float("-inf")).flatten(2, 3)
    group_query = _to_groups(own_query, groups)
    shared = group_query @ prefix_key.transpose(-1, -2)
    if bias is not None:
        shared = shared + bias
    scores = torch.cat([_to_rows(shared, rows), own], dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    out = weights[..., length:] @ value
    out = out + _to_rows(_to_groups(weights[..., :length], groups) @ prefix_value, rows)
    return out.view(rows, key_heads * share, tokens, width).transpose(1, 2)


def _to_groups(x: Tensor, groups: int) -> Tensor:
    """(B, K, M, x) -> (G, K, n * M, x)."""
    rows, heads, length, width = x.shape
    return x.view(groups, rows // groups, heads, length, width).transpose(1, 2).reshape(groups, heads, -1, width)


def _to_rows(x: Tensor, rows: int) -> Tensor:
    """(G, K, n * M, x) -> (B, K, M, x)."""
    groups, heads, length, width = x.shape
    each = rows // groups
    return x.view(groups, heads, each, length // each, width).transpose(1, 2).reshape(rows, heads, -1, width)


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
