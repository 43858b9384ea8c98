"""sentence-transformers and vLLM load an export and give our vectors and scores. See docs/export.md."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.export_run import trained_run
from tests.unit.models_fixtures import make_item, picture
from unime_ray.export import export_run
from unime_ray.models.backbone import Backbone
from unime_ray.models.embedder import Embedder
from unime_ray.models.reranker import Reranker

HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None
needs_sentence_transformers = pytest.mark.skipif(
    not HAS_TORCHVISION or importlib.util.find_spec("sentence_transformers") is None,
    reason="needs sentence-transformers and torchvision: see docs/export.md",
)
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: see docs/vllm.md")
INSTRUCTION = "Represent the given image."
EXACT, RESIZED = 1e-5, 2e-3
"""Pictures of the model's own size; and others, which torchvision and Pillow resize a little differently."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("export")
    export_run(trained_run(root / "run"), str(root / "out"))
    return root / "out"


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


@needs_sentence_transformers
def test_sentence_transformers_gives_our_vectors(exported: Path) -> None:
    from sentence_transformers import SentenceTransformer

    folder = str(exported / "adapted")
    ours = Embedder(Backbone.load(folder, device="cpu"))
    theirs = SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": torch.float32})
    texts = ["red heart", "woman running: dark skin tone"]
    np.testing.assert_allclose(theirs.encode(texts), ours.embed([make_item(text) for text in texts]), atol=EXACT)
    for size, tolerance in ((64, EXACT), (100, RESIZED)):
        data = [picture(seed, size, size) for seed in range(3)]
        given = [{"image": opened(one), "text": INSTRUCTION} for one in data]
        wanted = ours.embed([make_item(None, one, INSTRUCTION) for one in data])
        np.testing.assert_allclose(theirs.encode(given), wanted, atol=tolerance)


@needs_sentence_transformers
def test_cross_encoder_gives_our_scores(exported: Path) -> None:
    from sentence_transformers import CrossEncoder

    folder = str(exported / "reordered")
    ours = Reranker(Backbone.load(folder, device="cpu"))
    theirs = CrossEncoder(folder, device="cpu", model_kwargs={"dtype": torch.float32})
    data = [picture(seed, 64, 64) for seed in range(3)]
    given = [("red heart", {"image": opened(one), "text": INSTRUCTION}) for one in data]
    wanted = ours.pointwise_scores(make_item("red heart"), [make_item(None, one, INSTRUCTION) for one in data])
    np.testing.assert_allclose(theirs.predict(given), wanted, atol=EXACT)
    texts = ours.pointwise_scores(make_item("dog"), [make_item("cat face"), make_item("dog face")])
    np.testing.assert_allclose(theirs.predict([("dog", "cat face"), ("dog", "dog face")]), texts, atol=EXACT)


@pytest.mark.vllm
@needs_vllm
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_vllm_pools_our_vectors(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}.items():
        monkeypatch.setenv(name, value)
    from vllm import LLM

    folder = str(exported / "adapted")
    settings: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512}
    engine = LLM(model=folder, runner="pooling", limit_mm_per_prompt={"image": 1, "video": 0}, **settings)
    data = [picture(seed, 64, 64) for seed in range(3)]
    picture_prompt = "<|vision_start|><|image_pad|><|vision_end|>\n" + INSTRUCTION
    prompts: list[Any] = ["red heart", "woman running: dark skin tone"]
    prompts += [{"prompt": picture_prompt, "multi_modal_data": {"image": opened(one)}} for one in data]
    theirs = np.array([output.outputs.embedding for output in engine.embed(prompts)])
    items = [make_item(text) for text in prompts[:2]] + [make_item(None, one, INSTRUCTION) for one in data]
    ours = Embedder(Backbone.load(folder, device="cpu")).embed(items)
    np.testing.assert_allclose(theirs, ours, atol=1e-4)
