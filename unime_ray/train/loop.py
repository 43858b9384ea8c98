"""The training loop: the same for embedder and reranker, on one process or many, with or without Ray.

The loss is the mean over the queries of the global batch. Each rank sums over its own queries and divides by the size
of the whole batch; DDP averages gradients over W ranks, so the sum is multiplied by W. The gradient is then the
single-process one however the batch is split over ranks and micro-batches.

What a step does depends on (seed, step) alone: its rows, its learning rate, its random numbers. A resumed run
therefore repeats an uninterrupted one exactly.
"""

from __future__ import annotations

import math
import resource
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, Protocol

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from unime_ray.config import TrainConfig
from unime_ray.errors import TrainingError
from unime_ray.ids import show
from unime_ray.models.backbone import Batch
from unime_ray.train.collate import StepBatch, Work, prefetch
from unime_ray.train.log import StepLog
from unime_ray.train.sharding import levelled, shard, whole

MAX_NAMED_QUERIES = 5


@dataclass(frozen=True)
class StepLoss:
    """What one rank's backward pass leaves: losses (B,) of its queries, detached, in order, and what it cost."""

    losses_B: Tensor
    query_ids: Sequence[bytes]
    num_items: int
    num_tokens: int


class Objective(Protocol, Generic[Work]):
    """What is trained: a module, the work of a step, and its backward pass."""

    @property
    def module(self) -> nn.Module: ...

    @property
    def filler(self) -> Batch:
        """A forward pass that costs next to nothing."""

    def load(self, step: int, rank: int, world: int) -> StepBatch[Work]:
        """This rank's part of a step. Runs in the prefetch thread."""

    def empty(self) -> Work:
        """A micro-batch without queries."""

    def backward(self, stepper: Stepper, batch: StepBatch[Work]) -> StepLoss:
        """Add the gradient of the batch's mean loss to the weights."""


class Stepper:
    """Model, optimizer and process group of one rank."""

    def __init__(self, objective: Objective[Any], config: TrainConfig, use_gpu: bool = False) -> None:
        precision = "bf16" if config.dtype == "bfloat16" else "no"
        # Vision layers take no part in a micro-batch without pictures, and some full weights never do.
        unused = config.lora.train_vision or config.lora.rank == 0
        # Buffers are constant tables; sending them at each forward pass would hang ranks that have more of them.
        kwargs = DistributedDataParallelKwargs(find_unused_parameters=unused, broadcast_buffers=False)
        self.accelerator = Accelerator(cpu=not use_gpu, mixed_precision=precision, kwargs_handlers=[kwargs])
        self.config = config
        self.module = objective.module
        self.sharded = config.strategy == "fsdp" and self.world > 1
        alone = self.world == 1 and precision == "no"
        self.model = objective.module if alone else self._wrap(objective.module)
        self.weights = [weight for weight in self.module.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=config.learning_rate, weight_decay=config.weight_decay)

    def _wrap(self, module: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            # torch renames `broadcast_buffers`, accelerate does not yet.
            warnings.simplefilter("ignore", FutureWarning)
            if not self.sharded:
                return self.accelerator.prepare(module)
            # Autocast only: the rest of what `prepare` does is DDP's.
            cast = self.accelerator.prepare_model(module, device_placement=False, evaluation_mode=True)
            return shard(cast, self.accelerator.device)

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world(self) -> int:
        return self.accelerator.num_processes

    def seed(self, step: int, micro: int) -> None:
        """Seed the random numbers (dropout) of one forward pass."""
        entropy = [self.config.seed, step, self.rank, micro]
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint32)[0]))

    def level(self, objective: Objective[Any], batch: StepBatch[Any]) -> StepBatch[Any]:
        """The batch, with forward passes added until all ranks make equally many where that is needed."""
        if not self.sharded:
            return batch
        size, device = self.config.micro_batch_queries, self.accelerator.device
        return levelled(batch, objective.empty, objective.filler.to(device), size, device)

    def backward_parts(self, parts: Sequence[Callable[[], Tensor]], batch: StepBatch[Any]) -> None:
        """Add the gradients of `parts`, each the loss *sum* over some queries of this rank; ranks meet at the last."""
        scale = self.world / batch.batch_size
        for number, part in enumerate(parts):
            # Sharded, gradients are summed at each part: kept whole until the last they might not fit.
            now = number == len(parts) - 1 or self.world == 1 or self.sharded
            with nullcontext() if now else self.accelerator.no_sync(self.model):
                self.seed(batch.step, number)
                self.accelerator.backward(part() * scale)

    def update(self, step: int) -> float:
        """Clip, step, clear. Returns the gradient's norm before clipping.

        Raises:
            TrainingError: the gradient is not finite.
        """
        norm = float(whole(self.accelerator.clip_grad_norm_(self.weights, self.config.max_grad_norm)))
        if not math.isfinite(norm):
            raise TrainingError(f"step {step + 1}: the gradient's norm is {norm}; lower learning_rate or use float32")
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(step, self.config)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def totals(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor.tolist()


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Learning rate of a step (from 0): linear warm-up to `learning_rate`, then the schedule down towards 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    factor = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return config.learning_rate * factor[config.schedule]


def run_steps(
    stepper: Stepper,
    objective: Objective[Any],
    *,
    start: int,
    position: Callable[[int], tuple[int, int]],
    log: StepLog | None,
    save: Callable[[int, dict[str, float]], None],
) -> None:
    """Train from step `start` to `config.steps`; call `save(steps done, metrics)` on all ranks at every checkpoint.

    Args:
        position: (epoch, batch) of a step. log: only rank 0 has one.

    Raises:
        TrainingError: a loss is not finite; the message names the step and the queries.
    """
    config = stepper.config
    stepper.module.train()
    clock = time.monotonic() - (log.seconds if log is not None else 0.0)
    with closing(
        prefetch(lambda step: objective.load(step, stepper.rank, stepper.world), range(start, config.steps))
    ) as batches:
        began = time.monotonic()
        for batch in batches:
            line = _one_step(stepper, objective, batch)
            line |= {"epoch": position(batch.step)[0], "seconds": round(time.monotonic() - clock, 3)}
            done, now = batch.step + 1, time.monotonic()
            _log(log, line, batch, now - began, flush=done % config.log_every == 0 or done == config.steps)
            began = now
            if done % config.checkpoint_every == 0 and done < config.steps:
                _flush(log)
                save(done, {"step": done, "loss": line["loss"]})
    _flush(log)


def _one_step(stepper: Stepper, objective: Objective[Any], batch: StepBatch[Any]) -> dict[str, Any]:
    result = objective.backward(stepper, stepper.level(objective, batch))
    total, items, tokens = stepper.totals([float(result.losses_B.sum()), result.num_items, result.num_tokens])
    loss = total / batch.batch_size
    if not math.isfinite(loss):
        raise TrainingError(_explain_loss(stepper, batch.step, loss, result))
    norm = stepper.update(batch.step)
    rate = learning_rate_at(batch.step, stepper.config)
    return {"step": batch.step + 1, "loss": loss, "lr": rate, "grad_norm": norm, "items": items, "tokens": tokens}


def _log(log: StepLog | None, line: dict[str, Any], batch: StepBatch[Any], seconds: float, flush: bool) -> None:
    if log is None:
        return
    seconds = max(seconds, 1e-9)
    items, tokens = line.pop("items"), line.pop("tokens")
    line |= {
        "queries_per_second": round(batch.batch_size / seconds, 3),
        "items_per_second": round(items / seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1),
        "step_seconds": round(seconds, 4),
        "memory_mb": peak_memory_mb(),
    }
    log.add(line)
    if flush:
        log.flush()


def peak_memory_mb() -> int:
    """The most this process has held so far: of its GPU's memory if it has one, else of the machine's."""
    on_gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    if on_gpu:
        return on_gpu >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def _flush(log: StepLog | None) -> None:
    if log is not None:
        log.flush(force=True)


def _explain_loss(stepper: Stepper, step: int, loss: float, result: StepLoss) -> str:
    """All ranks come here together, since they see the same global loss."""
    finite = torch.isfinite(result.losses_B).tolist()
    bad = [show(query) for query, fine in zip(result.query_ids, finite, strict=True) if not fine]
    if stepper.world > 1:
        gathered: list[list[str]] = [[] for _ in range(stepper.world)]
        dist.all_gather_object(gathered, bad)
        bad = [query for part in gathered for query in part]
    more = len(bad) - MAX_NAMED_QUERIES
    named = ", ".join(bad[:MAX_NAMED_QUERIES]) + (f" and {more} more" if more > 0 else "")
    return f"step {step + 1}: the loss is {loss} at queries {named}; lower learning_rate or look at these rows"
