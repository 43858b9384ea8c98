"""The benchmark compares ways that give the same scores."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.unit.models_fixtures import make_item, picture, save_checkpoint
from unime_ray.config import PixelBudget
from unime_ray.models.backbone import Backbone
from unime_ray.models.judge_transformers import TransformersJudge


def test_the_naive_way_scores_alike_and_a_table_comes_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[2] / "benchmarks"), *sys.path])
    import judge as benchmark

    folder = str(save_checkpoint(tmp_path))
    backbone = Backbone.load(folder, device="cpu")
    naive = benchmark.Naive(folder, "float32", torch.device("cpu"), PixelBudget())
    groups = [(make_item("look", picture(1)), [make_item("a fox"), make_item(None, picture(2, 90, 40))])]
    for (query, candidates), verdicts in zip(groups, TransformersJudge(backbone).score_groups(groups), strict=True):
        for candidate, verdict in zip(candidates, verdicts, strict=True):
            assert naive.score(query, candidate) == pytest.approx(verdict.score, abs=1e-4)
    ways = benchmark.transformers_ways(backbone, naive, None)
    found = benchmark.rates(ways, groups, 1, backbone.device)
    works = {order: benchmark.work_of(backbone, groups, order) for order in ("query_first", "candidate_first")}
    sizes = benchmark.sizes_of(backbone, 64)
    assert 0 < works["query_first"].shared(sizes) < works["query_first"].whole(sizes)
    benchmark.report("picture -> mixed", found, ways, works, sizes, 1e9)
    table = capsys.readouterr().out
    assert [line.split()[0] for line in table.splitlines()[3:]] == ["naive", "batched", "shared", "turned"]


def test_mmeb_by_hand(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A text pair of one layer-less model of one parameter: two operations a token."""
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[2] / "benchmarks"), *sys.path])
    import judge_cost

    work, sizes = judge_cost.Work(100, 20, 1 / 50, 1.0, 0.1), judge_cost.Sizes(1.0, 0, 8, 30.0)
    assert work.whole(sizes) == 240 + 3 and work.whole(sizes, cached=False) == 240 + 30
    assert work.shared(sizes) == pytest.approx(200 / 50 + 40 + 3)
    judge_cost.extrapolate(4e14)
    assert len(capsys.readouterr().out.splitlines()) == 3 + 12
