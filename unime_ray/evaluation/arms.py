"""What is compared: the base embedder, every trained one, and every reranker on top of some of them.

base                          the checkpoint that mined
<embedder>                    one a section of `embedders`
<embedder>+<reranker>         the reranker on base and on the embedders trained with the reranker's judge
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from unime_ray.artifacts import Artifact, Run
from unime_ray.config import PixelBudget, RunConfig, TrainConfig
from unime_ray.models.names import model_revision, resolve_model

BASE = "base"
RETRIEVE, RERANK = "retrieve", "rerank"


@dataclass(frozen=True)
class Checkpoint:
    """A model as a worker loads it."""

    model: str
    revision: str | None
    dtype: str
    pixels: PixelBudget
    batch_tokens: int
    dimensions: int | None = None
    """Numbers of a vector that are kept (None: all)."""


@dataclass(frozen=True)
class Arm:
    """One column of the results. `trained` is the artifact of its last trained part, None for base."""

    name: str
    stage: str
    embedder: str
    reranker: str | None
    judge: str | None
    loss: str | None
    checkpoint: Checkpoint
    trained: Artifact | None

    def describe(self) -> dict[str, Any]:
        """What the results say of the arm."""
        kept = ("name", "stage", "embedder", "reranker", "judge", "loss")
        return {key: value for key, value in asdict(self).items() if key in kept} | {"model": self.checkpoint.model}


def arms_of(run: Run, config: RunConfig) -> list[Arm]:
    """All arms of a config: embedders first, base before all."""
    embedders = [_base(config)] + [_embedder(run, config, name) for name in config.embedders]
    reranked = []
    for name, section in config.rerankers.items():
        judge = config.judge_of(section)
        below = [arm for arm in embedders if arm.name == BASE or _is_partner(config, arm.name, judge)]
        reranked += [_reranked(run, config, name, arm) for arm in below]
    return embedders + reranked


def _is_partner(config: RunConfig, embedder: str, judge: str) -> bool:
    """Whether a reranker of `judge` stands on this embedder: same judge, and no baseline that ignores judges."""
    section = config.embedders[embedder]
    return section.reads_judge and config.judge_of(section) == judge


def _base(config: RunConfig) -> Arm:
    embed = config.embed
    checkpoint = Checkpoint(
        embed.model, embed.revision, embed.dtype, embed.pixels, config.evaluate.batch_tokens, embed.dimensions
    )
    return Arm(BASE, RETRIEVE, BASE, None, None, None, checkpoint, None)


def _embedder(run: Run, config: RunConfig, name: str) -> Arm:
    section, trained = config.embedders[name], run.artifact("embedder", name)
    judge = config.judge_of(section) if section.reads_judge else None
    return Arm(name, RETRIEVE, name, None, judge, section.loss, _trained(config, section, trained), trained)


def _reranked(run: Run, config: RunConfig, name: str, below: Arm) -> Arm:
    section, trained = config.rerankers[name], run.artifact("reranker", name)
    judge, checkpoint = config.judge_of(section), _trained(config, section, trained)
    return Arm(f"{below.name}+{name}", RERANK, below.embedder, name, judge, below.loss, checkpoint, trained)


def _trained(config: RunConfig, section: TrainConfig, trained: Artifact) -> Checkpoint:
    """A trained checkpoint: pictures as large as training had them, numbers as exact as base has them.

    `section.dtype` is the arithmetic of training; measuring all arms with that of `embed` keeps them comparable.
    """
    manifest = trained.manifest()
    stored = manifest.config.get("pixels") if manifest is not None else None
    pixels = PixelBudget.model_validate(stored) if stored is not None else section.pixels
    embed, batch_tokens = config.embed, config.evaluate.batch_tokens
    return Checkpoint(trained.child("model"), None, embed.dtype, pixels, batch_tokens, embed.dimensions)


def base_revision(config: RunConfig) -> str:
    """What exactly the base checkpoint is: its content hash or commit."""
    return model_revision(resolve_model(config.embed.model), config.embed.revision)
