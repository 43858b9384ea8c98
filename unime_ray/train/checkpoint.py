"""Checkpoints that a training run can go on from.

A checkpoint holds the trainable weights, the optimizer's state, the position (step, epoch, batch) and what run it
belongs to. The learning rate is a function of the step and the random numbers of a step are seeded by (seed, step,
rank, micro-batch), so neither has a state to keep beyond the step. Ray Train copies a checkpoint to the run's storage
and only then records it, so a half-written one is never taken.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from unime_ray.errors import TrainingError

FILE = "state.pt"
FORMAT = 1


def trainable_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that training changes, by name: all of them, or the adapter's."""
    return {name: weight.detach().cpu() for name, weight in model.named_parameters() if weight.requires_grad}


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, position: dict[str, int], identity: dict[str, str]
) -> None:
    """Write `state.pt` into `folder`. `identity` says which run this is: see `load_checkpoint`."""
    state = {
        "format": FORMAT,
        "identity": identity,
        "position": position,
        "model": trainable_state(model),
        "optimizer": optimizer.state_dict(),
    }
    torch.save(state, folder / FILE)


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, identity: dict[str, str]
) -> dict[str, int]:
    """Restore model and optimizer in place; return the position. Nothing but tensors and plain values is unpickled.

    Raises:
        TrainingError: the checkpoint is of another format, model, data or config, or its weights have other names.
    """
    state = torch.load(folder / FILE, map_location="cpu", weights_only=True)
    if state.get("format") != FORMAT:
        raise TrainingError(f"{folder}: checkpoint of format {state.get('format')}, not {FORMAT}; remove it")
    for key, value in identity.items():
        found = state["identity"].get(key)
        if found != value:
            raise TrainingError(f"{folder}: checkpoint of another {key} ({found}, this run has {value}); remove it")
    own = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    different = sorted(own.keys() ^ state["model"].keys())
    if different:
        raise TrainingError(f"{folder}: checkpoint and model disagree on weight {different[0]!r}; remove it")
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(state["model"][name])
    optimizer.load_state_dict(state["optimizer"])
    return state["position"]
