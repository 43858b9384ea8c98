"""The embedder against a plain transformers loop, whatever the batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForImageTextToText

from tests.unit.models_fixtures import FAMILIES, make_item, mixed_items, save_checkpoint
from unime_ray.errors import ModelError
from unime_ray.models.backbone import Backbone
from unime_ray.models.embedder import Embedder, embed_batch, token_budget_batches


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@torch.no_grad()
def plain_loop(checkpoint: Path, backbone: Backbone, items: list) -> np.ndarray:
    """One item at a time through transformers' own forward; only ids and pixels come from the backbone."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    rows = []
    for item in items:
        inputs = backbone.prepare([item]).model_inputs(backbone)
        hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
        rows.append(functional.normalize(hidden[0, -1], dim=0))
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("batch_tokens", [1, 100, 8192])
def test_equals_a_plain_loop(checkpoint: Path, batch_tokens: int) -> None:
    backbone, items = Backbone.load(str(checkpoint), device="cpu"), mixed_items()
    vectors = Embedder(backbone, batch_tokens).embed(items)
    np.testing.assert_allclose(vectors, plain_loop(checkpoint, backbone, items), atol=1e-5)
    assert vectors.dtype == np.float32 and vectors.shape == (len(items), backbone.hidden_size)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_batches_keep_the_budget_and_lose_nothing() -> None:
    lengths = dict(enumerate([5, 50, 7, 7, 200, 3, 30]))
    batches = token_budget_batches(lengths, 60)
    assert sorted(index for batch in batches for index in batch) == list(lengths)
    assert all(len(b) * max(lengths[i] for i in b) <= 60 or len(b) == 1 for b in batches)
    assert batches[0] == [5, 0, 2, 3]


def test_errors_stay_with_their_item(tmp_path: Path) -> None:
    embedder = Embedder(Backbone.load(str(save_checkpoint(tmp_path)), device="cpu"))
    items = [make_item("fine"), make_item("broken", b"\x89PNG")]
    vectors, errors = embedder.embed_checked(items)
    assert errors[0] is None and errors[1] is not None
    assert np.linalg.norm(vectors[0]) == pytest.approx(1, abs=1e-6) and not vectors[1].any()
    with pytest.raises(ModelError, match=items[1].item_id.hex()):
        embedder.embed(items)


def test_gradients_reach_both_towers(tmp_path: Path) -> None:
    backbone = Backbone.load(str(save_checkpoint(tmp_path)), device="cpu")
    embed_batch(backbone, backbone.prepare(mixed_items())).sum().backward()
    core = backbone.model.model
    for weight in (core.visual.blocks[0].attn.qkv.weight, core.language_model.layers[0].self_attn.q_proj.weight):
        assert weight.grad is not None and weight.grad.abs().sum() > 0
