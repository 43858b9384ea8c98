"""Models that do not fit on one worker: weights, gradients and optimizer state split over all of them (FSDP2).

torch's own `fully_shard`, not accelerate's plugin: that one works on accelerators only, so no test without GPUs could
hold it to DDP, and it shards the vision tower's blocks too. Each of their forward passes would then be a collective,
while workers see different pictures and keep features of those they saw. The tower is frozen here and stays whole.

A sharded layer's forward pass is a collective as well, so all ranks must make equally many: see `levelled`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from unime_ray.models.backbone import Batch
from unime_ray.models.families import family_of
from unime_ray.train.collate import Packed, StepBatch


def shard(module: nn.Module, device: torch.device) -> nn.Module:
    """Shard `module` (its `model` is a backbone's) in place over all ranks: a group a layer, and one for the rest.

    Weights move to `device` layer by layer, so that the whole model need only fit into the host's memory.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    model: Any = module.model
    family = family_of(model.config)
    for part in family.vision_modules(model):
        part.to(device)
    for weight in family.vision_parameters(model):
        weight.data = weight.data.to(device)  # those in no module of their own
    for layer in family.layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh, ignored_params=set(family.vision_parameters(model)))
    return module


def whole(tensor: Tensor) -> Tensor:
    """A tensor's full value, detached; all ranks must ask together if it is sharded."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def like(value: Tensor, weight: Tensor) -> Tensor:
    """A full value laid out as `weight` is: each rank keeps its own part of what all of them hold."""
    if not isinstance(weight, DTensor):
        return value
    value = value.to(weight.device)
    return distribute_tensor(value, weight.device_mesh, weight.placements, src_data_rank=None)


def levelled(
    batch: StepBatch[Any], empty: Callable[[], Any], filler: Batch, micro_batch_queries: int, device: torch.device
) -> StepBatch[Any]:
    """`batch` with as many forward passes as the rank that makes most, micro-batch by micro-batch.

    Ranks may have a query more or less, and rows of other lengths. What is added computes `filler` rows that nothing
    reads: their gradient is zero.

    Args:
        empty: makes a micro-batch without queries.
    """
    share = math.ceil(batch.batch_size / dist.get_world_size())
    micros = list(batch.micro_batches)
    micros += [empty() for _ in range(math.ceil(share / micro_batch_queries) - len(micros))]
    passes = torch.tensor([[len(packed.batches) for packed in micro.packs] for micro in micros], device=device)
    dist.all_reduce(passes, dist.ReduceOp.MAX)
    levels = passes.tolist()
    return replace(
        batch, micro_batches=tuple(_filled(micro, level, filler) for micro, level in zip(micros, levels, strict=True))
    )


def _filled(micro: Any, level: Sequence[int], filler: Batch) -> Any:
    packs = [
        Packed(packed.batches + (filler,) * (count - len(packed.batches)), packed.place)
        for packed, count in zip(micro.packs, level, strict=True)
    ]
    return micro.with_packs(*packs)
