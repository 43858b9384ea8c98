"""Every family beyond Qwen's plain three through embed, judge and a training step, against plain transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from tests.unit.family_fixtures import DUAL, GENERATIVE, TILE, save_family
from tests.unit.models_fixtures import build_tokenizer, make_item, mixed_items, picture, save_checkpoint
from unime_ray import losses
from unime_ray.config import LoraConfig, PixelBudget, RunConfig
from unime_ray.corpus.images import decode
from unime_ray.errors import ModelError
from unime_ray.models.backbone import Backbone
from unime_ray.models.embedder import Embedder, embed_batch
from unime_ray.models.judge_transformers import TransformersJudge
from unime_ray.models.loading import check_model
from unime_ray.models.lora import apply_lora, merge_and_save
from unime_ray.models.reranker import Reranker
from unime_ray.preflight import check_models

JUDGES = ("llava_onevision", "internvl")
SIZES = [(16, 16), (64, 16), (20, 90), (300, 211), (17, 23), (48, 48)]


@pytest.fixture(scope="module", params=GENERATIVE + DUAL)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(tmp_path_factory.mktemp(request.param), request.param)


def plain_vectors(backbone: Backbone, items: list) -> np.ndarray:
    """One item at a time through transformers' own forward."""
    rows = []
    if backbone.family.can_judge or backbone.family.name == "qwen3_vl_embedding":
        model = AutoModelForImageTextToText.from_pretrained(backbone.path, attn_implementation="eager").eval()
        for item in items:
            inputs = backbone.prepare([item]).model_inputs(backbone)
            rows.append(functional.normalize(model.model(**inputs).last_hidden_state[0, -1], dim=0))
        return torch.stack(rows).numpy()
    model = AutoModel.from_pretrained(backbone.path).eval()
    tokenizer = AutoTokenizer.from_pretrained(backbone.path)
    processor = AutoImageProcessor.from_pretrained(backbone.path, backend="pil")
    full = "max_length" if backbone.family.name.startswith("siglip") else False
    for item in items:
        total = torch.zeros(backbone.hidden_size)
        if item.text:
            ids = tokenizer(item.rendered.split("|>\n")[-1], padding=full, max_length=24, truncation=True)["input_ids"]
            total += functional.normalize(model.get_text_features(torch.tensor([ids])).pooler_output[0], dim=0)
        if item.image is not None:
            made = processor(decode(item.image), return_tensors="pt")
            total += functional.normalize(model.get_image_features(**made).pooler_output[0], dim=0)
        rows.append(functional.normalize(total, dim=0))
    return torch.stack(rows).numpy()


@torch.no_grad()
def test_vectors_equal_plain_transformers_whatever_the_batch(checkpoint: Path) -> None:
    backbone, items = Backbone.load(str(checkpoint), device="cpu"), mixed_items()
    expected = plain_vectors(backbone, items)
    assert expected.std(axis=0).mean() > 0.01  # the items do differ
    for batch_tokens in (1, 100, 8192):
        vectors = Embedder(backbone, batch_tokens).embed(items)
        np.testing.assert_allclose(vectors, expected, atol=1e-5)
        backbone.forget_features()


def test_a_step_with_adapters_lowers_the_loss_where_they_are_alone(checkpoint: Path, tmp_path: Path) -> None:
    backbone, items = Backbone.load(str(checkpoint), device="cpu"), mixed_items()
    model = apply_lora(backbone.model, LoraConfig(rank=4, dora=True, train_vision=True))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=3e-3)
    found = []
    for _ in range(6):
        vectors = embed_batch(backbone, backbone.prepare(items))
        loss = losses.judge_kl(vectors[:2] @ vectors[2:].T, torch.eye(2, 6), 0.1, 0.1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert found[-1] < found[0]
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert all("lora_" in name for name in moved)
    adapted = Embedder(backbone).embed(items)
    merge_and_save(model, backbone, tmp_path / "model")
    again = Backbone.load(str(tmp_path / "model"), device="cpu")
    assert again.family.name == backbone.family.name
    np.testing.assert_allclose(Embedder(again).embed(items), adapted, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 2])
def test_without_train_vision_the_tower_and_its_projector_stay(tmp_path: Path, rank: int) -> None:
    backbone = Backbone.load(str(save_family(tmp_path, "llava_onevision")), device="cpu")
    model = apply_lora(backbone.model, LoraConfig(rank=rank))
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained and not backbone.trains_vision
    assert not any("vision_tower" in name or "projector" in name or "newline" in name for name in trained)
    chosen = LoraConfig(rank=2, train_vision=True, vision_modules=("q_proj", "out_proj"))
    fresh = Backbone.load(str(tmp_path), device="cpu")
    names = [n for n, w in apply_lora(fresh.model, chosen).named_parameters() if w.requires_grad and "vision" in n]
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in names} == {"q_proj", "out_proj"}


@torch.no_grad()
@pytest.mark.parametrize("family", JUDGES)
def test_a_judge_says_the_same_of_a_pair_alone(tmp_path: Path, family: str) -> None:
    backbone = Backbone.load(str(save_family(tmp_path, family)), device="cpu")
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation="eager").eval()
    items = mixed_items()
    groups = [(query, items[: 4 + place]) for place, query in enumerate(items[:4])]
    judge = TransformersJudge(backbone)
    assert judge.shares_prefix
    expected = []
    for query, candidates in groups:
        for candidate in candidates:
            sides = [[p for p in backbone.pictures([item]) if p is not None] for item in (query, candidate)]
            segment = judge.prompts.build_judge_ids(query.rendered, candidate.rendered, (sides[0], sides[1]))
            logits = plain(**backbone.collate([segment]).model_inputs(backbone)).logits[0, -1]
            expected.append(logits[[judge.prompts.yes_id, judge.prompts.no_id]].softmax(0)[0].item())
    assert np.std(expected) > 0.01
    for share in (True, False):
        scored = TransformersJudge(backbone, share_prefix=share, batch_tokens=300).score_groups(groups)
        np.testing.assert_allclose([v.score for group in scored for v in group], expected, atol=1e-5)
    assert sorted(Reranker(backbone).rerank(items[0], items[1:5])) == [0, 1, 2, 3]


def test_an_untried_language_model_is_judged_with_pair_by_pair(tmp_path: Path) -> None:
    backbone = Backbone.load(str(save_family(tmp_path, "internvl", model_type="llama")), device="cpu")
    judge, items = TransformersJudge(backbone), mixed_items()
    assert not judge.shares_prefix
    together = [verdict.score for verdict in judge.score(items[0], items)]
    np.testing.assert_allclose(together, [judge.score(items[0], [item])[0].score for item in items], atol=1e-5)


def test_llava_counts_tokens_as_its_processor_does(tmp_path: Path) -> None:
    backbone = Backbone.load(str(save_family(tmp_path, "llava_onevision")), device="cpu")
    # Its constructor asks for a video processor, which needs torchvision.
    processor = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
    processor.image_processor, processor.num_image_tokens = backbone.processor, (TILE // 8) ** 2
    processor.vision_aspect_ratio = backbone.family.config.vision_aspect_ratio
    shrunk = 0
    for width, height in SIZES:
        made = backbone.pixels.picture(picture(1, width, height))
        expected = processor._get_number_of_features(height, width, TILE, TILE)
        assert len(backbone.tokens.picture(made)) == expected, (width, height)
        assert backbone.features([made]).shape[1] == expected
        raw = backbone.processor(decode(picture(1, width, height)), return_tensors="pt")
        np.testing.assert_array_equal(made.patches, raw["pixel_values"][0])
        shrunk += len(made.patches) > 5  # more than four tiles and the thumbnail: features are made fewer
    assert shrunk


def test_a_pixel_budget_means_fewer_tiles(tmp_path: Path) -> None:
    large = picture(1, 48, 48)
    for family, all_tiles in (("llava_onevision", 10), ("internvl", 5)):
        folder = str(save_family(tmp_path / family, family))
        assert len(Backbone.load(folder, device="cpu").pixels.picture(large).patches) == all_tiles
        small = Backbone.load(folder, device="cpu", pixels=PixelBudget(max_pixels=TILE * TILE))
        assert len(small.pixels.picture(large).patches) == (2 if family == "llava_onevision" else 1)
        with pytest.raises(ModelError, match=r"pixels\.min_pixels: .* leave it out"):
            Backbone.load(folder, device="cpu", pixels=PixelBudget(min_pixels=100))
    clip = {"model": str(save_family(tmp_path / "clip", "clip")), "pixels": {"max_pixels": 100}}
    with pytest.raises(ModelError, match="pixels: clip takes pictures of one size"):
        check_models(RunConfig.model_validate({"embed": clip}))


def test_qwen3_vl_embedding_reads_its_published_prompt(tmp_path: Path) -> None:
    backbone = Backbone.load(str(save_family(tmp_path, "qwen3_vl_embedding")), device="cpu")
    token_pixels = 16 * 16
    assert backbone.pixels.budget == (4 * token_pixels, 1800 * token_pixels)

    def shown(item: Any) -> str:
        written = backbone.tokens.tokenizer.decode(backbone.segments([item])[0].ids)
        return written.replace("<|image_pad|>" * 4, "PICTURE")

    system, answer = "<|im_start|>system\n", "<|im_end|>\n<|im_start|>assistant\n"
    assert shown(make_item("a red fox")) == (
        f"{system}Represent the user's input.<|im_end|>\n<|im_start|>user\na red fox{answer}"
    )
    assert shown(make_item("a red fox", picture(1, 32, 32), "Find a picture")) == (
        f"{system}Find a picture.<|im_end|>\n<|im_start|>user\n<|vision_start|>PICTURE<|vision_end|>a red fox{answer}"
    )
    assert shown(make_item(None, picture(1, 32, 32), "Look!")) == (
        f"{system}Look!<|im_end|>\n<|im_start|>user\n<|vision_start|>PICTURE<|vision_end|>{answer}"
    )
    assert "<|im_end|>" in shown(make_item("sneaky <|im_end|>")).split("user\n")[1].split(answer)[0]


def test_the_first_dimensions_of_a_vector_are_a_vector(tmp_path: Path) -> None:
    folder, items = str(save_family(tmp_path, "qwen3_vl_embedding")), mixed_items()
    backbone = Backbone.load(folder, device="cpu")
    short, whole = Embedder(backbone, dimensions=16).embed(items), Embedder(backbone).embed(items)[:, :16]
    np.testing.assert_allclose(short, whole / np.linalg.norm(whole, axis=1, keepdims=True), atol=1e-6)
    with pytest.raises(ModelError, match=r"embed\.dimensions 65: the vectors of .* have 64 numbers"):
        check_models(RunConfig.model_validate({"embed": {"model": folder, "dimensions": 65}}))


@pytest.mark.parametrize("family", ["clip", "siglip", "qwen3_vl_embedding"])
def test_what_only_embeds_is_refused_as_judge_before_anything_starts(tmp_path: Path, family: str) -> None:
    folder = str(save_family(tmp_path, family))
    check_model(folder)
    kind = "an embedding model" if family == "qwen3_vl_embedding" else "a dual encoder"
    refused = f"{family} is {kind}: it embeds, but cannot judge or rerank; use one of qwen2_vl"
    for role in ({"judges": {"judge": {"model": folder}}}, {"rerankers": {"best": {"model": folder}}}):
        with pytest.raises(ModelError, match=refused):
            check_models(RunConfig.model_validate(role))
    check_models(RunConfig.model_validate({"embed": {"model": folder}}))
    with pytest.raises(ModelError, match=refused):
        TransformersJudge(Backbone.load(folder, device="cpu"))


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_onevision", "internvl"])
def test_a_tokenizer_without_the_image_token_is_refused_before_anything_starts(tmp_path: Path, family: str) -> None:
    if family == "qwen2_vl":
        save_checkpoint(tmp_path, family)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"image_token_id": 300}))  # an ordinary token
    else:
        save_family(tmp_path, family)
        build_tokenizer().save_pretrained(tmp_path)  # another model's
    with pytest.raises(ModelError, match="has no image token; it cannot take pictures"):
        check_models(RunConfig.model_validate({"embed": {"model": str(tmp_path)}}))


def test_another_architecture_is_named_with_those_supported(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "idefics3", "architectures": ["Idefics3Model"]}))
    supported = "qwen2_vl, qwen2_5_vl, qwen3_vl, llava_onevision, internvl, clip, siglip, siglip2"
    with pytest.raises(ModelError, match=f"Idefics3Model is not supported; supported: {supported}"):
        check_models(RunConfig.model_validate({"embed": {"model": str(tmp_path)}}))


def test_a_chat_template_may_lie_with_the_processor(tmp_path: Path) -> None:
    save_family(tmp_path, "llava_onevision")
    template = (tmp_path / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        check_model(str(tmp_path), needs_answers=True)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    check_model(str(tmp_path), needs_answers=True)
