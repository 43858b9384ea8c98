"""More ranks and smaller micro-batches change the time, not the gradient."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.rank import SECTIONS
from tests.distributed.scene import SECTION, build_scene, gradients, job_of, stepper_of
from unime_ray.config import EmbedderConfig
from unime_ray.train import embedder_objective, worker

REPOSITORY = Path(__file__).resolve().parents[2]
RERANKER = {name: value for name, value in SECTION.items() if not name.endswith("temperature")} | {"max_list_length": 4}
RERANKER.pop("num_negatives")
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "judge_kl": ("embedder", SECTION | {"loss": "judge_kl"}),
    "infonce": ("embedder", SECTION | {"loss": "infonce", "num_negatives": 0}),
    "infonce_negatives": ("embedder", SECTION | {"loss": "infonce", "num_negatives": 2}),
    "hardness_infonce": ("embedder", SECTION | {"loss": "hardness_infonce", "hardness": 2.0}),
    "unime_v1": ("embedder", SECTION | {"loss": "unime_v1", "in_batch_top_k": 4, "false_negative_margin": 0.01}),
    "hard_negative_ce": ("embedder", SECTION | {"loss": "hard_negative_ce"}),
    "margin_mse": ("embedder", SECTION | {"loss": "margin_mse", "judge_targets": "logit"}),
    "matryoshka": ("embedder", SECTION | {"loss": "hybrid", "matryoshka_dims": [4, 16]}),
    "hybrid": ("embedder", SECTION | {"loss": "hybrid", "infonce_weight": 0.5}),
    "infonce_whole_share": ("embedder", SECTION | {"loss": "infonce", "num_negatives": 2}),
    "text_distill": ("embedder", SECTION | {"loss": "text_distill", "teacher": "teacher", "include_self": False}),
    "vision": ("embedder", SECTION | {"loss": "hybrid", "lora": {"rank": 4, "alpha": 8.0, "train_vision": True}}),
    "reranker": ("reranker", RERANKER),
}


def on_ranks(
    scene: Path, cases: dict[str, Any], world: int, out: Path, module: str = "tests.distributed.rank"
) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", module, str(scene)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(world), port, json.dumps(cases), str(out)],
            cwd=REPOSITORY,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])},
        )
        for rank in range(world)
    ]
    try:
        assert [process.wait(timeout=900) for process in processes] == [0] * world
    finally:
        for process in processes:
            process.kill()
    return torch.load(out, weights_only=True)


# Texts under one prompt have nearly one embedding in a random model, so its differences keep fewer digits.
TOLERANCE = {"text_distill": 5e-6}


def assert_equal(found: tuple[float, dict], expected: tuple[float, dict], tolerance: float = 1e-6) -> None:
    """Loss and gradient equal to 1e-6, relative to the gradient's norm: float32 rounds sums in another order."""
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    assert found[1].keys() == expected[1].keys()
    wrong = sum(float((found[1][name] - gradient).square().sum()) for name, gradient in expected[1].items())
    right = sum(float(gradient.square().sum()) for gradient in expected[1].values())
    assert right > 1e-6
    assert (wrong / right) ** 0.5 < tolerance


def whole(scene: Path, name: str, **changes: Any) -> tuple[float, dict]:
    """One process, the whole batch in one pass."""
    kind, section = CASES[name]
    return gradients(scene, SECTIONS[kind].model_validate(section | {"micro_batch_queries": 100} | changes))


@pytest.mark.parametrize("name", list(CASES))
def test_micro_batches_give_the_gradient_of_the_whole_batch(scene, name):
    kind, section = CASES[name]
    expected = whole(scene, name)
    for size in (3, 4):  # 4 leaves a short last micro-batch
        found = gradients(scene, SECTIONS[kind].model_validate(section | {"micro_batch_queries": size}))
        assert_equal(found, expected, TOLERANCE.get(name, 1e-6))


def test_gradient_caching_repeats_the_dropout_of_its_first_pass(scene):
    """Micro-batches embedded twice give the gradient of one graph over all of them."""
    section = SECTION | {"loss": "infonce", "num_negatives": 2, "lora": {"rank": 4, "alpha": 8.0, "dropout": 0.3}}
    config = EmbedderConfig.model_validate(section)
    setting = worker.prepare(job_of(scene, config), config, torch.device("cpu"))
    objective = embedder_objective.make_objective(setting)
    stepper = stepper_of(objective, config)
    stepper.module.train()
    batch = objective.load(1, 0, 1)
    embedded = []
    for number, micro in enumerate(batch.micro_batches):
        stepper.seed(batch.step, number)
        embedded.append(stepper.model(micro.inputs))
    loss = objective._in_batch_loss(embedded, batch).mean()
    loss.backward()
    named = stepper.module.named_parameters()
    expected = {name: weight.grad for name, weight in named if weight.grad is not None}
    assert len(batch.micro_batches) == 2
    assert_equal(gradients(scene, config), (float(loss), expected))


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_give_the_gradient_of_one_process(scene, tmp_path, world):
    # Five queries: ranks have unequal shares, and unequal numbers of micro-batches.
    # `whole_share` keeps its graph (gather with gradients), the others embed twice (gradient caching).
    cases = {
        name: (kind, section | {"batch_queries": 5, "micro_batch_queries": 5 if name.endswith("share") else 2})
        for name, (kind, section) in CASES.items()
    }
    found = on_ranks(scene, cases, world, tmp_path / "out.pt")
    for name in CASES:
        assert_equal(found[name], whole(scene, name, batch_queries=5), TOLERANCE.get(name, 1e-6))


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_sharded_weights_give_the_gradient_of_one_process(scene, tmp_path):
    """FSDP: ranks have unequal shares, micro-batches and rows, yet must make equally many passes."""
    changes = {"batch_queries": 5, "micro_batch_queries": 2, "strategy": "fsdp"}
    cases = {name: (kind, section | changes) for name, (kind, section) in CASES.items() if name != "vision"}
    all_weights = {"lora": {"rank": 0}, "gradient_checkpointing": True}
    cases["all_weights"] = ("embedder", SECTION | changes | all_weights)
    found = on_ranks(scene, cases, 2, tmp_path / "out.pt")
    for name in set(cases) - {"all_weights"}:
        assert_equal(found[name], whole(scene, name, batch_queries=5), TOLERANCE.get(name, 1e-6))
    expected = whole(scene, "judge_kl", batch_queries=5, lora={"rank": 0})
    # torch leaves no gradient on what it shards but nobody uses; one process has none either.
    assert_equal(found["all_weights"], expected)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", ["llava_onevision", "qwen3_vl"])
def test_other_families_can_be_sharded(tmp_path, family):
    build_scene(tmp_path, family)
    changes = {"batch_queries": 5, "micro_batch_queries": 2, "strategy": "fsdp"}
    sections = {"adapters": SECTION | {"loss": "hybrid"}, "all_weights": SECTION | {"lora": {"rank": 0}}}
    cases = {name: ("embedder", section | changes) for name, section in sections.items()}
    found = on_ranks(tmp_path, cases, 2, tmp_path / "out.pt")
    for name, section in sections.items():
        config = EmbedderConfig.model_validate(section | {"batch_queries": 5, "micro_batch_queries": 5})
        assert_equal(found[name], gradients(tmp_path, config), 1e-5)
