"""What a judge is: anything that says how well each candidate meets a query (UniME-V2, semantic matching score).

    s = exp(l_Yes) / (exp(l_Yes) + exp(l_No))

Engines: `judge_transformers` and `judge_vllm` (a vision-language model in this process), `judge_openai` (behind a
server) and `oracle` (a truth table, for measuring).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

from unime_ray.config import JudgeConfig
from unime_ray.errors import ModelError
from unime_ray.models.items import Item
from unime_ray.prompts import judge_prompt

Group = tuple[Item, Sequence[Item]]
"""A query and its candidates."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One pair's logits (after the repetition penalty) and score in [0, 1], or the reason there are none."""

    logit_yes: float | None
    logit_no: float | None
    score: float | None
    error: str | None = None

    @classmethod
    def of(cls, logit_yes: float, logit_no: float) -> Verdict:
        return cls(logit_yes, logit_no, yes_probability(logit_yes, logit_no))

    @classmethod
    def failed(cls, reason: str) -> Verdict:
        return cls(None, None, None, reason)


@dataclass(slots=True)
class Usage:
    """What an engine has done so far."""

    pairs: int = 0
    prompt_tokens: int = 0
    """Of all pairs, each prompt counted whole."""
    computed_tokens: int = 0
    """Those that went through the language model; the others were shared. Padding is not counted."""
    pictures: int = 0
    """Of all pairs."""
    pictures_encoded: int = 0
    """Those that went through the vision tower."""

    def less(self, other: Usage) -> Usage:
        """What was done since `other`."""
        return Usage(*(getattr(self, one.name) - getattr(other, one.name) for one in fields(self)))


class Judge(Protocol):
    """Scores candidates against queries; a pair that cannot be scored gets an error and never stops the others."""

    def score(self, query: Item, candidates: Sequence[Item]) -> list[Verdict]:
        """One verdict per candidate, in order."""
        ...

    def score_groups(self, groups: Sequence[Group]) -> list[list[Verdict]]:
        """The same for many queries at once: what an engine can batch best."""
        ...


def load_judge(config: JudgeConfig) -> Judge:
    """The judge a config describes.

    Raises:
        ModelError: the checkpoint cannot judge (no chat template, Yes or No is not a single token, ...), or a server's
            key is not there.
        CorpusError: the oracle's truth table cannot be read.
    """
    if config.engine == "oracle":
        from unime_ray.corpus.truth import Truth
        from unime_ray.models.oracle import OracleJudge

        return OracleJudge(Truth.load(config.truth or ""), config.noise_auc)
    prompt = judge_prompt(config.prompt, config.instruction)
    if config.engine == "openai":
        from unime_ray.models.judge_openai import OpenAIJudge

        if config.server is None:
            raise ModelError("engine `openai` needs `server: {base_url: http://host:port/v1}`")
        return OpenAIJudge(config.server, config.model, prompt_order=config.prompt_order, prompt=prompt)
    if config.engine == "vllm":
        from unime_ray.models.judge_vllm import VllmJudge

        return VllmJudge.load(config)
    from unime_ray.models.backbone import Backbone
    from unime_ray.models.judge_transformers import TransformersJudge

    backbone = Backbone.load(config.model, revision=config.revision, dtype=config.dtype, pixels=config.pixels)
    return TransformersJudge(
        backbone,
        prompt_order=config.prompt_order,
        repetition_penalty=config.repetition_penalty,
        share_prefix=config.share_prefix,
        batch_tokens=config.batch_tokens,
        prompt=prompt,
    )


def usage_of(judge: Judge) -> Usage:
    """What a judge has done so far; zeros if it does not count."""
    found = getattr(judge, "usage", None)
    return replace(found) if isinstance(found, Usage) else Usage()


def yes_probability(logit_yes: float, logit_no: float) -> float:
    """exp(l_Yes) / (exp(l_Yes) + exp(l_No)), without overflow."""
    difference = logit_yes - logit_no
    if difference >= 0:
        return 1.0 / (1.0 + math.exp(-difference))
    return math.exp(difference) / (1.0 + math.exp(difference))
