"""Training the embedder: base checkpoint -> LoRA (or all weights) -> merged checkpoint at `embedder/<name>/model`."""

from __future__ import annotations

from typing import Any

from unime_ray.artifacts import Manifest, Run
from unime_ray.config import EmbedderConfig, PixelBudget, RunConfig
from unime_ray.train.job import TrainingJob
from unime_ray.train.launch import run_training, section_of


def train_worker(job: dict[str, Any]) -> dict[str, Any]:
    """What every training worker runs. Heavy imports stay here: the driver needs none of them."""
    from unime_ray.train import distill_objective, embedder_objective
    from unime_ray.train.worker import work

    settings = TrainingJob.model_validate(job)
    distils = settings.section.get("loss") == "text_distill"
    make_objective = distill_objective.make_objective if distils else embedder_objective.make_objective
    return work(settings, EmbedderConfig, make_objective)


def run_train_embedder(run: Run, config: RunConfig, name: str) -> Manifest:
    """Train `config.embedders[name]` on its judge's hard negatives, or on its teacher's texts; leaves
    `embedder/<name>/model` (merged weights), `adapter/` with LoRA, and `log.jsonl`.

    Raises:
        ConfigError: no embedder of that name. ArtifactError: the hard negatives (the teacher's vectors, the embedder it
            starts from) are missing.
        TrainingError: a list shorter than `num_negatives`, a loss that is not finite, a payload that is gone.
    """
    section = section_of(config.embedders, name, "embedders")
    pixels = section.pixels if section.pixels != PixelBudget() else config.embed.pixels
    judge = config.judge_of(section) if section.teacher is None else None
    return run_training(
        run,
        section,
        table=run.artifact("teacher", section.teacher) if judge is None else run.artifact("hard_negatives", judge),
        judge=judge,
        kind="embedder",
        name=name,
        model=section.model or config.embed.model,
        start=run.artifact("embedder", section.start_from) if section.start_from is not None else None,
        pixels=pixels,
        num_negatives=section.num_negatives,
        worker=train_worker,
    )
