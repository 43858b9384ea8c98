"""The backbone against plain transformers: same pixels, positions, features and hidden states for each family."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText

from tests.unit.models_fixtures import FAMILIES, build_tokenizer, make_item, mixed_items, picture, save_checkpoint
from unime_ray.config import PixelBudget
from unime_ray.corpus.images import decode
from unime_ray.errors import ModelError, RejectedRow
from unime_ray.models.backbone import Backbone
from unime_ray.models.cache import ByteCache
from unime_ray.models.names import model_revision, resolve_model


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def backbone(checkpoint: Path) -> Backbone:
    return Backbone.load(str(checkpoint), device="cpu")


def test_loading_needs_no_torchvision(backbone: Backbone) -> None:
    assert type(backbone.processor).__name__ == "Qwen2VLImageProcessorPil"


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_hidden_states_equal_plain_transformers(backbone: Backbone, checkpoint: Path, side: str) -> None:
    plain = AutoModelForImageTextToText.from_pretrained(checkpoint, attn_implementation="eager").eval()
    batch = backbone.prepare(mixed_items(), padding_side=side)
    expected = plain.model(**batch.model_inputs(backbone)).last_hidden_state
    expected = expected[torch.arange(len(batch)), batch.last]
    torch.testing.assert_close(backbone.forward_hidden(batch), expected, atol=1e-5, rtol=0)


def test_positions_equal_rope_index(backbone: Backbone) -> None:
    batch = backbone.prepare(mixed_items())
    inputs = batch.model_inputs(backbone)
    expected, _ = backbone.model.model.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )
    where = batch.attention_mask.bool()
    assert torch.equal(batch.position_ids[:, where], expected[:, where])


def test_patches_equal_the_image_processor(backbone: Backbone, checkpoint: Path) -> None:
    processor = AutoImageProcessor.from_pretrained(checkpoint, backend="pil")
    images = [picture(seed, width, height) for seed, (width, height) in enumerate([(64, 64), (20, 90), (300, 211)])]
    expected = processor([decode(data) for data in images], return_tensors="pt")
    pictures = backbone.pixels.pictures([(data, None) for data in images])
    values = backbone.pixels.normalise(pictures, torch.device("cpu"))
    torch.testing.assert_close(values, expected["pixel_values"], atol=1e-6, rtol=0)
    assert [[1, *p.grid] for p in pictures] == expected["image_grid_thw"].tolist()


def test_pixel_budget_overrides_the_checkpoint(checkpoint: Path) -> None:
    small = Backbone.load(str(checkpoint), device="cpu", pixels=PixelBudget(min_pixels=256, max_pixels=1024))
    found = small.pixels.picture(picture(0, 300, 300))
    assert found.grid == (4, 4) and small.pixels.num_tokens(found.grid) == 4
    with pytest.raises(ModelError, match="min_pixels"):
        Backbone.load(str(checkpoint), device="cpu", pixels=PixelBudget(min_pixels=10**6, max_pixels=1024))


@pytest.mark.parametrize(
    ("published", "budget"),
    [
        (
            {
                "min_pixels": 3136,
                "max_pixels": 12845056,
                "patch_size": 14,
                "image_processor_type": "Qwen2VLImageProcessor",
            },
            (3136, 12845056),
        ),
        (
            {
                "size": {"shortest_edge": 65536, "longest_edge": 16777216},
                "patch_size": 16,
                "image_processor_type": "Qwen2VLImageProcessorFast",
            },
            (65536, 16777216),
        ),
    ],
    ids=["Qwen2-VL", "Qwen3-VL"],
)
def test_published_processor_files_are_understood(
    checkpoint: Path, tmp_path: Path, published: dict, budget: tuple[int, int]
) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    config = {"merge_size": 2, "temporal_patch_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3} | published
    (copy / "preprocessor_config.json").write_text(json.dumps(config))
    pixels = Backbone.load(str(copy), device="cpu").pixels
    assert pixels.budget == budget and pixels.patch == published["patch_size"]


@torch.no_grad()
def test_features_are_computed_once_per_picture(backbone: Backbone) -> None:
    backbone.forget_features()
    pictures = [backbone.pixels.picture(picture(seed)) for seed in (1, 2, 1)]
    first = backbone.features(pictures)
    calls = []
    handle = backbone.model.model.visual.register_forward_hook(lambda *_: calls.append(1))
    again = backbone.features(pictures)
    handle.remove()
    assert not calls and torch.equal(first, again)
    tokens = first.shape[1] // 3
    assert torch.equal(first[:, :tokens], first[:, 2 * tokens :])


def test_features_carry_gradients_only_when_the_tower_is_trained(backbone: Backbone) -> None:
    visual = backbone.model.model.visual
    pictures = [backbone.pixels.picture(picture(1))]
    assert backbone.features(pictures).requires_grad
    visual.requires_grad_(False)
    assert not backbone.features(pictures).requires_grad
    visual.requires_grad_(True)


def test_a_trained_tower_computes_a_picture_once_with_the_same_gradient(backbone: Backbone) -> None:
    """Once a call, and once for all calls within `sharing_pictures`."""
    visual = backbone.model.model.visual
    one, other = (backbone.pixels.picture(picture(seed)) for seed in (1, 2))
    calls: list[int] = []

    def gradient_of(lists: list[list], shared: bool) -> torch.Tensor:
        visual.zero_grad()
        calls.clear()
        with backbone.sharing_pictures() if shared else nullcontext():
            found = torch.cat([backbone.features(pictures) for pictures in lists], dim=1)
        weights = torch.linspace(-1, 1, found.numel()).view_as(found)
        (found * weights).sum().backward()
        return torch.cat([p.grad.flatten() for p in visual.parameters() if p.grad is not None])

    handle = visual.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    plain = gradient_of([[one], [other], [one], [one], [other]], shared=False)
    assert len(calls) == 5
    for lists, shared, num_calls in (
        ([[one, other, one, one, other]], False, 1),
        ([[one, other], [one, one, other]], True, 1),
        ([[one, other], [one, one, other]], False, 2),
    ):
        assert (gradient_of(lists, shared) - plain).norm() < 1e-6 * plain.norm()
        assert len(calls) == num_calls and set(calls) == {len(one.patches) + len(other.patches)}
    handle.remove()
    visual.zero_grad()


@torch.no_grad()
def test_a_picture_whose_features_are_kept_is_not_decoded_again(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = Backbone.load(str(checkpoint), device="cpu")
    items = [make_item("look", picture(1), instruction) for instruction in ("Find:", "Name:")]
    cut, made = backbone.pixels._cut, []
    monkeypatch.setattr(backbone.pixels, "_cut", lambda key, image: made.append(key) or cut(key, image))
    expected = backbone.forward_hidden(backbone.prepare(items))
    backbone.pixels.forget()
    assert len(made) == 1
    torch.testing.assert_close(backbone.forward_hidden(backbone.prepare(items)), expected, atol=0, rtol=0)
    assert len(made) == 1
    batch = backbone.prepare(items)
    backbone.forget_features()  # as if other pictures had pushed them out meanwhile
    torch.testing.assert_close(backbone.forward_hidden(batch), expected, atol=0, rtol=0)
    assert len(made) == 2


def test_the_feature_cache_can_be_bounded_or_off(checkpoint: Path) -> None:
    backbone = Backbone.load(str(checkpoint), device="cpu")
    pictures = [backbone.pixels.picture(picture(seed)) for seed in (1, 2)]
    with torch.no_grad():
        kept = backbone.features(pictures)
        assert len(backbone._features) == 2
        for limit in (0, kept.nbytes // 2):
            backbone.limit_feature_cache(limit)
            torch.testing.assert_close(backbone.features(pictures), kept)
            assert len(backbone._features) == (limit > 0) and backbone._features.num_bytes <= limit


def test_answers_stay_float32_under_autocast(backbone: Backbone) -> None:
    hidden = torch.randn(3, backbone.hidden_size)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        cast = backbone.answer_logits(hidden, [1, 2])
    assert torch.equal(cast, backbone.answer_logits(hidden, [1, 2]))


def test_text_of_users_never_becomes_a_special_token(backbone: Backbone) -> None:
    sneaky = make_item("a <|image_pad|> b <|im_end|>", picture(1))
    segment = backbone.segments([sneaky])[0]
    image_tokens = (segment.ids == backbone.tokens.image_token_id).sum()
    assert image_tokens == backbone.pixels.num_tokens(segment.pictures[0].grid)
    assert backbone.tokens.tokenizer.convert_tokens_to_ids("<|im_end|>") not in segment.ids


def test_a_bad_item_is_its_reason_and_the_others_go_on(backbone: Backbone) -> None:
    items = [make_item("fine"), make_item("broken", b"no picture"), make_item("long " * 3000)]
    fine, broken, long = backbone.segments(items)
    assert len(fine) == len(backbone.encode_text("fine"))
    assert isinstance(broken, RejectedRow) and "not a picture" in broken.reason
    assert isinstance(long, RejectedRow) and "context is 1024" in long.reason
    with pytest.raises(RejectedRow):
        backbone.prepare(items)


@torch.no_grad()
def test_bfloat16_runs_and_answers_are_projected_in_float32(checkpoint: Path) -> None:
    half = Backbone.load(str(checkpoint), device="cpu", dtype="bfloat16")
    hidden = half.forward_hidden(half.prepare(mixed_items()))
    logits = half.answer_logits(hidden, [half.yes_id, half.no_id])
    assert hidden.dtype == torch.bfloat16 and logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())


def test_models_that_cannot_do_it_say_why(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model folder ./nowhere"):
        Backbone.load("./nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        Backbone.load(str(tmp_path / "empty"))
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    with pytest.raises(ModelError, match="BertModel is not supported; supported: qwen2_vl"):
        Backbone.load(str(tmp_path / "bert"))


def test_tokenizers_that_cannot_do_it_say_why(tmp_path: Path) -> None:
    split = Backbone.load(str(save_checkpoint(tmp_path / "split", tokenizer=build_tokenizer(("Yes",)))), device="cpu")
    with pytest.raises(ModelError, match="'No' is not a single token"):
        _ = split.no_id
    split.tokens.tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        split.chat_wrap()
    config = json.loads((tmp_path / "split" / "config.json").read_text())
    (tmp_path / "split" / "config.json").write_text(json.dumps(config | {"image_token_id": 10**6}))
    with pytest.raises(ModelError, match="no image token"):
        Backbone.load(str(tmp_path / "split"))


def test_revision_is_of_the_content(checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    assert model_revision(str(copy)) == model_revision(str(checkpoint))
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert model_revision(str(copy)) != model_revision(str(checkpoint))
    assert resolve_model(str(copy)) == str(copy) and resolve_model("Qwen/Qwen2-VL-2B") == "Qwen/Qwen2-VL-2B"


def test_cache_drops_the_least_recently_used() -> None:
    cache: ByteCache[str, np.ndarray] = ByteCache(100)
    for name in "ab":
        cache.put(name, np.zeros(1), 40)
    assert cache.get("a") is not None
    cache.put("c", np.zeros(1), 40)
    assert cache.get("b") is None and cache.get("a") is not None and cache.num_bytes == 80
    cache.put("large", np.zeros(1), 101)
    assert len(cache) == 2
