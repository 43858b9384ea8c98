"""What the vLLM engines do around vLLM, with a plain forward in its place: prompts, order, errors, penalty, vectors."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.models_fixtures import FakeItem, make_item, picture, save_checkpoint
from unime_ray.errors import ModelError
from unime_ray.models import embedder_vllm, judge_vllm
from unime_ray.models.backbone import Backbone
from unime_ray.models.embedder import Embedder
from unime_ray.models.embedder_vllm import VllmEmbedder
from unime_ray.models.judge import Verdict
from unime_ray.models.judge_transformers import TransformersJudge
from unime_ray.models.judge_vllm import VllmJudge
from unime_ray.models.tokens import Segment
from unime_ray.models.vllm_engine import EngineStats, Frontend


class PlainEngine:
    """Answers each segment alone, by transformers: what `VllmEngine` is to its callers."""

    def __init__(self, frontend: Frontend, settings: Any, **arguments: Any) -> None:
        self.backbone = Backbone.load(frontend.path, device="cpu")
        self.max_tokens, self.hidden_size = frontend.max_tokens, self.backbone.hidden_size
        self.stats, self.arguments = EngineStats(), arguments
        self.asked: list[Segment] = []

    @torch.no_grad()
    def run(self, segments: Iterable[Segment], params: Any) -> list[Any]:
        outputs = []
        for segment in segments:
            self.asked.append(segment)
            data = self.backbone.forward_hidden(self.backbone.collate([segment]))[0]
            if self.arguments["convert"] == "classify":
                data = self.backbone.answer_logits(data, [self.backbone.yes_id, self.backbone.no_id])
            outputs.append(SimpleNamespace(outputs=SimpleNamespace(data=data)))
        return outputs


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for module, owner in ((judge_vllm, VllmJudge), (embedder_vllm, VllmEmbedder)):
        monkeypatch.setattr(module, "VllmEngine", PlainEngine)
        monkeypatch.setattr(owner, "_params", lambda self: None)  # vLLM's own class
    return str(save_checkpoint(tmp_path))


def groups() -> list[tuple[FakeItem, list[FakeItem]]]:
    items = [
        make_item("a fox"),
        make_item("", picture(1, 64, 40)),
        make_item("both", picture(2)),
        make_item("word " * 30),
    ]
    return [(query, items[: 4 - place]) for place, query in enumerate(items)]


def numbers(verdicts: list[list[Verdict]]) -> np.ndarray:
    return np.array([[v.logit_yes, v.logit_no, v.score] for group in verdicts for v in group], dtype=np.float64)


@pytest.mark.parametrize("order", ["query_first", "candidate_first"])
def test_verdicts_are_in_their_places_and_prompts_grouped(folder: str, order: str) -> None:
    judge = VllmJudge(Frontend.load(folder), prompt_order=order, repetition_penalty=1.05)
    engine: Any = judge.engine
    reference = TransformersJudge(engine.backbone, prompt_order=order, repetition_penalty=1.05)
    found = judge.score_groups([*groups(), groups()[0]])
    np.testing.assert_allclose(numbers(found), numbers(reference.score_groups([*groups(), groups()[0]])), atol=1e-4)
    starts = [segment.ids[: len(judge.prompts.static) + 4].tobytes() for segment in engine.asked]
    changes = sum(before != after for before, after in zip(starts, starts[1:], strict=False))
    assert changes == len(set(starts)) - 1  # each opening is met in one go


def test_errors_stay_with_their_pair(folder: str) -> None:
    judge = VllmJudge(Frontend.load(folder))
    good, broken, long = make_item("good"), make_item("broken", b"GIF89a"), make_item("very long " * 400)
    verdicts = judge.score_groups([(good, [broken, long, good]), (broken, [good]), (good, [])])
    expected = TransformersJudge(judge.engine.backbone).score(good, [broken, long, good])  # type: ignore[attr-defined]
    assert [verdict.error for verdict in verdicts[0]] == [verdict.error for verdict in expected]
    assert verdicts[0][2].error is None and "picture" in (verdicts[1][0].error or "") and verdicts[2] == []


def test_logits_that_are_not_finite_are_an_error(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = VllmJudge(Frontend.load(folder))
    monkeypatch.setattr(judge, "_answers", lambda segments: [(float("nan"), 0.0) for _ in segments])
    item = make_item("a")
    assert judge.score(item, [item])[0].error == "the engine gave no finite logits"


def test_vectors_are_of_unit_norm_and_errors_named(folder: str) -> None:
    embedder = VllmEmbedder(Frontend.load(folder))
    items = [query for query, _ in groups()]
    expected = Embedder(embedder.engine.backbone).embed(items)  # type: ignore[attr-defined]
    np.testing.assert_allclose(embedder.embed(items), expected, atol=1e-5)
    broken = [make_item("a"), make_item("b", b"GIF89a"), make_item("long " * 2000)]
    vectors, errors = embedder.embed_checked(broken)
    assert errors[0] is None and "picture" in (errors[1] or "") and "context is 1024" in (errors[2] or "")
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 0, 0], abs=1e-5)
    with pytest.raises(ModelError, match=broken[1].item_id.hex()):
        embedder.embed(broken)
