"""The published sets: each preset trains one step on a small random model of the real class, where it says it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import scene
from tests.unit.family_fixtures import save_family
from tests.unit.models_fixtures import save_checkpoint
from unime_ray.config import EmbedderConfig, LoraConfig, PixelBudget, RerankerConfig, load_config, preset_names
from unime_ray.models.backbone import Backbone
from unime_ray.models.lora import apply_lora
from unime_ray.train import embedder_objective, reranker_objective, worker
from unime_ray.train.loop import Stepper

PUBLISHED = [name for name in preset_names() if name.startswith("unime-v2-")]
EMBEDDER_LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "down_proj"}


def small(section: EmbedderConfig | RerankerConfig) -> EmbedderConfig | RerankerConfig:
    """The section with nothing changed but what a small model on one CPU needs."""
    sizes = {"batch_queries": 6, "micro_batch_queries": 3, "steps": 4, "warmup_steps": 0, "learning_rate": 1e-2}
    place = {"use_gpu": False, "num_workers": 1, "pixels": PixelBudget()}
    return section.model_copy(update=sizes | place)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run with eight negatives a row, once for each family that a preset trains."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scene, "NUM_NEGATIVES", 8)
        for family in ("qwen2_vl", "qwen2_5_vl", "llava_onevision"):
            root = found[family] = tmp_path_factory.mktemp(family)
            scene.build_scene(root)
            save = save_family if family == "llava_onevision" else save_checkpoint
            save(root / "model", family)
    return found


def family_of_name(model: str) -> str:
    return {"Qwen2-VL": "qwen2_vl", "Qwen2.5-": "qwen2_5_vl", "llava-on": "llava_onevision"}[model.split("/")[1][:8]]


def test_all_eight_are_there() -> None:
    kinds = ("qwen2vl-2b", "qwen2vl-7b", "llava-ov-7b", "reranker-qwen2.5vl-7b")
    assert sorted(f"unime-v2-{kind}-{flavour}" for kind in kinds for flavour in ("paper", "published")) == PUBLISHED


def test_flavours_differ_where_paper_and_code_do() -> None:
    paper, published = (load_config(f"unime-v2-qwen2vl-7b-{flavour}") for flavour in ("paper", "published"))
    ours, theirs = paper.embedders["unime_v2"], published.embedders["unime_v2"]
    assert (ours.batch_queries, theirs.batch_queries) == (1024, 512)
    assert (ours.pixels.max_pixels, theirs.pixels.max_pixels) == (336**2, 672**2)
    assert (ours.lora.dora, theirs.lora.dora) == (False, True)
    assert ours.model == theirs.model == "Qwen/Qwen2-VL-7B-Instruct"
    assert (ours.lora.rank, ours.lora.alpha, theirs.lora.dropout, theirs.warmup_steps) == (16, 64, 0.1, 200)
    llava = [load_config(f"unime-v2-llava-ov-7b-{flavour}").embedders["unime_v2"] for flavour in ("paper", "published")]
    assert [section.learning_rate for section in llava] == [2e-5, 1e-4]
    assert all(section.pixels == PixelBudget(max_pixels=336**2) for section in llava)
    reranker = load_config("unime-v2-reranker-qwen2.5vl-7b-published")
    assert not reranker.embedders and reranker.rerankers["reranker"].gold_position == "published"
    assert (reranker.rerankers["reranker"].lora.rank, reranker.rerankers["reranker"].lora.alpha) == (128, 256)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_trains_a_small_model_of_the_real_class(name: str, scenes: dict[str, Path]) -> None:
    config = load_config(name)
    sections: dict[str, Any] = {**config.embedders, **config.rerankers}
    (section,) = sections.values()
    family = family_of_name(section.model)
    section = small(section)
    setting = worker.prepare(scene.job_of(scenes[family], section), section, torch.device("cpu"))
    assert setting.backbone.family.name == family
    reranks = isinstance(section, RerankerConfig)
    objective: Any = (reranker_objective if reranks else embedder_objective).make_objective(setting)
    stepper = Stepper(objective, section)
    stepper.module.train()
    before = {key: weight.detach().clone() for key, weight in stepper.module.named_parameters()}
    batch = objective.load(0, 0, 1)
    found = []
    for step in range(section.steps):  # the same queries each time: their loss must fall
        found.append(float(objective.backward(stepper, batch).losses_B.mean()))
        stepper.update(step)
    assert found[-1] < found[0]
    moved = {key for key, weight in stepper.module.named_parameters() if not torch.equal(weight, before[key])}
    assert all("lora_" in key for key in moved)
    ends = {key.split(".lora_")[0].rsplit(".", 1)[1] for key in moved if "language_model" in key}
    assert ends == (EMBEDDER_LINEARS | {"gate_proj", "up_proj"} if reranks else EMBEDDER_LINEARS)
    assert any("lora_magnitude" in key for key in moved) == section.lora.dora
    tower = {key.split(".lora_")[0].rsplit(".", 1)[1] for key in moved if "language_model" not in key}
    assert tower == ({"q_proj", "k_proj", "v_proj", "out_proj"} if name == "unime-v2-llava-ov-7b-published" else set())


def test_gaussian_and_kaiming_starts_differ(tmp_path: Path) -> None:
    folder, spread = str(save_checkpoint(tmp_path)), {}
    for init in ("gaussian", "kaiming"):
        model = apply_lora(Backbone.load(folder, device="cpu").model, LoraConfig(rank=16, init=init))
        first = next(weight for key, weight in model.named_parameters() if "lora_A" in key)
        spread[init] = first.abs().max() / first.std()
    assert spread["gaussian"] > 2.5 and spread["kaiming"] < 1.8  # a uniform draw ends at 1.73 standard deviations
