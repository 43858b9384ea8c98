"""Which loss trains an embedder, and the settings of each: `embedders.NAME.loss`.

A setting that belongs to another loss is refused, since it would silently do nothing.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from unime_ray.sections import Count, Positive, Section

LossName = Literal[
    "judge_kl",
    "hard_negative_ce",
    "margin_mse",
    "infonce",
    "hardness_infonce",
    "unime_v1",
    "hybrid",
    "text_distill",
]
"""judge_kl          UniME-V2: symmetrised KL between student and judge over a query's own candidates
hard_negative_ce  cross-entropy at c+ over the same candidates: hard negatives without soft scores
margin_mse        squared difference of the student's and the judge's margins
infonce           VLM2Vec: in-batch InfoNCE, with `num_negatives` hard negatives of each query in the batch
hardness_infonce  in-batch InfoNCE whose negatives weigh more the more similar they are
unime_v1          UniME V1, stage 2: in-batch false negatives out, top-k of the rest, InfoNCE
hybrid            judge_kl + `infonce_weight` x infonce without likely false negatives
text_distill      UniME V1, stage 1: a teacher's similarities between texts, from texts alone"""

PER_QUERY = ("judge_kl", "hard_negative_ce", "margin_mse")
"""Losses of a query's own candidates: ranks exchange nothing but gradients."""
JUDGED = ("judge_kl", "margin_mse", "hybrid")
"""Losses that read judge scores."""
NEEDS_NEGATIVES = (*PER_QUERY, "hybrid")
SETTINGS: dict[str, tuple[str, ...]] = {
    "judge_targets": JUDGED,
    "infonce_weight": ("hybrid",),
    "false_negative_margin": ("hybrid", "unime_v1"),
    "in_batch_top_k": ("unime_v1",),
    "hardness": ("hardness_infonce",),
    "teacher": ("text_distill",),
    "teacher_temperature": ("text_distill",),
    "include_self": ("text_distill",),
}
"""Settings that only some losses read."""


class LossSettings(Section):
    loss: LossName = "judge_kl"
    num_negatives: Annotated[int, Field(ge=0)] = 8
    """Hard negatives of each query that take part, the first of its row. For in-batch losses they are candidates of the
    whole batch; 0 leaves the positives alone."""
    temperature: Positive = 0.02
    """Divides the student's cosines."""
    judge_temperature: Positive = 0.02
    """Divides the judge's scores (or their logits)."""
    judge_targets: Literal["score", "logit"] = "score"
    """What the judge's distribution is the softmax of: scores in [0, 1], as published, or their logits, whose contrast
    is not bounded. A temperature that suits one does not suit the other."""
    infonce_weight: Annotated[float, Field(ge=0.0)] = 1.0
    false_negative_margin: Annotated[float, Field(ge=-2.0, le=2.0)] | None = 0.1
    """Candidates with cos(q, c) > cos(q, c+) + this are no negatives (None: all are)."""
    in_batch_top_k: Count = 8
    """How many of the batch's most similar negatives take part."""
    hardness: Annotated[float, Field(ge=0.0)] = 9.0
    """A negative's weight is exp(hardness x cosine); 0 is plain InfoNCE."""
    matryoshka_dims: tuple[Count, ...] = ()
    """Train the first so many numbers of an embedding to be one too: any loss, the mean over these widths. The full
    width is trained only if it is among them."""
    matryoshka_weights: tuple[Positive, ...] = ()
    """One per width (default: all equal)."""

    teacher: str | None = None
    """Which of `teachers` is distilled."""
    teacher_temperature: Positive | None = None
    """Divides the teacher's cosines (default: `temperature`, as published)."""
    include_self: bool = True
    """Whether a text's similarity to itself is part of both distributions, as published."""

    @property
    def is_per_query(self) -> bool:
        """Whether a query's loss depends on nothing but its own candidates."""
        return self.loss in PER_QUERY

    @property
    def reads_judge(self) -> bool:
        """Whether a judge had a say in it: in-batch losses may borrow its hard negatives, but need none."""
        return self.loss in NEEDS_NEGATIVES

    @model_validator(mode="after")
    def _settings_belong(self) -> LossSettings:
        for name, readers in SETTINGS.items():
            if self.loss not in readers and getattr(self, name) != LossSettings.model_fields[name].default:
                fix = " or ".join(f"`loss: {reader}`" for reader in readers)
                raise ValueError(f"loss {self.loss} does not read `{name}`; remove it, or choose {fix}")
        return self

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> LossSettings:
        if self.loss in NEEDS_NEGATIVES and self.num_negatives == 0:
            raise ValueError(
                f"loss {self.loss} compares hard negatives; set num_negatives to 1 or more, or use infonce"
            )
        if self.loss == "unime_v1" and self.false_negative_margin is None:
            raise ValueError(
                "loss unime_v1 drops false negatives by a margin; set false_negative_margin (published: 0.1)"
            )
        if self.loss == "text_distill" and self.teacher is None:
            raise ValueError("loss text_distill needs `teacher`: the name of a section of `teachers`")
        return self

    @model_validator(mode="after")
    def _widths_fit(self) -> LossSettings:
        dims, weights = self.matryoshka_dims, self.matryoshka_weights
        if list(dims) != sorted(set(dims)):
            raise ValueError(f"matryoshka_dims must ascend without repeats, not {list(dims)}")
        if weights and len(weights) != len(dims):
            raise ValueError(
                f"{len(weights)} matryoshka_weights for {len(dims)} matryoshka_dims; give one each, or none"
            )
        return self
