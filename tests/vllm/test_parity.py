"""vLLM and transformers give the same scores and vectors, float32 on a CPU, for more than 200 mixed pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.unit.models_fixtures import make_item, picture, save_checkpoint
from tests.vllm.pairs import SETTINGS, logits, mixed_groups
from unime_ray.config import PixelBudget
from unime_ray.models.backbone import Backbone
from unime_ray.models.embedder import Embedder
from unime_ray.models.embedder_vllm import VllmEmbedder
from unime_ray.models.judge_transformers import TransformersJudge
from unime_ray.models.judge_vllm import Head, VllmJudge
from unime_ray.models.pixels import PixelPipeline
from unime_ray.models.prompt_ids import PromptIds
from unime_ray.models.vllm_engine import Frontend, has_vllm

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not has_vllm(), reason="vLLM is not installed: see docs/vllm.md"),
    pytest.mark.timeout(1800),
]

SCORE_TOLERANCE = 1e-4
LOGIT_TOLERANCE = 1e-3
VECTOR_TOLERANCE = 1e-5


@dataclass
class Scene:
    """One checkpoint in both engines."""

    folder: Path
    backbone: Backbone
    judge: VllmJudge


def start(folder: Path, head: Head | None = None) -> Scene:
    judge = VllmJudge(Frontend.load(str(folder)), SETTINGS.model_copy(update={"head": head}))
    return Scene(folder, Backbone.load(str(folder), device="cpu"), judge)


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    assert len(found) >= 200 and expected[:, 2].std() > 0.003  # the pairs do differ
    score, logit = np.abs(found[:, 2] - expected[:, 2]).max(), np.abs(found[:, :2] - expected[:, :2]).max()
    print(f"{len(found)} pairs, largest difference of a score {score:.1e}, of a logit {logit:.1e}")
    assert score <= SCORE_TOLERANCE and logit <= LOGIT_TOLERANCE


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    yield start(save_checkpoint(tmp_path_factory.mktemp("qwen2_vl")))


def test_scores_are_those_of_transformers(qwen2: Scene) -> None:
    found = logits(qwen2.judge.score_groups(mixed_groups()))
    for share in (True, False):
        judge = TransformersJudge(qwen2.backbone, share_prefix=share)
        assert_same(found, logits(judge.score_groups(mixed_groups())))


def test_candidate_first_too(qwen2: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    turned = PromptIds(qwen2.judge.frontend.tokens, "candidate_first")
    monkeypatch.setattr(qwen2.judge, "prompts", turned)
    reference = TransformersJudge(qwen2.backbone, prompt_order="candidate_first")
    assert_same(logits(qwen2.judge.score_groups(mixed_groups())), logits(reference.score_groups(mixed_groups())))


def test_repetition_penalty_is_the_same_in_both(qwen2: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = mixed_groups()[:2]
    plain = logits(qwen2.judge.score_groups(groups))
    monkeypatch.setattr(qwen2.judge, "repetition_penalty", 1.05)
    found = logits(qwen2.judge.score_groups(groups))
    expected = logits(TransformersJudge(qwen2.backbone, repetition_penalty=1.05).score_groups(groups))
    np.testing.assert_allclose(found, expected, atol=LOGIT_TOLERANCE)
    assert np.abs(found - plain).max() > 10 * LOGIT_TOLERANCE


def test_a_pair_that_cannot_be_scored_keeps_its_reason(qwen2: Scene) -> None:
    good, broken, long = make_item("good"), make_item("broken", b"GIF89a"), make_item("very long " * 400)
    verdicts = qwen2.judge.score_groups([(good, [good, broken, long]), (broken, [good]), (long, [good]), (good, [])])
    assert verdicts[0][0].error is None and 0 < (verdicts[0][0].score or 0) < 1
    assert "picture" in (verdicts[0][1].error or "") and "picture" in (verdicts[1][0].error or "")
    assert "context is 1024" in (verdicts[0][2].error or "") and "context" in (verdicts[2][0].error or "")
    assert verdicts[3] == []


def test_an_image_query_is_computed_once_for_its_candidates(qwen2: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    frontend, stats = qwen2.judge.frontend, qwen2.judge.stats
    large = PixelPipeline(qwen2.backbone.processor, PixelBudget(max_pixels=256 * 256))
    monkeypatch.setattr(frontend, "pixels", large)  # 256 image tokens
    queries = [make_item("look", picture(100 + seed, 256, 256)) for seed in range(3)]
    before = (stats.prompt_tokens, stats.cached_tokens)
    qwen2.judge.score_groups([(query, [make_item(f"candidate {n}") for n in range(50)]) for query in queries])
    cached, tokens = stats.cached_tokens - before[1], stats.prompt_tokens - before[0]
    assert cached / tokens >= 0.8, f"{cached} of {tokens} prompt tokens came from the prefix cache"


def test_embeddings_are_those_of_transformers(qwen2: Scene) -> None:
    embedder = VllmEmbedder(Frontend.load(str(qwen2.folder)), SETTINGS)
    items = [query for query, _ in mixed_groups()]
    expected = Embedder(qwen2.backbone).embed(items)
    np.testing.assert_allclose(embedder.embed(items), expected, atol=VECTOR_TOLERANCE)
    vectors, errors = embedder.embed_checked([items[0], make_item("broken", b"GIF89a"), make_item("long " * 2000)])
    assert errors[0] is None and "picture" in (errors[1] or "") and "context is 1024" in (errors[2] or "")
    assert not vectors[1:].any()


@pytest.mark.slow
def test_the_language_head_gives_the_same_logits(qwen2: Scene) -> None:
    scene = start(qwen2.folder, "logits")
    expected = TransformersJudge(scene.backbone).score_groups(mixed_groups())
    assert_same(logits(scene.judge.score_groups(mixed_groups())), logits(expected))


@pytest.mark.slow
def test_a_larger_cache_of_picture_features_changes_no_score(qwen2: Scene) -> None:
    larger = SETTINGS.model_copy(update={"encoder_cache_tokens": 20_000})
    judge = VllmJudge(Frontend.load(str(qwen2.folder)), larger)
    scheduler = judge.engine._engine.engine_core.engine_core.scheduler
    assert scheduler.encoder_cache_manager.cache_size == 20_000
    expected = TransformersJudge(qwen2.backbone).score_groups(mixed_groups())
    assert_same(logits(judge.score_groups(mixed_groups())), logits(expected))


@pytest.mark.slow
def test_the_packaged_checkpoint(qwen2: Scene) -> None:
    backbone = Backbone.load("tiny", device="cpu")
    judge = VllmJudge(Frontend.load("tiny"), SETTINGS)
    assert_same(
        logits(judge.score_groups(mixed_groups())), logits(TransformersJudge(backbone).score_groups(mixed_groups()))
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_the_other_families(family: str, tmp_path: Path) -> None:
    scene = start(save_checkpoint(tmp_path, family))
    expected = TransformersJudge(scene.backbone).score_groups(mixed_groups())
    assert_same(logits(scene.judge.score_groups(mixed_groups())), logits(expected))
    items = [query for query, _ in mixed_groups()]
    embedder = VllmEmbedder(Frontend.load(str(scene.folder)), SETTINGS)
    np.testing.assert_allclose(embedder.embed(items), Embedder(scene.backbone).embed(items), atol=VECTOR_TOLERANCE)
