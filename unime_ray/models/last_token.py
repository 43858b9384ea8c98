"""The last layer of a language model where only each row's last token is read.

A judge, a reranker and an embedder read one hidden state a row. In the last layer the other tokens are needed as keys
and values alone, so its queries, output projection and feed-forward run for one token a row; of a prefix whose keys and
values are collected it needs nothing else at all. Of L layers this saves almost one: a third of a model of 3, a
thirtieth of one of 28. Passes that do not ask run as they are; modules and weights stay.

Shapes: B rows, T tokens, D hidden width, H query heads, K key heads, d width of a head, P prefix tokens.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from unime_ray.models.attention import Collector, Prefix, prepend


def spare_last_layer(layer: nn.Module) -> None:
    """Let a model's last layer (of Qwen2 or Qwen3 or their like) take `last` or `collector`, in place."""
    layer.forward = MethodType(_layer_forward, layer)  # type: ignore[method-assign]


def _layer_forward(self: Any, hidden_states: Tensor, last: Tensor | None = None, **kwargs: Any) -> Tensor:
    """The layer's own forward; with `last` (B,) the output of those tokens alone, (B, 1, D).

    With `collector` (see `attention`) the keys and values go there, and what comes back is read by nobody.
    """
    collector: Collector | None = kwargs.get("collector")
    if last is None and collector is None:
        return type(self).forward(self, hidden_states, **kwargs)  # type: ignore[no-any-return]
    attention, normed, tables = self.self_attn, self.input_layernorm(hidden_states), kwargs["position_embeddings"]
    key = _heads(attention, "k", normed, tables)
    value = _heads(attention, "v", normed)
    if collector is not None:
        collector.keys.append(key)
        collector.values.append(value)
        return hidden_states
    assert last is not None
    rows = torch.arange(len(normed), device=normed.device)
    at_last = [table.expand(len(normed), -1, -1)[rows, last].unsqueeze(1) for table in tables]
    query = _heads(attention, "q", normed[rows, last].unsqueeze(1), at_last)
    found = _attend(query, key, value, last, kwargs.get("attention_mask"), kwargs.get("shared_prefix"), attention)
    out = hidden_states[rows, last].unsqueeze(1) + attention.o_proj(found.transpose(1, 2).flatten(2))
    return out + self.mlp(self.post_attention_layernorm(out))


def _attend(
    query: Tensor, key: Tensor, value: Tensor, last: Tensor, mask: Tensor | None, prefix: Prefix | None, attention: Any
) -> Tensor:
    """(B, H, 1, d) over (B, K, T, d), and over the group's prefix if there is one."""
    rows, heads = len(query), key.shape[1]
    seen = (torch.arange(key.shape[2], device=last.device) <= last[:, None])[:, None, None]  # (B, 1, 1, T)
    if prefix is not None:
        layer = int(attention.layer_idx)
        key, value = prepend(prefix.keys[layer], key), prepend(prefix.values[layer], value)
        seen = pad(seen, (prefix.num_tokens, 0), value=True)
        if prefix.bias is not None:
            there = pad(prefix.bias == 0, (0, seen.shape[3] - prefix.num_tokens), value=True)
            seen = seen & there.repeat_interleave(rows // len(prefix), dim=0)
    elif mask is not None:
        its_own = mask.expand(rows, -1, -1, -1)[torch.arange(rows, device=last.device), :, last].unsqueeze(2)
        seen = seen & (its_own if its_own.dtype == torch.bool else its_own == 0)
    # Query heads that share a key head lie along the token axis, so that no key is copied for them.
    shared = query.view(rows, heads, -1, query.shape[-1])
    return scaled_dot_product_attention(shared, key, value, attn_mask=seen, scale=attention.scaling).view_as(query)


def _heads(attention: Any, kind: str, normed: Tensor, tables: Any = None) -> Tensor:
    """Queries, keys or values of (B, T, D): (B, heads, T, d), turned by the positions' `tables` if there are any."""
    projected = getattr(attention, f"{kind}_proj")(normed).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{kind}_norm", None)  # Qwen3's
    states = (projected if norm is None else norm(projected)).transpose(1, 2)
    if tables is None:
        return states
    cos, sin = (table.unsqueeze(1) for table in tables)
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin
