"""The serving graph's encoder gives the same vectors with vLLM in it as with transformers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.unit.models_fixtures import make_item, picture
from unime_ray.config import PixelBudget
from unime_ray.config_vllm import VllmConfig
from unime_ray.models.names import resolve_model
from unime_ray.models.vllm_engine import has_vllm
from unime_ray.serve.bundle import Checkpoint
from unime_ray.serve.engines import EncoderEngine

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not has_vllm(), reason="vLLM is not installed: see docs/vllm.md"),
    pytest.mark.timeout(900),
]


@pytest.mark.slow
@pytest.mark.parametrize("dim", [192, 64])
def test_an_encoder_on_vllm_answers_as_one_on_transformers(dim: int) -> None:
    plain = Checkpoint("base", resolve_model("tiny"), "r", dim, None, "float32", PixelBudget(), 4096)
    groups = [[make_item("red heart"), make_item(None, picture(1, 90, 40))], [make_item("red heart")], []]
    wanted = EncoderEngine(plain).embed_groups(groups)
    found = EncoderEngine(replace(plain, vllm=VllmConfig())).embed_groups(groups)
    for ours, theirs in zip(wanted, found, strict=True):
        np.testing.assert_allclose(theirs.vectors, ours.vectors, atol=1e-5)
        assert (theirs.tokens, theirs.errors, theirs.revision) == (ours.tokens, ours.errors, ours.revision)
