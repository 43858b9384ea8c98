"""The benchmark compares ways that give the same scores."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.unit.models_fixtures import build_tokenizer, make_item, picture, save_checkpoint
from unime_ray.config import PixelBudget
from unime_ray.models.backbone import Backbone
from unime_ray.models.judge_transformers import TransformersJudge


def test_the_naive_way_scores_alike_and_a_table_comes_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[2] / "benchmarks"), *sys.path])
    import judge as benchmark
    import judge_cost as cost
    import judge_ways as timed

    folder = str(save_checkpoint(tmp_path))
    backbone = Backbone.load(folder, device="cpu")
    naive = timed.Naive(folder, "float32", torch.device("cpu"), PixelBudget())
    groups = [(make_item("look", picture(1)), [make_item("a fox"), make_item(None, picture(2, 90, 40))])]
    for (query, candidates), verdicts in zip(groups, TransformersJudge(backbone).score_groups(groups), strict=True):
        for candidate, verdict in zip(candidates, verdicts, strict=True):
            assert naive.score(query, candidate) == pytest.approx(verdict.score, abs=1e-4)
    ways = timed.transformers_ways(backbone, naive, None)
    known = [groups[0][0]]
    found = timed.rates(ways, groups, 1, backbone.device, known)
    assert backbone._features.get(known[0].image_id) is not None
    works = benchmark.works_of(backbone, benchmark.Scene(groups, known))
    sizes = cost.sizes_of(backbone, 64)
    work = works["query_first"]
    assert work.pictures == 1.5 and work.distinct == 0.5
    assert 0 < work.shared(sizes) < work.whole(sizes) < work.naive(sizes)
    benchmark.report("picture -> mixed", found, ways, works, sizes, 1e9)
    table = capsys.readouterr().out
    assert [line.split()[0] for line in table.splitlines()[3:]] == ["naive", "batched", "shared", "turned"]


def test_mmeb_by_hand(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A text pair of one layer-less model of one parameter: two operations a token."""
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[2] / "benchmarks"), *sys.path])
    import judge_cost

    work, sizes = judge_cost.Work(100, 20, 1 / 50, 1.0, 0.1), judge_cost.Sizes(1.0, 0, 8, 30.0, 0.0)
    assert work.whole(sizes) == 240 + 3 and work.naive(sizes) == 240 + 30
    assert work.shared(sizes) == pytest.approx(200 / 50 + 40 + 3)
    assert work.prefix_cached(sizes, 0.75) == 60 + 3
    two_layers = judge_cost.Sizes(10.0, 2, 0, 30.0, 2.0)  # of the second layer's five parameters two are left
    assert two_layers.spared(100, 7) == 100 * 2 * (5 + 2)
    judge_cost.extrapolate(4e14)
    assert len(capsys.readouterr().out.splitlines()) == 3 + 12


@pytest.mark.parametrize(("shape", "billions"), [("2B", 2.2), ("7B", 7.8)])
def test_random_models_of_published_sizes(shape: str, billions: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[2] / "benchmarks"), *sys.path])
    import random_model

    with torch.device("meta"):
        config = random_model.config_of(random_model.PUBLISHED[shape], build_tokenizer())
        model = random_model.Qwen2VLForConditionalGeneration(config)
    assert sum(weight.numel() for weight in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.1)
