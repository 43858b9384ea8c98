"""Checkpoints that a training run can go on from.

A checkpoint holds the trainable weights, the optimizer's state, the position (step, epoch, batch) and what run it
belongs to. The learning rate is a function of the step and the random numbers of a step are seeded by (seed, step,
rank, micro-batch), so neither has a state to keep beyond the step. Ray Train copies a checkpoint to the run's storage
and only then records it, so a half-written one is never taken.
"""

from __future__ import annotations

import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unime_ray.errors import TrainingError
from unime_ray.train.sharding import like, whole

FILE = "state.pt"
FORMAT = 1


def trainable_state(model: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """The weights that training changes, whole, by name: all of them, or the adapter's.

    Of a sharded model all ranks must ask together; those with `keep` False get nothing, and spare the memory.
    """
    values = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            value = whole(weight)
            if keep:
                values[name] = value.cpu()
    return values


def save_checkpoint(
    folder: Path | None, model: nn.Module, optimizer: Optimizer, position: dict[str, int], identity: dict[str, str]
) -> None:
    """Write `state.pt` into `folder`. `identity` says which run this is: see `load_checkpoint`.

    All ranks call it, since a sharded model is put together by all; only the one that has a folder writes. What is
    written does not depend on how the model was spread.
    """
    weights = trainable_state(model, keep=folder is not None)
    settings = optimizer.state_dict()
    moments: dict[int, dict[str, Any]] = {}
    for number, values in settings["state"].items():
        gathered = {name: whole(value) if isinstance(value, Tensor) else value for name, value in values.items()}
        if folder is not None:
            moments[number] = {name: v.cpu() if isinstance(v, Tensor) else v for name, v in gathered.items()}
    if folder is not None:
        state = {"format": FORMAT, "identity": identity, "position": position, "model": weights}
        torch.save(state | {"optimizer": settings | {"state": moments}}, folder / FILE)


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: Optimizer, identity: dict[str, str], where: str | None = None
) -> dict[str, int]:
    """Restore model and optimizer in place; return the position. Nothing but tensors and plain values is unpickled.

    Args:
        where: what to call the checkpoint in errors (default: its folder).

    Raises:
        TrainingError: the checkpoint is not whole, or of another format, model, data or config, or its weights have
            other names or shapes.
    """
    where = where or str(folder)
    state = _read(folder / FILE, where)
    for key, value in identity.items():
        found = state["identity"].get(key)
        if found != value:
            raise TrainingError(f"{where}: checkpoint of another {key} ({_difference(found, value)}); remove it")
    own = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    values = state["model"]
    different = own.keys() ^ values.keys() | {n for n in own.keys() & values.keys() if own[n].shape != values[n].shape}
    if different:
        raise TrainingError(f"{where}: checkpoint and model disagree on weight {min(different)!r}; remove it")
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(like(values[name], weight))
    optimizer.load_state_dict(_laid_out(state["optimizer"], optimizer))
    return state["position"]


def _difference(found: str | None, value: str) -> str:
    """What a checkpoint and a run disagree on: of two configs, the keys."""
    if not (found and found.startswith("{") and value.startswith("{")):
        return f"{found}, this run has {value}"
    one, other = json.loads(found), json.loads(value)
    keys = sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
    return ", ".join(f"{key}: {one.get(key)}, this run has {other.get(key)}" for key in keys)


def _read(path: Path, where: str) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TrainingError(f"{where}: not a whole checkpoint ({FILE}: {reason}); remove it") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise TrainingError(f"{where}: checkpoint of format {found}, not {FORMAT}; remove it")
    return state


def _laid_out(settings: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's whole state, spread as its weights are."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    moments = {
        number: {
            name: like(value, weights[number]) if isinstance(value, Tensor) and value.ndim else value
            for name, value in values.items()
        }
        for number, values in settings["state"].items()
    }
    return settings | {"state": moments}
