"""vLLM as judge: pairs reach the engine grouped by the item that opens their prompt, so its prefix cache keeps it.

One prefill per pair and no decoding. Two heads read the answer:

- `classify` (default): a head of two rows, Yes and No, in float32 on the last token. It skips the projection onto the
  vocabulary and the sampler.
- `logits` (default if the model is split over devices): the language head over the whole vocabulary, in float32; the
  two raw logits are picked out of it.

Both give the logits the transformers engine gives, up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from unime_ray.config import JudgeConfig
from unime_ray.config_vllm import VllmConfig
from unime_ray.errors import ModelError, RejectedRow
from unime_ray.models.families import check_judge
from unime_ray.models.items import Item
from unime_ray.models.judge import Group, Usage, Verdict
from unime_ray.models.pixels import Picture
from unime_ray.models.prompt_ids import UNIME_V2, PromptIds, check_length
from unime_ray.models.tokens import Segment, join
from unime_ray.models.vllm_engine import EngineStats, Frontend, VllmEngine
from unime_ray.prompts import JudgePrompt, judge_prompt

Head = Literal["classify", "logits"]
Place = tuple[int, int]
"""(group, candidate): where a verdict goes."""
Answers = list[tuple[float, float]]
"""(logit of Yes, logit of No) of each prompt."""


class VllmJudge:
    """The vLLM engine of the judge protocol."""

    def __init__(
        self,
        frontend: Frontend,
        settings: VllmConfig | None = None,
        *,
        dtype: str = "float32",
        prompt_order: str = "query_first",
        repetition_penalty: float = 1.0,
        prompt: JudgePrompt = UNIME_V2,
    ) -> None:
        """`repetition_penalty` is applied here, to both answers, as the transformers engine does: the prompt has both.

        Raises:
            ModelError: vLLM is not installed or refuses the checkpoint; no chat template; Yes or No is not one token.
        """
        settings = settings or VllmConfig()
        check_judge(frontend.family, frontend.path)
        self.prompts = PromptIds(frontend.tokens, prompt_order, prompt)
        self.frontend, self.repetition_penalty = frontend, repetition_penalty
        self.head = _head(settings)
        arguments = _classify_arguments(self.prompts) if self.head == "classify" else _logits_arguments()
        self.engine = VllmEngine(frontend, settings, dtype=dtype, **arguments)
        # A generating engine keeps one place of the context for the token it would write.
        self.max_tokens = self.engine.max_tokens - (0 if self.head == "classify" else 1)

    @classmethod
    def load(cls, config: JudgeConfig) -> VllmJudge:
        """The judge a config describes.

        Raises:
            ModelError: as the constructor.
        """
        return cls(
            Frontend.load(config.model, config.revision, config.pixels),
            config.vllm,
            dtype=config.dtype,
            prompt_order=config.prompt_order,
            repetition_penalty=config.repetition_penalty,
            prompt=judge_prompt(config.prompt, config.instruction),
        )

    @property
    def stats(self) -> EngineStats:
        """Requests, prompt tokens and how many of them the prefix cache held."""
        return self.engine.stats

    @property
    def usage(self) -> Usage:
        """The same as every engine tells it; vLLM does not say what its encoder cache spared."""
        stats = self.engine.stats
        return Usage(stats.requests, stats.prompt_tokens, stats.prompt_tokens - stats.cached_tokens)

    def score(self, query: Item, candidates: Sequence[Item]) -> list[Verdict]:
        return self.score_groups([(query, candidates)])[0]

    def score_groups(self, groups: Sequence[Group]) -> list[list[Verdict]]:
        """Verdicts of many queries at once.

        Raises:
            EngineDied: the engine stopped working.
        """
        verdicts: list[list[Verdict]] = [[Verdict.failed("not scored")] * len(candidates) for _, candidates in groups]
        places, segments = self._prompts(groups, verdicts)
        for (group, candidate), (yes, no) in zip(places, self._answers(segments), strict=True):
            verdicts[group][candidate] = self._verdict(yes, no)
        return verdicts

    def _prompts(self, groups: Sequence[Group], verdicts: list[list[Verdict]]) -> tuple[list[Place], list[Segment]]:
        """Prompts ordered by the item that opens them; a pair that has none gets its verdict here."""
        pictures = self._pictures(groups)
        opened: dict[bytes, list[tuple[Place, Segment]]] = {}
        for group, (query, candidates) in enumerate(groups):
            for place, candidate in enumerate(candidates):
                first, second = (query, candidate) if self.prompts.prompt_order == "query_first" else (candidate, query)
                prompt = self._prompt(first, second, pictures)
                if isinstance(prompt, RejectedRow):
                    verdicts[group][place] = Verdict.failed(prompt.reason)
                else:
                    opened.setdefault(first.item_id, []).append(((group, place), prompt))
        pairs = [pair for together in opened.values() for pair in together]
        return [place for place, _ in pairs], [segment for _, segment in pairs]

    def _prompt(
        self, first: Item, second: Item, pictures: dict[bytes, Picture | RejectedRow | None]
    ) -> Segment | RejectedRow:
        sides: list[list[Picture]] = []
        for item in (first, second):
            picture = pictures[item.item_id]
            if isinstance(picture, RejectedRow):
                return picture
            sides.append([] if picture is None else [picture])
        try:
            prefix = self.prompts.judge_prefix(first.rendered, sides[0])
            suffix = self.prompts.judge_suffix(second.rendered, sides[1])
        except RejectedRow as reason:
            return reason
        return check_length([len(prefix), len(suffix)], self.max_tokens) or join([prefix, suffix])

    def _pictures(self, groups: Sequence[Group]) -> dict[bytes, Picture | RejectedRow | None]:
        items = {item.item_id: item for query, candidates in groups for item in (query, *candidates)}
        return dict(zip(items, self.frontend.pictures(list(items.values())), strict=True))

    def _answers(self, segments: Sequence[Segment]) -> Answers:
        outputs = self.engine.run(segments, self._params())
        if self.head == "classify":
            return [(float(output.outputs.data[0]), float(output.outputs.data[1])) for output in outputs]
        yes_id, no_id = self.prompts.yes_id, self.prompts.no_id
        found = [output.outputs[0].logprobs[0] for output in outputs]
        return [(logits[yes_id].logprob, logits[no_id].logprob) for logits in found]

    def _params(self) -> Any:
        from vllm import PoolingParams, SamplingParams

        if self.head == "classify":
            return PoolingParams(task="classify", use_activation=False)
        ids = [self.prompts.yes_id, self.prompts.no_id]
        return SamplingParams(max_tokens=1, temperature=0.0, logprob_token_ids=ids, detokenize=False)

    def _verdict(self, yes: float, no: float) -> Verdict:
        if not (math.isfinite(yes) and math.isfinite(no)):
            return Verdict.failed("the engine gave no finite logits")
        return Verdict.of(self._penalised(yes), self._penalised(no))

    def _penalised(self, logit: float) -> float:
        return logit / self.repetition_penalty if logit > 0 else logit * self.repetition_penalty


def _head(settings: VllmConfig) -> Head:
    split = settings.tensor_parallel_size > 1
    if settings.head == "classify" and split:
        # vLLM 0.32 takes the rows by token id from its own slice of the language head.
        raise ModelError("vllm.head `classify` needs vllm.tensor_parallel_size 1; use `logits`")
    return settings.head or ("logits" if split else "classify")


def _classify_arguments(prompts: PromptIds) -> dict[str, Any]:
    """A pooling engine whose classifier is the two rows of the language head, in float32."""
    # vLLM takes tokens by their spelling in the vocabulary, which need not be the text they stand for.
    names = prompts.tokens.tokenizer.convert_ids_to_tokens([prompts.yes_id, prompts.no_id])
    overrides = {"text_config": {"classifier_from_token": names, "method": "no_post_processing"}}
    return {"runner": "pooling", "convert": "classify", "hf_overrides": overrides}


def _logits_arguments() -> dict[str, Any]:
    # bfloat16 logits come in steps of 1/8; the head runs in float32 whatever the model's dtype.
    return {"logprobs_mode": "raw_logits", "hf_overrides": {"head_dtype": "float32"}}
