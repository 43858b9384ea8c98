"""vLLM's ways of scoring the benchmark's pairs.

vllm          pairs grouped by query; a head of two rows reads the answer
vllm random   the same prompts in one random order
vllm logits   grouped, with the language head over the vocabulary and the sampler
vllm turned   grouped by candidate, `prompt_order: candidate_first`
vllm large    grouped by query, with a cache of picture features that holds every picture
vllm embeds   grouped by query, picture features made by our own vision tower and handed over
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from judge_cost import Groups
from judge_ways import Way, count, encode

from unime_ray.config import PixelBudget
from unime_ray.config_vllm import VllmConfig
from unime_ray.models import vllm_engine
from unime_ray.models.backbone import Backbone
from unime_ray.models.judge_vllm import VllmJudge

RUNNING = 8
"""Requests in flight on a CPU, so that its small cache is not full of them."""
Score = Callable[[VllmJudge, Groups], int]


def vllm_ways(
    model: str, backbone: Backbone, dtype: str, pixels: PixelBudget, prompt_tokens: float
) -> dict[str, Callable[[], list[Way]]]:
    """What starts each engine, by the name of its first way. On a CPU its key-value cache is cut to what `RUNNING`
    prompts of `prompt_tokens` need, so that with more queries than that it cannot hold all their prefixes."""
    frontend = vllm_engine.Frontend.load(model, pixels=pixels)
    base = {} if torch.cuda.is_available() else _small_cache(prompt_tokens)

    def start(names: dict[str, Score], order: str = "query_first", **change: Any) -> list[Way]:
        settings = VllmConfig.model_validate(base | change)
        judge = VllmJudge(frontend, settings, dtype=dtype, prompt_order=order)
        return [_way(name, judge, score) for name, score in names.items()]

    featured = lambda judge, groups: _with_features(backbone, judge, groups)  # noqa: E731
    return {
        "vllm": lambda: start({"vllm": _grouped, "vllm random": _shuffled, "vllm embeds": featured}),
        "vllm logits": lambda: start({"vllm logits": _grouped}, head="logits"),
        "vllm turned": lambda: start({"vllm turned": _grouped}, "candidate_first"),
        "vllm large": lambda: start({"vllm large": _grouped}, encoder_cache_tokens=1 << 20),
    }


def _small_cache(prompt_tokens: float) -> dict[str, int]:
    blocks = math.ceil(prompt_tokens / vllm_engine.CPU_BLOCK_SIZE) + 1
    return {"max_num_seqs": RUNNING, "max_model_len": 1024, "cache_blocks": RUNNING * blocks}


def _way(name: str, judge: VllmJudge, score: Score) -> Way:
    """`hit_rate` of the way is that of its last run."""

    def run(groups: Groups) -> int:
        tokens, cached = judge.stats.prompt_tokens, judge.stats.cached_tokens
        pairs = score(judge, groups)
        way.hit_rate = (judge.stats.cached_tokens - cached) / (judge.stats.prompt_tokens - tokens)
        return pairs

    def forget() -> None:
        judge.engine.forget()
        judge.frontend.pixels.forget()

    way = Way(name, run, forget, know=None)
    return way


def _grouped(judge: VllmJudge, groups: Groups) -> int:
    return count(judge.score_groups(groups))


def _shuffled(judge: VllmJudge, groups: Groups) -> int:
    _, segments = judge._prompts(groups, [[None] * len(candidates) for _, candidates in groups])  # type: ignore[misc]
    random.Random(0).shuffle(segments)
    return len(judge._answers(segments))


def _with_features(backbone: Backbone, judge: VllmJudge, groups: Groups) -> int:
    """Distinct pictures through our own tower first; requests then carry features instead of pixels."""

    class Featured(vllm_engine.Requests):
        def _prepare(self, picture: Any) -> Any:
            from vllm.multimodal import inputs

            values, grid = backbone.features([picture])[0], torch.tensor([1, *picture.grid])
            flat = inputs.MultiModalFlatField(slices=[slice(0, len(values))])
            whole = inputs.MultiModalBatchedField(keep_on_cpu=True)
            fields = {"image_embeds": (values, flat), "image_grid_thw": (grid, whole)}
            made = {name: inputs.MultiModalFieldElem(data=data, field=kind) for name, (data, kind) in fields.items()}
            return inputs.MultiModalKwargsItem(made)

    backbone.forget_features()
    encode(backbone, list({item.item_id: item for query, many in groups for item in (query, *many)}.values()))
    plain, vllm_engine.Requests = vllm_engine.Requests, Featured  # type: ignore[misc]
    try:
        with torch.no_grad():
            return count(judge.score_groups(groups))
    finally:
        vllm_engine.Requests = plain  # type: ignore[misc]
