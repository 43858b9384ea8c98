"""Strong, cheap augmentation of small pictures: what one artist draws, as another might have.

The gap a tiny model shows is the artist's hand, not the concept, so colour, line, size, place and background vary a
lot. Nothing is mirrored: direction is part of many names ("left arrow", "person walking facing right").
Everything is vectorised over the batch. Shapes: B pictures, values in [0, 1] unless said otherwise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

_GREY = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)


def augment(
    pixels_B3HW: Tensor,
    generator: torch.Generator,
    strength: float = 1.0,
    clean: float = 0.15,
    colour_bound: Tensor | None = None,
) -> Tensor:
    """Pictures (B, 3, H, W), float in [0, 1] on white, augmented independently of each other.

    Args:
        strength: scales every range and every probability; 0 gives the pictures back.
        clean: share of the pictures that stay as they are, so that the model also sees the true data.
        colour_bound: (B,) True where colour is meaning (skin tones, flags, "red circle"): those keep their colours.
    """
    if strength <= 0:
        return pixels_B3HW
    batch = pixels_B3HW.shape[0]
    x = _warp(pixels_B3HW, generator, strength)
    recoloured = _colour(_background(x, generator, 0.25 * strength), generator, strength)
    x = recoloured if colour_bound is None else torch.where(colour_bound.view(-1, 1, 1, 1), x, recoloured)
    x = _line(x, generator, 0.12 * strength)
    x = _blur(x, generator, 0.15 * strength)
    x = _cut_out(x, generator, 0.25 * strength)
    keep = _chance(batch, clean, generator)
    return torch.where(keep, pixels_B3HW, x.clamp(0, 1))


def _uniform(batch: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.rand(batch, 1, 1, 1, generator=generator) * (high - low) + low


def _chance(batch: int, probability: float, generator: torch.Generator) -> Tensor:
    return torch.rand(batch, 1, 1, 1, generator=generator) < probability


def _warp(x: Tensor, generator: torch.Generator, strength: float) -> Tensor:
    """Scale 0.7-1.2, stretch, shift by up to 12 %, turn by up to 12 degrees; white comes in at the edges."""
    batch = x.shape[0]
    angle = _uniform(batch, -1, 1, generator).flatten() * math.radians(12) * strength
    zoom = torch.exp(_uniform(batch, math.log(0.7), math.log(1.2), generator).flatten() * strength)
    stretch = torch.exp(_uniform(batch, -0.12, 0.12, generator).flatten() * strength)
    shift = (torch.rand(batch, 2, generator=generator) * 2 - 1) * 0.12 * strength
    cos, sin = torch.cos(angle), torch.sin(angle)
    rows = torch.stack(
        [
            torch.stack([cos / (zoom * stretch), -sin / zoom, shift[:, 0]], dim=-1),
            torch.stack([sin / zoom, cos * stretch / zoom, shift[:, 1]], dim=-1),
        ],
        dim=1,
    )
    grid = functional.affine_grid(rows, list(x.shape), align_corners=False)
    return 1 - functional.grid_sample(1 - x, grid, align_corners=False)


def _background(x: Tensor, generator: torch.Generator, probability: float) -> Tensor:
    """Tints what is white, background and highlights alike: the picture is multiplied by a pale colour."""
    batch = x.shape[0]
    tint = 1 - torch.rand(batch, 3, 1, 1, generator=generator) * 0.5
    return torch.where(_chance(batch, probability, generator), x * tint, x)


def _colour(x: Tensor, generator: torch.Generator, strength: float) -> Tensor:
    """Hue, saturation, brightness, contrast and gamma; now and then grey, channels swapped, or few levels."""
    batch = x.shape[0]
    grey = (x * _GREY).sum(1, keepdim=True)
    saturation = torch.exp(_uniform(batch, -0.7, 0.5, generator) * strength)
    saturation = torch.where(_chance(batch, 0.1 * strength, generator), torch.zeros(()), saturation)
    x = grey + (x - grey) * saturation
    x = torch.einsum("bij,bjhw->bihw", _hue_matrices(batch, generator, 0.35 * strength), x)
    # White stays near white: contrast pivots on it, since every artist draws on an empty ground.
    x = 1 - (1 - x) * torch.exp(_uniform(batch, -0.35, 0.25, generator) * strength)
    x = x.clamp(0, 1) ** torch.exp(_uniform(batch, -0.3, 0.3, generator) * strength)
    levels = torch.where(_chance(batch, 0.1 * strength, generator), _uniform(batch, 3, 6, generator).round(), 255.0)
    return torch.round(x * levels) / levels


def _hue_matrices(batch: int, generator: torch.Generator, spread: float) -> Tensor:
    """Rotations (B, 3, 3) about the grey axis by a normal angle of `spread` radians (rarely a full turn)."""
    angle = torch.randn(batch, generator=generator) * spread
    wild = torch.rand(batch, generator=generator) < 0.08
    angle = torch.where(wild, torch.rand(batch, generator=generator) * 2 * math.pi, angle)
    cos, sin = torch.cos(angle).view(-1, 1, 1), torch.sin(angle).view(-1, 1, 1) / math.sqrt(3)
    cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]])
    return cos * torch.eye(3) + sin * cross + (1 - cos) / 3


def _line(x: Tensor, generator: torch.Generator, probability: float) -> Tensor:
    """Adds dark outlines, or leaves nothing but them: artists differ most in whether they draw lines."""
    batch = x.shape[0]
    grey = (x.detach() * _GREY).sum(1, keepdim=True)
    dx = functional.pad(grey[..., :, 1:] - grey[..., :, :-1], (0, 1, 0, 0))
    dy = functional.pad(grey[..., 1:, :] - grey[..., :-1, :], (0, 0, 0, 1))
    edges = 1 - ((dx.abs() + dy.abs()) * 3).clamp(0, 1)
    x = torch.where(_chance(batch, probability, generator), x * edges, x)
    return torch.where(_chance(batch, probability / 3, generator), edges.expand_as(x), x)


def _blur(x: Tensor, generator: torch.Generator, probability: float) -> Tensor:
    batch = x.shape[0]
    soft = functional.avg_pool2d(functional.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    sharp = (x + (x - soft) * 1.5).clamp(0, 1)
    x = torch.where(_chance(batch, probability, generator), soft, x)
    return torch.where(_chance(batch, probability, generator), sharp, x)


def _cut_out(x: Tensor, generator: torch.Generator, probability: float) -> Tensor:
    """Whitens one rectangle of 15-40 % of the side."""
    batch, _, height, width = x.shape
    ys, xs = torch.arange(height).view(1, 1, -1, 1) / height, torch.arange(width).view(1, 1, 1, -1) / width
    top, left = _uniform(batch, 0, 0.8, generator), _uniform(batch, 0, 0.8, generator)
    high, wide = _uniform(batch, 0.15, 0.4, generator), _uniform(batch, 0.15, 0.4, generator)
    inside = (ys >= top) & (ys < top + high) & (xs >= left) & (xs < left + wide)
    return torch.where(inside & _chance(batch, probability, generator), torch.ones(()), x)
