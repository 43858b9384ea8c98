"""Training the reranker: base checkpoint -> LoRA (or all weights) -> merged checkpoint at `reranker/<name>/model`."""

from __future__ import annotations

from typing import Any

from unime_ray.artifacts import Manifest, Run
from unime_ray.config import PixelBudget, RerankerConfig, RunConfig
from unime_ray.errors import ConfigError
from unime_ray.train.job import TrainingJob
from unime_ray.train.launch import run_training, section_of


def train_worker(job: dict[str, Any]) -> dict[str, Any]:
    """What every training worker runs. Heavy imports stay here: the driver needs none of them."""
    from unime_ray.train.reranker_objective import make_objective
    from unime_ray.train.worker import work

    return work(TrainingJob.model_validate(job), RerankerConfig, make_objective)


def run_train_reranker(run: Run, config: RunConfig, name: str) -> Manifest:
    """Train `config.rerankers[name]` on its judge's hard negatives; leaves `reranker/<name>/model` (merged weights),
    `adapter/` with LoRA, and `log.jsonl`.

    Raises:
        ConfigError: no reranker of that name, or no model to start from. ArtifactError: the negatives are missing.
        ModelError: the model has no chat template, or answers that are not single tokens.
        TrainingError: a query without negatives, a loss that is not finite, a payload that is gone.
    """
    section = section_of(config.rerankers, name, "rerankers")
    judge = config.judges.get(config.judge_of(section))  # None: imported negatives have no judge here
    model = section.model or (judge.model if judge is not None and judge.engine == "transformers" else None)
    if model is None:
        raise ConfigError(f"rerankers.{name}.model: name the checkpoint to start from; its judge is no model")
    inherited = judge.pixels if judge is not None else config.embed.pixels
    pixels = section.pixels if section.pixels != PixelBudget() else inherited
    return run_training(
        run,
        section,
        table=run.artifact("hard_negatives", config.judge_of(section)),
        judge=config.judge_of(section),
        kind="reranker",
        name=name,
        model=model,
        pixels=pixels,
        num_negatives=1,
        worker=train_worker,
    )
