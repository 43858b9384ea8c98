"""How far bfloat16 and float16 take scores and vectors, in both engines; docs/vllm.md has the figures.

.venv-vllm/bin/python -m pytest -s -m vllm tests/vllm/test_precision.py
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from tests.unit.models_fixtures import FakeItem, save_checkpoint
from tests.vllm.pairs import SETTINGS, logits, mixed_groups
from unime_ray.models.backbone import Backbone
from unime_ray.models.canary import TOLERANCE, canary_groups
from unime_ray.models.embedder import Embedder
from unime_ray.models.embedder_vllm import VllmEmbedder
from unime_ray.models.judge import Judge
from unime_ray.models.judge_transformers import TransformersJudge
from unime_ray.models.judge_vllm import VllmJudge
from unime_ray.models.vllm_engine import Frontend, has_vllm

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
]
Scores = dict[str, np.ndarray]


@dataclass
class Checkpoint:
    """`folder` in float32, once for all dtypes."""

    folder: str
    scores: np.ndarray
    canary: np.ndarray
    vectors: np.ndarray


def items() -> list[FakeItem]:
    return [query for query, _ in mixed_groups()]


@pytest.fixture(scope="module", params=["tiny", "tiny-judge", 2, 8, 28])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    """The packaged checkpoints; random weights of so many layers (28: those of 2B and 7B parameters)."""
    folder = str(request.param)
    if isinstance(request.param, int):
        made = tmp_path_factory.mktemp(f"random-{folder}")
        folder = str(save_checkpoint(made, num_hidden_layers=request.param))
    backbone = Backbone.load(folder, device="cpu")
    judge = TransformersJudge(backbone)
    scores, canary = (logits(judge.score_groups(groups))[:, 2] for groups in (mixed_groups(), canary_groups()))
    yield Checkpoint(folder, scores, canary, Embedder(backbone).embed(items()))


def compare(label: str, found: Scores) -> dict[str, float]:
    """Print the largest and mean differences of all pairs of ways; the largest by (one - other)."""
    largest = {}
    for (one, a), (other, b) in combinations(found.items(), 2):
        gap = np.abs(a - b)
        largest[f"{one} - {other}"] = float(gap.max())
        print(f"{label}: {one} - {other}: largest {gap.max():.2g}, mean {gap.mean():.2g} of {len(gap)}")
    return largest


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_stays_within_the_canary_tolerance(checkpoint: Checkpoint, dtype: str) -> None:
    backbone = Backbone.load(checkpoint.folder, device="cpu", dtype=dtype)
    judges: dict[str, Judge] = {
        "shared": TransformersJudge(backbone),
        "alone": TransformersJudge(backbone, share_prefix=False),
    }
    if has_vllm():
        judges["vLLM"] = VllmJudge(Frontend.load(checkpoint.folder), SETTINGS, dtype=dtype)
    label = f"{Path(checkpoint.folder).name} {dtype}"
    print(f"\n{label}: float32 scores have a standard deviation of {checkpoint.scores.std():.3f}")
    for name, groups, exact in (
        ("mixed", mixed_groups(), checkpoint.scores),
        ("canary", canary_groups(), checkpoint.canary),
    ):
        found = {way: logits(judge.score_groups(groups))[:, 2] for way, judge in judges.items()}
        gaps = compare(f"{label} {name}", found | {"float32": exact})
        if name == "canary":
            assert max(gaps.values()) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_vectors(checkpoint: Checkpoint, dtype: str) -> None:
    ways = {
        "transformers": Embedder(Backbone.load(checkpoint.folder, device="cpu", dtype=dtype)).embed(items()),
        "float32": checkpoint.vectors,
    }
    if has_vllm():
        ways["vLLM"] = VllmEmbedder(Frontend.load(checkpoint.folder), SETTINGS, dtype=dtype).embed(items())
    label = f"{Path(checkpoint.folder).name} {dtype}"
    for (one, a), (other, b) in combinations(ways.items(), 2):
        cosine, moved = (a * b).sum(axis=1), np.abs(a @ a.T - b @ b.T)
        print(
            f"{label} vectors: {one} - {other}: a number {np.abs(a - b).max():.2g}, 1 - cosine {1 - cosine.min():.2g}, "
            f"a similarity of two items {moved.max():.2g}, mean {moved.mean():.2g}"
        )
        assert cosine.min() >= 0.99
