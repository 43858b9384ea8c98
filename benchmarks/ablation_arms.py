"""What the ablation compares: arms as changes to one recipe, in groups, the most important first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from unime_ray.config import EmbedderConfig, RerankerConfig, SelectConfig

BASE, INFONCE = "base", "infonce"
LEARNING_RATES = (1e-4, 3e-4, 8e-4, 1.5e-3, 3e-3)
"""Tried on dev for every family of arms with the first seed: the middle three, and outwards while the best is the
outermost. The same for all."""

RECIPE: dict[str, Any] = {
    "steps": 80,
    "batch_queries": 32,
    "micro_batch_queries": 32,
    "learning_rate": 3e-4,
    "warmup_steps": 8,
    "temperature": 0.05,
    "lora": {"rank": 16, "alpha": 32, "train_vision": True},
}
"""What all arms share: steps and queries a step. An arm with k negatives encodes 2 + k items a query."""

NUM_NEGATIVES = 3
KL = {"loss": "judge_kl", "num_negatives": NUM_NEGATIVES, "judge_temperature": 0.5}
HYBRID = {"loss": "hybrid", "num_negatives": NUM_NEGATIVES, "judge_temperature": 0.5, "infonce_weight": 4.0}
JUDGE_MODELS = ("tiny", "tiny_judge")
JUDGES = ("oracle@0.9", "oracle@0.8", "oracle@0.7", "oracle@0.6", *JUDGE_MODELS)

RERANKER: dict[str, Any] = {
    "steps": 40,
    "batch_queries": 32,
    "micro_batch_queries": 32,
    "learning_rate": 3e-4,
    "warmup_steps": 4,
    "lora": {"rank": 16, "alpha": 32, "train_vision": True},
}


@dataclass(frozen=True)
class Arm:
    """One line of the table. `family` is the arm whose learning rate it takes over; itself if it has its own."""

    name: str
    group: str
    what: str
    judge: str = "oracle"
    train: dict[str, Any] = field(default_factory=dict)
    select: dict[str, Any] = field(default_factory=dict)
    hard_labels: bool = False
    family: str = ""
    rerank: tuple[Literal["pointwise", "listwise"], int] | None = None
    """A reranker on top of base: how it is asked, and how many answers it reorders."""

    @property
    def tuned_as(self) -> str:
        return self.family or self.name

    def config(self, seed: int, learning_rate: float | None, steps: int | None = None) -> EmbedderConfig:
        """The embedder section of this arm."""
        changes = RECIPE | self.train | {"seed": seed, "checkpoint_every": 1_000_000}
        changes |= {"learning_rate": learning_rate} if learning_rate is not None else {}
        return EmbedderConfig.model_validate(changes | ({"steps": steps} if steps else {}))

    def reranker(self, seed: int, steps: int | None = None) -> RerankerConfig:
        changes = RERANKER | self.train | {"seed": seed, "checkpoint_every": 1_000_000}
        return RerankerConfig.model_validate(changes | ({"steps": steps} if steps else {}))

    def selection(self, base: SelectConfig) -> SelectConfig:
        return SelectConfig.model_validate(base.model_dump() | self.select)


def arms() -> list[Arm]:
    """All arms in the order in which they are run."""
    return [*_losses(), *_judges(), *_numbers(), *_temperatures(), *_selection(), *_rerankers()]


def _losses() -> Iterable[Arm]:
    wide = {"batch_queries": 80, "micro_batch_queries": 80}
    plain: dict[str, Any] = {"loss": "infonce", "num_negatives": 0}
    hard = {"loss": "infonce", "num_negatives": NUM_NEGATIVES}
    by_similarity = {"cycle": 1}
    yield Arm(BASE, "losses", "not adapted")
    yield Arm(INFONCE, "losses", "VLM2Vec: in-batch negatives only", train=plain)
    yield Arm(
        "hard_unjudged",
        "losses",
        "in-batch and the most similar candidates, no judge",
        judge="none",
        train=hard,
        select=by_similarity,
        family="hard_filtered",
    )
    yield Arm("hard_filtered", "losses", "in-batch and mined negatives, judge drops false ones", train=hard)
    yield Arm("unime_v2", "losses", "UniME-V2: KL to the judge's scores over mined negatives", train=KL)
    yield Arm("hybrid", "losses", "UniME-V2's KL + InfoNCE", train=HYBRID)
    yield Arm(
        "infonce_wide", "losses", "InfoNCE with as many items a step as k = 3", train=plain | wide, family=INFONCE
    )
    yield Arm(
        "hard_filtered_wide",
        "losses",
        "`hard_filtered` with as many queries a step",
        train=hard | wide,
        family="hard_filtered",
    )
    yield Arm("hybrid_wide", "losses", "`hybrid` with as many queries a step", train=HYBRID | wide, family="hybrid")
    yield Arm(
        "unime_v1",
        "losses",
        "UniME V1: hardest 8 of the batch",
        train={"loss": "unime_v1", "num_negatives": 0},
        family=INFONCE,
    )
    yield Arm(
        "unime_v2_hard_labels",
        "losses",
        "cross-entropy over mined negatives, judge only drops",
        train={"loss": "hard_negative_ce", "num_negatives": NUM_NEGATIVES},
        family="unime_v2",
    )
    yield Arm(
        "hardness_weighted",
        "losses",
        "in-batch InfoNCE, negatives weighted by similarity",
        train={"loss": "hardness_infonce", "num_negatives": 0},
        family=INFONCE,
    )
    yield Arm(
        "margin_mse",
        "losses",
        "squared error of margins to the judge's",
        train={"loss": "margin_mse", "num_negatives": NUM_NEGATIVES, "judge_temperature": 1.0, "temperature": 1.0},
        family="unime_v2",
    )
    yield Arm(
        "matryoshka",
        "losses",
        "hybrid at widths 48, 96, 192",
        train=HYBRID | {"matryoshka_dims": (48, 96, 192)},
        family="hybrid",
    )


def _judges() -> Iterable[Arm]:
    for judge in JUDGES:
        yield Arm(f"hybrid/{judge}", "judges", f"hybrid, judge {judge}", judge, HYBRID, family="hybrid")
    for judge in JUDGES:
        yield Arm(f"unime_v2/{judge}", "judges", f"UniME-V2, judge {judge}", judge, KL, family="unime_v2")


def _numbers() -> Iterable[Arm]:
    for count in (4, 6, 8, 10):
        train = HYBRID | {"num_negatives": count}
        yield Arm(
            f"hybrid/k={count}",
            "negatives",
            f"{count} negatives instead of {NUM_NEGATIVES}",
            train=train,
            family="hybrid",
        )


def _temperatures() -> Iterable[Arm]:
    for value in (0.02, 0.1, 0.25, 1.0):
        for name, train in (("hybrid", HYBRID), ("unime_v2", KL)):
            changed = train | {"judge_temperature": value}
            what = f"judge temperature {value} instead of {train['judge_temperature']}"
            yield Arm(f"{name}/tau={value}", "temperature", what, train=changed, family=name)
    published = KL | {"judge_temperature": 0.02, "temperature": 0.02}
    yield Arm("unime_v2/published", "temperature", "both temperatures 0.02", train=published, family="unime_v2")


def _selection() -> Iterable[Arm]:
    variants = {
        "delta=positive": {"delta": "positive"},
        "cycle=1": {"cycle": 1},
        "beta=0.3": {"beta": 0.3},
        "published_fallback": {"fallback": "published"},
    }
    for name, select in variants.items():
        yield Arm(f"hybrid/{name}", "selection", f"hybrid, {name}", train=HYBRID, select=select, family="hybrid")
    for fallback in ("skip", "published"):
        name = f"hybrid/tiny/delta=positive/{fallback}"
        select = {"delta": "positive", "fallback": fallback}
        what = f"the same with judge tiny, fallback {fallback}"
        yield Arm(name, "selection", what, "tiny", HYBRID, select, family="hybrid")


def _rerankers() -> Iterable[Arm]:
    for mode in ("pointwise", "listwise"):
        for length in (5, 10):
            name = f"reranker/{mode}/{length}"
            train = {"max_list_length": length}
            what = f"base, first {length} answers reordered {mode}"
            yield Arm(name, "rerankers", what, train=train, rerank=(mode, length))  # type: ignore[arg-type]
