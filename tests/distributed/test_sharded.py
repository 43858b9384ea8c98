"""Weights split over two gloo ranks: the losses of DDP, checkpoints that either can go on from, a model like any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from tests.distributed.scene import SECTION, build_scene
from tests.distributed.test_gradients import on_ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]
BATCHES = {"steps": 4, "batch_queries": 5, "micro_batch_queries": 2, "checkpoint_every": 2}
ALL = SECTION | BATCHES | {"loss": "hybrid", "lora": {"rank": 0}, "learning_rate": 1e-3}
LORA = SECTION | BATCHES | {"lora": {"rank": 4, "alpha": 8.0, "dora": True}, "dtype": "bfloat16"}
FSDP = {"strategy": "fsdp"}
CASES: dict[str, list[Any]] = {
    "ddp": [ALL, None, False],
    "fsdp": [ALL | FSDP, None, False],
    "stopped": [ALL | FSDP, None, True],
    "fsdp_resumed": [ALL | FSDP, "stopped", False],
    "ddp_resumed": [ALL, "stopped", False],
    "lora_ddp": [LORA, None, False],
    "lora_fsdp": [LORA | FSDP, None, False],
}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("scene")
    build_scene(root)
    losses = on_ranks(root, CASES, 2, root / "out.pt", module="tests.distributed.sharded")
    return {"root": root, "losses": losses}


def weights(root: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(root / name / "model" / "model.safetensors")


def test_losses_are_those_of_ddp(found):
    losses = found["losses"]
    assert len(losses["ddp"]) == 4 and len(set(losses["ddp"])) == 4
    assert losses["fsdp"] == pytest.approx(losses["ddp"], rel=1e-4)
    assert losses["lora_fsdp"] == pytest.approx(losses["lora_ddp"], rel=0.02)  # bfloat16


def test_a_checkpoint_serves_both(found):
    losses = found["losses"]
    assert losses["stopped"] == losses["fsdp"][:2]
    assert losses["fsdp_resumed"] == losses["fsdp"][2:]
    assert losses["ddp_resumed"] == pytest.approx(losses["fsdp"][2:], rel=1e-4)


@pytest.mark.parametrize(("sharded", "plain"), [("fsdp", "ddp"), ("lora_fsdp", "lora_ddp")])
def test_the_model_is_whole_and_loads_in_plain_transformers(found, sharded, plain):
    root = found["root"]
    one, other, base = weights(root, sharded), weights(root, plain), load_file(root / "model" / "model.safetensors")
    assert one.keys() == other.keys() == base.keys()
    moved = sum(float((other[name].float() - base[name]).square().sum()) for name in base)
    apart = sum(float((one[name].float() - other[name].float()).square().sum()) for name in base)
    assert moved > 0 and apart < 0.01 * moved
    AutoModelForImageTextToText.from_pretrained(root / sharded / "model")
