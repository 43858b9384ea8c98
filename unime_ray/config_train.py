"""The config sections of training: `embedders` and `rerankers`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from unime_ray.config_loss import LossSettings
from unime_ray.sections import Count, Fraction, PixelBudget, Positive, Section


class LoraConfig(Section):
    """Low-rank adaptation; `rank: 0` trains all weights."""

    rank: Annotated[int, Field(ge=0)] = 16
    alpha: Positive = 64.0
    dropout: Fraction = 0.0
    dora: bool = False
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")
    train_vision: bool = False
    """Adapt the vision tower's linear layers too."""


class TrainConfig(Section):
    """What embedder and reranker training share."""

    judge: str | None = None
    """Which of `judges` made the hard negatives (default: the only one)."""
    model: str | None = None
    """Base checkpoint (default: `embed.model` for embedders; required for rerankers unless there is a judge model)."""
    revision: str | None = None
    lora: LoraConfig = LoraConfig()
    steps: Count = 2000
    batch_queries: Count = 512
    """Queries per optimizer step over all workers."""
    micro_batch_queries: Count = 8
    """Queries per forward pass of one worker; accumulated up to `batch_queries`."""
    learning_rate: Positive = 1e-4
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    max_grad_norm: Positive = 1.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    pixels: PixelBudget = PixelBudget()
    num_workers: Count = 1
    cpus_per_worker: Positive = 1.0
    use_gpu: bool = False
    checkpoint_every: Count = 100
    max_failures: Annotated[int, Field(ge=0)] = 2
    log_every: Count = 10
    seed: int = 0


class EmbedderConfig(LossSettings, TrainConfig):
    """How an embedder is trained: its loss with that loss's settings (`config_loss`), and the training itself."""


class RerankerConfig(TrainConfig):
    learning_rate: Positive = 2e-5
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    max_list_length: Annotated[int, Field(ge=2, le=10)] = 10
    """Candidates shown in a listwise prompt; sampled uniformly from 2 to this many during training."""
    gold_position: Literal["uniform", "published"] = "uniform"
    pairwise_weight: Annotated[float, Field(ge=0.0)] = 1.0
    listwise_weight: Annotated[float, Field(ge=0.0)] = 1.0
