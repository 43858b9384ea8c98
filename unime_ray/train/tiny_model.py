"""The tiny Qwen2-VL: its configuration, and a forward pass for training it fast on one CPU core.

transformers' own forward walks over pictures one by one in the vision attention and rebuilds M-RoPE indices in
Python. In pretraining every picture has the same grid and every row a known layout, so the same arithmetic is done
here on rectangular batches, in bfloat16 if asked. The module tree and the weights are transformers' own, and a test
holds this forward to `Qwen2VLForConditionalGeneration` within 1e-5.

Shapes: B rows or pictures, T tokens of a row, P patches of a picture, M merged patches (image tokens) of a picture,
D width of the language model, H heads, V vocabulary.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.vision_utils import get_vision_position_ids

from unime_ray.errors import TrainingError

PIXELS = 64
PATCH = 8
MERGE = 2
IMAGE_TOKENS = (PIXELS // PATCH // MERGE) ** 2
HEAD_DIM = 32  # the smallest head that vLLM's attention kernels take
MROPE_SECTION = [4, 6, 6]


def tiny_config(
    vocab_size: int,
    token_ids: dict[str, int],
    *,
    hidden: int = 192,
    layers: int = 4,
    intermediate: int = 512,
    vision_width: int = 128,
    vision_depth: int = 4,
    kv_heads: int = 2,
) -> Qwen2VLConfig:
    """A Qwen2-VL configuration of 2-4 million parameters.

    Args:
        vocab_size: rows of the (tied) embedding table.
        token_ids: ids of `<|image_pad|>`, `<|video_pad|>`, `<|vision_start|>`, `<|vision_end|>`, `<|im_end|>` and
            `<|endoftext|>`.
        hidden: width of the language model, a multiple of 32. vision_width: likewise of the vision tower.
    """
    text = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD_DIM,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": MROPE_SECTION},
        "tie_word_embeddings": True,
        "bos_token_id": token_ids["<|endoftext|>"],
        "eos_token_id": token_ids["<|im_end|>"],
        "pad_token_id": token_ids["<|endoftext|>"],
    }
    vision = {
        "depth": vision_depth,
        "embed_dim": vision_width,
        "hidden_size": hidden,
        "num_heads": vision_width // HEAD_DIM,
        "mlp_ratio": 4,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
    }
    return Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token_ids["<|image_pad|>"],
        video_token_id=token_ids["<|video_pad|>"],
        vision_start_token_id=token_ids["<|vision_start|>"],
        vision_end_token_id=token_ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def build_tiny(config: Qwen2VLConfig, seed: int = 0) -> Qwen2VLForConditionalGeneration:
    """A fresh model in float32. Residual outputs start at a depth-scaled width; the rest at 1/sqrt(fan-in)."""
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(config)
    text, vision = config.get_text_config(), cast(Any, config.vision_config)
    depth = 2 * (text.num_hidden_layers + vision.depth)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                continue
            if "embed_tokens" in name:
                parameter.normal_(std=0.05)
                continue
            parameter.normal_(std=parameter[0].numel() ** -0.5)
            if name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight", "fc2.weight")):
                parameter.mul_(depth**-0.5)
    return model.float()


def grow_from(model: Qwen2VLForConditionalGeneration, folder: str) -> None:
    """Copies a checkpoint's weights into `model`, which may have more language layers than it.

    The layers that are new add nothing at first (their two output projections are zero), so the grown model starts as
    the function that the checkpoint is.

    Raises:
        TrainingError: the checkpoint's sizes are not those of `model`.
    """
    source = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).state_dict()
    wanted = model.state_dict()
    for name, tensor in source.items():
        if name not in wanted or wanted[name].shape != tensor.shape:
            have = tuple(wanted[name].shape) if name in wanted else "missing"
            raise TrainingError(
                f"{folder}: {name} has shape {tuple(tensor.shape)}, here it is {have}; set --model alike"
            )
    model.load_state_dict(source, strict=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in source and name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()


def _linear(x: Tensor, layer: Any) -> Tensor:
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return functional.linear(x, layer.weight.to(x.dtype), bias)


def _layer_norm(x: Tensor, norm: Any) -> Tensor:
    return functional.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _rms_norm(x: Tensor, norm: Any) -> Tensor:
    return functional.rms_norm(x, norm.weight.shape, norm.weight.to(x.dtype), norm.variance_epsilon)


def _quick_gelu_mlp(x: Tensor, mlp: Any) -> Tensor:
    """h * sigmoid(1.702 h) as silu(1.702 h) / 1.702 with the constant in the weights: one fused kernel, not three."""
    into, out = mlp.fc1, mlp.fc2
    hidden = functional.linear(x, (into.weight * 1.702).to(x.dtype), (into.bias * 1.702).to(x.dtype))
    return functional.linear(functional.silu(hidden), (out.weight / 1.702).to(x.dtype), out.bias.to(x.dtype))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    # Plain products beat the CPU's fused kernel here: at 64-100 tokens in bfloat16 it is over five times slower.
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    return scores.softmax(-1) @ value


class FastVision(nn.Module):
    """`model.model.visual` on B pictures of one size: patches (B, P, 3*8*8) -> image tokens (B, M, D)."""

    visual: Any
    cos: Tensor
    sin: Tensor

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.visual = visual
        side = PIXELS // PATCH
        positions = get_vision_position_ids(torch.tensor([[1, side, side]]), MERGE)
        cos, sin = visual.rotary_pos_emb(torch.zeros(1), positions)
        self.register_buffer("cos", cos.float(), persistent=False)
        self.register_buffer("sin", sin.float(), persistent=False)

    def forward(self, patches: Tensor) -> Tensor:
        visual = self.visual
        weight = visual.patch_embed.proj.weight.sum(2).flatten(1)  # both frames of a still picture are equal
        x = functional.linear(patches, weight.to(patches.dtype))
        for block in visual.blocks:
            x = x + self._attention(_layer_norm(x, block.norm1), block.attn)
            x = x + _quick_gelu_mlp(_layer_norm(x, block.norm2), block.mlp)
        merger = visual.merger
        merged = _layer_norm(x, merger.ln_q).reshape(x.shape[0], IMAGE_TOKENS, -1)
        return _linear(functional.gelu(_linear(merged, merger.mlp[0])), merger.mlp[2])

    def _attention(self, x: Tensor, layer: Any) -> Tensor:
        batch, patches, width = x.shape
        qkv = _linear(x, layer.qkv).view(batch, patches, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        out = _attend(_rotate(qkv[0], cos, sin), _rotate(qkv[1], cos, sin), qkv[2], None)
        return _linear(out.transpose(1, 2).reshape(batch, patches, width), layer.proj)


class FastText(nn.Module):
    """`model.model.language_model` on padded rows with an explicit mask: (B, T, D) -> (B, T, D), normed."""

    language_model: Any

    def __init__(self, language_model: Any) -> None:
        super().__init__()
        self.language_model = language_model

    def rope(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin (B, 1, T, head dim) of M-RoPE positions (3, B, T)."""
        cos, sin = self.language_model.rotary_emb(torch.zeros(1), position_ids)
        return cos.unsqueeze(1).to(dtype), sin.unsqueeze(1).to(dtype)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:
        """`bias` (B, 1, T, T) is 0 where a token may look and very negative where not."""
        for layer in self.language_model.layers:
            x = x + self._attention(_rms_norm(x, layer.input_layernorm), layer.self_attn, cos, sin, bias)
            hidden = _rms_norm(x, layer.post_attention_layernorm)
            gated = functional.silu(_linear(hidden, layer.mlp.gate_proj)) * _linear(hidden, layer.mlp.up_proj)
            x = x + _linear(gated, layer.mlp.down_proj)
        return _rms_norm(x, self.language_model.norm)

    def _attention(self, x: Tensor, layer: Any, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        query, key, value = (
            _linear(x, part).view(batch, tokens, -1, HEAD_DIM).transpose(1, 2)
            for part in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
        # Grouped heads: the queries of one key head are laid along the token axis, so no key is copied.
        heads, groups = key.shape[1], layer.num_key_value_groups
        grouped = query.reshape(batch, heads, groups * tokens, HEAD_DIM)
        out = _attend(grouped, key, value, bias.repeat(1, 1, groups, 1))
        out = out.reshape(batch, heads * groups, tokens, HEAD_DIM)
        return _linear(out.transpose(1, 2).reshape(batch, tokens, width), layer.o_proj)


def to_patches(pixels: Tensor) -> Tensor:
    """Normalised pictures (B, 3, 64, 64) as patches (B, 64, 192), in the image processor's block-major order."""
    side = PIXELS // PATCH // MERGE
    cut = pixels.reshape(pixels.shape[0], 3, side, MERGE, PATCH, side, MERGE, PATCH)
    return cut.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(pixels.shape[0], -1, 3 * PATCH * PATCH)
