"""Pretrains the tiny Qwen2-VL from scratch on one CPU core, resumable, to a wall-clock budget.

The learning rate follows the elapsed time, so a run always ends annealed whatever the machine's speed. What this
module doesn't know: where the pictures come from (`pretrain_data`), what a step is made of (`pretrain_plan`,
`pretrain_losses`) and how good the result is (`pretrain_eval`).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen2Tokenizer, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from unime_ray.corpus.demo_rows import PRETRAINING_ARTISTS
from unime_ray.errors import TrainingError
from unime_ray.train.augment import augment
from unime_ray.train.pretrain_data import Neighbours, Pictures, choose_concepts, choose_pictures, load_pictures
from unime_ray.train.pretrain_losses import Losses
from unime_ray.train.pretrain_plan import BatchShape, Vocabulary, plan_batch
from unime_ray.train.pretrain_tokenizer import build_tokenizer, special_ids
from unime_ray.train.tiny_model import PATCH, PIXELS, build_tiny, grow_from, tiny_config, to_patches

MEAN, STD = 0.5, 0.5
STATE_FILE = "state.pt"


@dataclass(frozen=True)
class PretrainConfig:
    """`out`: folder of state, log and final `model/`; `data`: folder of the two demo tables."""

    out: str
    data: str
    minutes: float = 60.0
    learning_rate: float = 2e-3
    warmup: float = 0.02  # share of the time budget
    weight_decay: float = 0.05
    clip: float = 1.0
    hard_from: float = 0.05  # hard negatives ramp in between these shares of the budget
    hard_to: float = 0.35
    ema: float = 0.995
    seed: int = 0
    dtype: str = "bfloat16"
    optimizer: str = "muon"
    snapshot: str | None = None
    snapshot_minutes: float = 10.0
    state_minutes: float = 5.0
    max_steps: int | None = None
    augmentation: float = 1.0
    start: str | None = None  # folder of a checkpoint whose weights and vocabulary are gone on with
    model: dict[str, int] = field(default_factory=dict)
    shape: BatchShape = field(default_factory=BatchShape)


class Optimizers:
    """Muon for the matrices inside the blocks, AdamW for the rest (or AdamW for all), under one schedule."""

    def __init__(self, model: torch.nn.Module, config: PretrainConfig) -> None:
        hidden: list[torch.nn.Parameter] = []
        other: list[torch.nn.Parameter] = []
        for name, parameter in model.named_parameters():
            inner = parameter.ndim == 2 and "embed_tokens" not in name and config.optimizer == "muon"
            (hidden if inner else other).append(parameter)
        decay = [p for p in other if p.ndim > 1]
        plain = [p for p in other if p.ndim <= 1]
        groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.all: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.98), eps=1e-8)]
        if hidden:
            self.all.append(
                torch.optim.Muon(hidden, lr=1.0, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
            )

    def step(self, learning_rate: float) -> None:
        """One update at `learning_rate`; gradients are cleared."""
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def schedule(progress: float, warmup: float) -> float:
    """Factor of the learning rate at `progress` in [0, 1] of the budget: linear up, then half a cosine to 0."""
    if progress < warmup:
        return max(progress / warmup, 0.01)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))


class Pretrainer:
    """All state of one pretraining run."""

    def __init__(self, config: PretrainConfig, pictures: Pictures | None = None) -> None:
        self.config = config
        self.pictures = pictures or load_pictures(config.data, PRETRAINING_ARTISTS)
        self.tokenizer = self._tokenizer()
        ids = special_ids(self.tokenizer)
        self.model = build_tiny(tiny_config(len(self.tokenizer), ids, **config.model), config.seed)
        if config.start:
            grow_from(self.model, config.start)
        self.average = [parameter.detach().clone() for parameter in self.model.parameters()]
        self.optimizers = Optimizers(self.model, config)
        self.vocabulary = Vocabulary(self.tokenizer, self.pictures)
        self.losses = Losses(self.model, self.vocabulary, getattr(torch, config.dtype))
        self.neighbours = Neighbours(self.pictures, self.losses.table.shape[1])
        self.of_concept = self.pictures.of_concept()
        self.drawn = np.array([index for index, own in enumerate(self.of_concept) if len(own)])
        self.step, self.elapsed = 0, 0.0
        self.rng = np.random.default_rng(config.seed)
        self.generator = torch.Generator().manual_seed(config.seed)

    def _tokenizer(self) -> Qwen2Tokenizer:
        if self.config.start:
            return Qwen2Tokenizer.from_pretrained(self.config.start)
        texts = [name for name in self.pictures.names for _ in range(3)]
        return build_tokenizer(texts + [", ".join(k) for k in self.pictures.keywords])

    @property
    def progress(self) -> float:
        """Share of the budget that is used up, in [0, 1]."""
        by_steps = self.step / self.config.max_steps if self.config.max_steps else 0.0
        return min(1.0, max(by_steps, self.elapsed / (60 * self.config.minutes)))

    def pixels(self, chosen: np.ndarray) -> Tensor:
        """Augmented, normalised patches of the chosen pictures."""
        raw = torch.from_numpy(self.pictures.pixels[chosen]).permute(0, 3, 1, 2).float() / 255
        colour_bound = torch.from_numpy(self.pictures.colour_bound[self.pictures.concept[chosen]])
        mixed = augment(raw, self.generator, self.config.augmentation, colour_bound=colour_bound)
        return to_patches((mixed - MEAN) / STD)

    @torch.no_grad()
    def fill_neighbours(self) -> None:
        """Embeds every drawn concept once, so that hard negatives are known from the first step."""
        nothing = BatchShape(picture_lists=0, name_lists=0, text_lists=0, twin_lists=0, listwise=0)
        for start in range(0, len(self.drawn), nothing.concepts):
            concepts = self.drawn[start : start + nothing.concepts]
            plan = plan_batch(self.vocabulary, self.neighbours, concepts, nothing, 0.0, self.rng)
            patches = self.pixels(choose_pictures(concepts, self.of_concept, self.rng))
            self._remember(concepts, self.losses.embeddings(plan, patches), momentum=0.0)

    def _remember(self, concepts: np.ndarray, embeddings: Tensor, momentum: float = 0.5) -> None:
        """Keeps a batch's candidate embeddings (C + 2C, D): texts, then two pictures each."""
        by_concept = embeddings.numpy()
        pictures = by_concept[len(concepts) :].reshape(len(concepts), 2, -1).mean(1)
        self.neighbours.update(concepts, by_concept[: len(concepts)], pictures, momentum)

    def train_step(self) -> dict[str, float]:
        """One batch: plan, losses, update, running average, running embeddings."""
        config, progress = self.config, self.progress
        hard = min(1.0, max(0.0, (progress - config.hard_from) / (config.hard_to - config.hard_from)))
        shape = config.shape
        concepts = choose_concepts(
            self.neighbours, self.drawn, shape.concepts, shape.cluster, shape.near * hard, self.rng
        )
        chosen = choose_pictures(concepts, self.of_concept, self.rng)
        plan = plan_batch(self.vocabulary, self.neighbours, concepts, shape, hard, self.rng)
        loss, numbers, embeddings = self.losses(plan, self.pixels(chosen), shape)
        if not math.isfinite(loss.item()):
            raise TrainingError(f"the loss at step {self.step} is {loss.item()}; lower --learning-rate")
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        rate = config.learning_rate * schedule(progress, config.warmup)
        self.optimizers.step(rate)
        decay = min(config.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, list(self.model.parameters()), 1 - decay)
        self._remember(concepts, embeddings)
        self.step += 1
        return {"step": self.step, **numbers, "rate": rate, "norm": float(norm), "hard": hard}

    def run(self, report: Callable[[dict[str, float]], None] | None = None) -> Path:
        """Trains to the end of the budget and writes `model/`; gives that folder."""
        out = Path(self.config.out)
        out.mkdir(parents=True, exist_ok=True)
        last_state = last_snapshot = self.elapsed
        if self.config.start and not self.step:
            self.fill_neighbours()
        while self.progress < 1.0:
            began = time.perf_counter()
            numbers = self.train_step()
            self.elapsed += time.perf_counter() - began
            numbers |= {"seconds": time.perf_counter() - began, "elapsed": self.elapsed}
            with (out / "log.jsonl").open("a") as log:
                log.write(json.dumps({key: round(value, 5) for key, value in numbers.items()}) + "\n")
            if report is not None and self.step % 20 == 0:
                report(numbers)
            if self.elapsed - last_state >= 60 * self.config.state_minutes:
                last_state = self.elapsed
                self.save_state(out / STATE_FILE)
            if self.config.snapshot and self.elapsed - last_snapshot >= 60 * self.config.snapshot_minutes:
                last_snapshot = self.elapsed
                self.save_model(Path(self.config.snapshot))
        self.save_state(out / STATE_FILE)
        self.save_model(out / "model")
        return out / "model"

    def save_model(self, folder: Path) -> None:
        """The averaged weights in bfloat16, tokenizer, image processor and chat template, swapped in by a rename."""
        fresh = folder.with_name(f"{folder.name}.new-{os.getpid()}")
        averaged = Qwen2VLForConditionalGeneration(self.model.config)
        with torch.no_grad():
            torch._foreach_copy_(list(averaged.parameters()), self.average)
        averaged.bfloat16().save_pretrained(fresh)
        self.tokenizer.save_pretrained(fresh)
        image_processor().save_pretrained(fresh)
        old = folder.with_name(f"{folder.name}.old-{os.getpid()}")
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old, ignore_errors=True)

    def save_state(self, path: Path) -> None:
        """Everything a resumed run needs, tensors and plain numbers only."""
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers.all],
            "neighbours": [torch.from_numpy(self.neighbours.text), torch.from_numpy(self.neighbours.picture)],
            "step": self.step,
            "elapsed": self.elapsed,
            "rng": json.dumps(self.rng.bit_generator.state),
            "generator": self.generator.get_state(),
        }
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def load_state(self, path: Path) -> None:
        """Continues where `save_state` left off.

        Raises:
            TrainingError: no state there, or it is of another model.
        """
        if not path.exists():
            raise TrainingError(f"{path} does not exist; start without --resume")
        state = torch.load(path, weights_only=True)
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise TrainingError(f"{path} holds another model ({error}); use another --out") from error
        torch._foreach_copy_(self.average, state["average"])
        for optimizer, saved in zip(self.optimizers.all, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.neighbours.text, self.neighbours.picture = (bank.numpy() for bank in state["neighbours"])
        self.step, self.elapsed = state["step"], state["elapsed"]
        self.rng.bit_generator.state = json.loads(state["rng"])
        self.generator.set_state(state["generator"])


def image_processor() -> Qwen2VLImageProcessorPil:
    """Every picture becomes 64x64 pixels (its aspect kept as closely as 16-pixel steps allow): 16 image tokens."""
    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": PIXELS * PIXELS, "longest_edge": PIXELS * PIXELS},
        patch_size=PATCH,
        temporal_patch_size=2,
        merge_size=2,
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    )
