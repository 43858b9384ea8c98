"""The config sections of training: `embedders` and `rerankers`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from unime_ray.config_loss import LossSettings
from unime_ray.sections import Count, Fraction, PixelBudget, Positive, Section, Seed


class LoraConfig(Section):
    """Low-rank adaptation; `rank: 0` trains all weights."""

    rank: Annotated[int, Field(ge=0)] = 16
    alpha: Positive = 64.0
    dropout: Fraction = 0.0
    dora: bool = False
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")
    init: Literal["gaussian", "kaiming"] = "gaussian"
    """How the adapters' first factors start (the second are zero): as the published embedders, or as the reranker."""
    train_vision: bool = False
    """Adapt the vision tower too."""
    vision_modules: tuple[str, ...] = ()
    """Which linear layers of its blocks (default: all of them)."""


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
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """`fsdp` splits weights, gradients and optimizer over the workers, for models that do not fit on one of them."""
    feature_cache_mb: Annotated[int, Field(ge=0)] | None = None
    """Picture features kept while the vision tower is frozen (default: 512, on a GPU 4096; 0: none)."""
    pixels: PixelBudget = PixelBudget()
    num_workers: Count | tuple[Count, Count] = 1
    """How many, or [least, most]: then as many as the cluster has room for, looked at every `resize_check_seconds`."""
    resize_check_seconds: Positive = 60.0
    cpus_per_worker: Positive = 1.0
    use_gpu: bool = False
    checkpoint_every: Count = 100
    max_failures: Annotated[int, Field(ge=0)] = 2
    log_every: Count = 10
    tracker: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Who gets the figures of each step besides `log.jsonl`; files go to `trackers/` beside it."""
    wandb_project: str = "unime-ray"
    wandb_mode: Literal["offline", "online"] = "offline"
    """`offline` writes files for `wandb sync`; `online` needs WANDB_API_KEY on the workers."""
    seed: Seed = 0

    @property
    def least_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @model_validator(mode="after")
    def _can_be_run(self) -> TrainConfig:
        if self.least_workers > self.most_workers:
            raise ValueError(f"num_workers: [{self.least_workers}, {self.most_workers}] should be [least, most]")
        if self.strategy == "fsdp" and self.lora.train_vision:
            raise ValueError(
                "strategy `fsdp` leaves the vision tower whole on every worker; set lora.train_vision: false"
            )
        return self


class EmbedderConfig(LossSettings, TrainConfig):
    """How an embedder is trained: its loss with that loss's settings (`config_loss`), and the training itself."""

    start_from: str | None = None
    """Another of `embedders` whose trained weights this one starts from (default: `model`)."""

    @model_validator(mode="after")
    def _starts_once(self) -> EmbedderConfig:
        if self.start_from is not None and self.model is not None:
            raise ValueError("`model` and `start_from` both name a checkpoint to start from; remove one")
        if self.loss == "text_distill" and self.lora.train_vision:
            raise ValueError("loss text_distill sees texts only; set lora.train_vision to false")
        return self


class RerankerConfig(TrainConfig):
    learning_rate: Positive = 2e-5
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    max_list_length: Annotated[int, Field(ge=2, le=10)] = 10
    """Candidates shown in a listwise prompt; sampled uniformly from 2 to this many during training."""
    gold_position: Literal["uniform", "published"] = "uniform"
    pairwise_weight: Annotated[float, Field(ge=0.0)] = 1.0
    listwise_weight: Annotated[float, Field(ge=0.0)] = 1.0
