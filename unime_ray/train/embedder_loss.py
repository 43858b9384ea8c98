"""The loss that a config names, of embeddings: one number per query of this rank.

Shapes: B queries, K = 1 + k candidates of a query, M candidates of the whole batch, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from unime_ray import losses
from unime_ray.config import EmbedderConfig
from unime_ray.errors import TrainingError
from unime_ray.train.collate import InBatch


@dataclass(frozen=True)
class Embedded:
    """What a loss may read. Losses of a query's own candidates need neither `candidates_MD` nor `batch`."""

    queries_BD: Tensor
    own_BKD: Tensor
    scores_BK: Tensor
    """Judge scores in [0, 1]."""
    candidates_MD: Tensor | None = None
    """Candidates of all ranks."""
    batch: InBatch | None = None


def embedder_loss(config: EmbedderConfig, rows: Embedded) -> Tensor:
    """`config.loss` of this rank's queries, (B,); with `matryoshka_dims` its mean over these widths.

    Raises:
        TrainingError: a Matryoshka width exceeds the embedding's.
    """
    own = own_loss if config.is_per_query else in_batch_loss
    embeddings = [rows.queries_BD, rows.own_BKD]
    if not config.is_per_query:
        assert rows.candidates_MD is not None
        embeddings.append(rows.candidates_MD)

    def loss(*parts: Tensor) -> Tensor:
        return own(config, rows, *parts)

    if not config.matryoshka_dims:
        return loss(*embeddings)
    check_widths(config, rows.queries_BD.shape[-1])
    return losses.matryoshka(loss, embeddings, config.matryoshka_dims, config.matryoshka_weights)


def check_widths(config: EmbedderConfig, width: int) -> None:
    """Raise TrainingError if a Matryoshka width exceeds the embedding's."""
    if max(config.matryoshka_dims, default=0) > width:
        raise TrainingError(
            f"matryoshka_dims {list(config.matryoshka_dims)}: the model's embeddings have {width} numbers; "
            f"name widths up to {width}"
        )


def own_loss(config: EmbedderConfig, rows: Embedded, queries_BD: Tensor, own_BKD: Tensor) -> Tensor:
    """Losses of a query and its own candidates."""
    cosines_BK = losses.cosines(queries_BD, own_BKD)
    if config.loss == "hard_negative_ce":
        return losses.hard_negative_ce(cosines_BK, config.temperature)
    aligned = losses.margin_mse if config.loss == "margin_mse" else losses.judge_kl
    return aligned(cosines_BK, judge_targets(config, rows.scores_BK), config.temperature, config.judge_temperature)


def in_batch_loss(
    config: EmbedderConfig, rows: Embedded, queries_BD: Tensor, own_BKD: Tensor, candidates_MD: Tensor
) -> Tensor:
    """Losses of a query against the candidates of all ranks."""
    known = rows.batch
    assert known is not None
    targets_B, temperature = known.targets_B, config.temperature
    allowed_BM = losses.in_batch_mask(known.keys_M, known.known_BP, targets_B)
    if config.loss == "infonce":
        return losses.infonce(queries_BD, candidates_MD, targets_B, temperature, allowed_BM)
    if config.loss == "hardness_infonce":
        return losses.hardness_infonce(queries_BD, candidates_MD, targets_B, temperature, config.hardness, allowed_BM)
    if config.loss == "unime_v1":
        assert config.false_negative_margin is not None
        margin, top_k = config.false_negative_margin, config.in_batch_top_k
        return losses.unime_v1(
            queries_BD, candidates_MD, targets_B, temperature, top_k=top_k, margin=margin, allowed_BM=allowed_BM
        )
    return losses.hybrid(
        queries_BD,
        own_BKD,
        judge_targets(config, rows.scores_BK),
        candidates_MD,
        targets_B,
        allowed_BM,
        temperature=temperature,
        judge_temperature=config.judge_temperature,
        infonce_weight=config.infonce_weight,
        margin=config.false_negative_margin,
    )


def judge_targets(config: EmbedderConfig, scores_BK: Tensor) -> Tensor:
    """Judge scores, or their logits, as `judge_targets` says."""
    return losses.score_logits(scores_BK) if config.judge_targets == "logit" else scores_BK
