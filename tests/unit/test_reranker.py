"""The reranker: one pass ranks the list as plain transformers would, and bad candidates go behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests.unit.models_fixtures import FAMILIES, build_tokenizer, make_item, mixed_items, save_checkpoint
from unime_ray.models.backbone import Backbone
from unime_ray.models.reranker import Reranker, best_first


@pytest.fixture(scope="module", params=FAMILIES)
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return Backbone.load(str(save_checkpoint(tmp_path_factory.mktemp(request.param), request.param)), device="cpu")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Reranker:
    return Reranker(Backbone.load(str(save_checkpoint(tmp_path_factory.mktemp("small"))), device="cpu"))


def lists() -> list[tuple]:
    items = mixed_items()
    return [
        (items[0], items[1:]),
        (items[2], items[:2]),
        (items[1], [*items, items[0], items[2]]),
        (items[3], items[:1]),
    ]


@torch.no_grad()
def test_logits_equal_plain_transformers(backbone: Backbone) -> None:
    model = AutoModelForImageTextToText.from_pretrained(backbone.path).eval()
    reranker = Reranker(backbone)
    found = reranker.listwise_groups(lists())
    for logits, (segment, shown), (_, candidates) in zip(found, reranker.build_listwise(lists()), lists(), strict=True):
        full = model(**backbone.collate([segment]).model_inputs(backbone)).logits[0, -1]
        expected = full[reranker.prompts.index_ids[: len(candidates)]].numpy()
        np.testing.assert_allclose(logits, expected, atol=1e-5)
        assert shown == list(range(len(candidates)))


def test_batching_changes_nothing(backbone: Backbone) -> None:
    together = Reranker(backbone).listwise_groups(lists())
    alone = [Reranker(backbone, batch_tokens=1).listwise_logits(query, candidates) for query, candidates in lists()]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_prompt_is_the_published_one(small: Reranker) -> None:
    segment = small.prompts.build_listwise_ids("QUERY", ["A", "B"], [])
    text = small.backbone.tokens.tokenizer.decode(segment.ids)
    assert text.startswith("<|im_start|>user\nI will provide you with a query followed by multiple candidates")
    assert text.endswith("Query:QUERY, Candidates:(1) A (2) B <|im_end|>\n<|im_start|>assistant\n")


def test_the_tenth_is_labelled_by_a_single_token(small: Reranker, tmp_path: Path) -> None:
    assert small.prompts.labels[-1] == "0" and len(set(small.prompts.index_ids)) == 10
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["10"])
    whole = Reranker(Backbone.load(str(save_checkpoint(tmp_path, tokenizer=tokenizer)), device="cpu"))
    assert whole.prompts.labels[-1] == "10" and len(set(whole.prompts.index_ids)) == 10


def test_order_is_by_logit_and_the_tail_stays(small: Reranker) -> None:
    query, candidates = make_item("query"), [make_item(f"candidate {number}") for number in range(13)]
    order = small.rerank(query, candidates)
    logits = small.listwise_logits(query, candidates[:10])
    assert order[:10] == sorted(range(10), key=lambda place: -logits[place]) and order[10:] == [10, 11, 12]
    with pytest.raises(ValueError, match="at most 10"):
        small.listwise_logits(query, candidates)


def test_pointwise_is_the_judge(small: Reranker) -> None:
    items = mixed_items()
    scores = small.pointwise_scores(items[0], items)
    assert scores.tolist() == pytest.approx([v.score for v in small.judge.score(items[0], items)])
    assert small.rerank(items[0], items, "pointwise") == best_first(scores)
    with pytest.raises(ValueError, match="use one of listwise, pointwise"):
        small.rerank(items[0], items, "both")


@pytest.mark.parametrize("mode", ["listwise", "pointwise"])
def test_what_cannot_be_shown_goes_behind(small: Reranker, mode: str) -> None:
    good, broken = make_item("good"), make_item("broken", b"nothing")
    order = small.rerank(make_item("query"), [broken, good, make_item("other")], mode)
    assert sorted(order[:2]) == [1, 2] and order[2] == 0
    assert small.rerank(broken, [good, broken, good], mode) == [0, 1, 2]
    assert small.rerank(make_item("long " * 2000), [good, good], mode) == [0, 1]
    assert small.rerank(good, [], mode) == []


def test_equal_values_keep_the_retrieval_order() -> None:
    assert best_first(np.array([1.0, 2.0, 1.0, 2.0, -np.inf])) == [1, 3, 0, 2, 4]
