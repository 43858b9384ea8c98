"""Canary scores: made once, compared at every start, and an engine that drifted is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.unit.models_fixtures import save_checkpoint
from unime_ray.config import JudgeConfig
from unime_ray.errors import CanaryError
from unime_ray.models import canary
from unime_ray.models.backbone import Backbone, Batch
from unime_ray.models.canary import CanaryFile, canary_groups, canary_scores, load_checked
from unime_ray.models.judge import Judge, Verdict, load_judge
from unime_ray.models.judge_transformers import TransformersJudge
from unime_ray.models.names import model_revision
from unime_ray.models.pixels import PixelPipeline
from unime_ray.models.tokens import Segment


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_checkpoint(tmp_path_factory.mktemp("model")))


def test_the_first_start_makes_the_reference_and_others_keep_to_it(model: str, tmp_path: Path) -> None:
    config = JudgeConfig(model=model)
    file = CanaryFile(str(tmp_path), model_revision(model))
    assert file.read(config) is None
    first = canary_scores(load_checked(config, file))
    stored = json.loads(Path(file.uri(config)).read_text())
    assert stored["scores"] == first and stored["engine"] == "transformers" and stored["torch"] in torch.__version__
    assert len(first) == 9 and all(score is not None and 0 < score < 1 for score in first)
    before = Path(file.uri(config)).stat().st_mtime_ns
    load_checked(config.model_copy(update={"share_prefix": False}), file)
    assert Path(file.uri(config)).stat().st_mtime_ns == before


def test_what_scores_depend_on_has_a_file_of_its_own(model: str, tmp_path: Path) -> None:
    file = CanaryFile(str(tmp_path), "revision")
    names = {
        CanaryFile(str(tmp_path), "other").uri(JudgeConfig(model=model)),
        *(
            file.uri(JudgeConfig.model_validate({"model": model} | change))
            for change in (
                {},
                {"dtype": "bfloat16"},
                {"pixels": {"max_pixels": 100}},
                {"prompt_order": "candidate_first"},
                {"repetition_penalty": 1.05},
            )
        ),
    }
    assert len(names) == 6
    same = JudgeConfig(model="elsewhere", engine="vllm", batch_tokens=7)
    assert file.uri(same) == file.uri(JudgeConfig(model=model))


def test_an_engine_that_drifted_is_refused(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = JudgeConfig(model=model)
    file = CanaryFile(str(tmp_path), "revision")
    load_checked(config, file)
    load = canary.load_judge

    def drifted(config: JudgeConfig) -> Judge:
        judge = load(config)
        head = judge.backbone.model.lm_head.weight  # type: ignore[attr-defined]
        with torch.no_grad():
            head[judge.prompts.yes_id] *= 1.01  # type: ignore[attr-defined]
        return judge

    monkeypatch.setattr(canary, "load_judge", drifted)
    with pytest.raises(CanaryError, match=r"drifted .*largest difference [0-9.e-]+ \(allowed 0\.0001\), .* with "):
        load_checked(config, file)


def normalised_twice(backbone: Backbone) -> None:
    pixels = backbone.pixels
    assert isinstance(pixels, PixelPipeline)
    once, each = pixels.normalise, pixels.frames * pixels.patch**2
    scale, shift = (one.repeat_interleave(each, 0).reshape(1, -1) for one in (pixels._scale, pixels._shift))
    backbone.pixels.normalise = lambda *given: once(*given) * scale - shift  # type: ignore[method-assign]


def read_without_picture_positions(backbone: Backbone) -> None:
    collate = backbone.collate

    def flat(segments: Sequence[Segment], padding_side: str | None = None) -> Batch:
        plain = [replace(one, positions=np.tile(np.arange(len(one)), (3, 1))) for one in segments]
        return collate(plain, padding_side)

    backbone.collate = flat  # type: ignore[method-assign]


@pytest.mark.parametrize("fault", [normalised_twice, read_without_picture_positions])
def test_what_vllm_could_do_to_pictures_shows_even_in_bfloat16(fault: Callable[[Backbone], None]) -> None:
    backbone = Backbone.load("tiny", device="cpu")
    judge = TransformersJudge(backbone, share_prefix=False)
    exact = canary_scores(judge)
    fault(backbone)
    backbone.forget_features()
    gaps = [abs((a or 0) - (b or 0)) for a, b in zip(canary_scores(judge), exact, strict=True)]
    assert max(gaps) > 5 * canary.TOLERANCE["bfloat16"]


class Fixed:
    """Says the same of every pair."""

    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict

    def score_groups(self, groups: list) -> list[list[Verdict]]:
        return [[self.verdict] * len(candidates) for _, candidates in groups]


def test_another_engine_is_held_to_the_reference_of_transformers(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def load(config: JudgeConfig) -> Judge:
        loaded.append(config.engine)
        return load_judge(config) if config.engine == "transformers" else Fixed(Verdict.of(0.0, 0.0))  # type: ignore[return-value]

    monkeypatch.setattr(canary, "load_judge", load)
    with pytest.raises(CanaryError, match="engine vllm of .* drifted"):
        load_checked(JudgeConfig(model=model, engine="vllm"), CanaryFile(str(tmp_path), "revision"))
    assert loaded == ["transformers", "vllm"]


def test_a_pair_without_a_score_and_a_broken_file_are_refused(model: str, tmp_path: Path) -> None:
    config, file = JudgeConfig(model=model), CanaryFile(str(tmp_path), "revision")
    pairs = sum(len(items) for _, items in canary_groups())
    canary.compare([None] * pairs, [None] * pairs, config, "here")
    for ours, theirs in ((None, 0.5), (0.5, None), (float("nan"), 0.5)):
        with pytest.raises(CanaryError, match="drifted"):
            canary.compare([ours] * pairs, [theirs] * pairs, config, "here")
    with pytest.raises(CanaryError, match="remove the file"):
        canary.compare([0.5] * pairs, [0.5], config, "here")
    Path(file.uri(config)).write_text("[]")
    with pytest.raises(CanaryError, match="holds no canary scores"):
        file.read(config)
