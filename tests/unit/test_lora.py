"""Adapters: where they go, that training them changes the output, and that merged checkpoints say the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from tests.unit.models_fixtures import FAMILIES, mixed_items, save_checkpoint
from unime_ray.config import LoraConfig
from unime_ray.errors import ModelError
from unime_ray.models.backbone import Backbone
from unime_ray.models.embedder import Embedder, embed_batch
from unime_ray.models.lora import apply_lora, merge_and_save


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("small"))


def train_a_little(backbone: Backbone, model: torch.nn.Module) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    for _ in range(2):  # adapters start with B at zero: the first step moves B alone
        optimizer.zero_grad()
        embed_batch(backbone, backbone.prepare(mixed_items()))[:, :8].sum().backward()
        optimizer.step()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("vision", [False, True])
def test_adapters_sit_where_they_were_asked_for(tmp_path: Path, family: str, vision: bool) -> None:
    backbone = Backbone.load(str(save_checkpoint(tmp_path, family)), device="cpu")
    model = apply_lora(backbone.model, LoraConfig(rank=2, train_vision=vision))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    adapted = {name.split(".lora_")[0].removeprefix("base_model.model.model.") for name in trained}
    language = {name for name in adapted if name.startswith("language_model.")}
    ends = {name.rsplit(".", 1)[1] for name in language}
    assert ends == {"q_proj", "k_proj", "v_proj", "o_proj", "down_proj"}
    assert bool(adapted - language) is vision
    assert all(name.startswith("visual.blocks.") for name in adapted - language)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(rank=4),
        LoraConfig(rank=4, dora=True, train_vision=True),
        LoraConfig(rank=0),
        LoraConfig(rank=0, train_vision=True),
    ],
    ids=["lora", "dora-vision", "full", "full-vision"],
)
def test_a_merged_checkpoint_embeds_the_same(checkpoint: Path, tmp_path: Path, config: LoraConfig) -> None:
    backbone = Backbone.load(str(checkpoint), device="cpu")
    before = Embedder(backbone).embed(mixed_items())
    model = apply_lora(backbone.model, config)
    train_a_little(backbone, model)
    backbone.forget_features()
    trained = Embedder(backbone).embed(mixed_items())
    assert np.abs(trained - before).max() > 1e-3
    merge_and_save(model, backbone, tmp_path / "model", tmp_path / "adapter")
    again = Embedder(Backbone.load(str(tmp_path / "model"), device="cpu")).embed(mixed_items())
    np.testing.assert_allclose(again, trained, atol=1e-5)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists() is (config.rank > 0)


def test_plain_transformers_loads_what_was_saved(checkpoint: Path, tmp_path: Path) -> None:
    backbone = Backbone.load(str(checkpoint), device="cpu")
    merge_and_save(apply_lora(backbone.model, LoraConfig(rank=2)), backbone, tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    base = AutoModelForImageTextToText.from_pretrained(checkpoint)
    assert model.config._attn_implementation == base.config._attn_implementation
    for name, parameter in base.named_parameters():  # untrained adapters add nothing
        torch.testing.assert_close(model.get_parameter(name), parameter)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.chat_template == backbone.tokens.tokenizer.chat_template
    assert AutoImageProcessor.from_pretrained(tmp_path, backend="pil").patch_size == backbone.pixels.patch


def test_vision_stays_frozen_unless_asked(checkpoint: Path) -> None:
    backbone = Backbone.load(str(checkpoint), device="cpu")
    apply_lora(backbone.model, LoraConfig(rank=0))
    assert not any(p.requires_grad for p in backbone.model.model.visual.parameters())
    assert all(p.requires_grad for p in backbone.model.model.language_model.parameters())


def test_unknown_targets_are_refused(checkpoint: Path) -> None:
    backbone = Backbone.load(str(checkpoint), device="cpu")
    with pytest.raises(ModelError, match="none of query_key_value"):
        apply_lora(backbone.model, LoraConfig(target_modules=("query_key_value",)))
