"""The loop in one process: resuming, checkpoints, learning rates, losses that are not finite, lost payloads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pytest
import torch
from torch import nn

from tests.distributed.scene import SECTION, build_scene, gradients, job_of, stepper_of
from unime_ray.artifacts import Run
from unime_ray.config import EmbedderConfig, TrainConfig
from unime_ray.errors import ArtifactError, TrainingError
from unime_ray.schemas import IMAGES
from unime_ray.train import embedder_objective, worker
from unime_ray.train.checkpoint import FILE, load_checkpoint, save_checkpoint
from unime_ray.train.log import StepLog, read_log
from unime_ray.train.loop import learning_rate_at, run_steps

IDENTITY = {"model": "m", "config": "c"}


class Training:
    """A training in this process, as a worker does it."""

    def __init__(self, root: Path, **changes: Any) -> None:
        self.config = EmbedderConfig.model_validate(SECTION | {"checkpoint_every": 2, "log_every": 1} | changes)
        self.setting = worker.prepare(job_of(root, self.config), self.config, torch.device("cpu"))
        self.objective = embedder_objective.make_objective(self.setting)
        self.stepper = stepper_of(self.objective, self.config)

    def run(self, log: StepLog, start: int = 0, folder: Path | None = None, stop_at: int | None = None) -> list[float]:
        """Losses by step. With `folder`, a checkpoint at each save; `stop_at` dies right after that checkpoint."""

        def save(done: int, metrics: dict[str, float]) -> None:
            if folder is not None:
                save_checkpoint(folder, self.stepper.module, self.stepper.optimizer, {"step": done}, IDENTITY)
            if done == stop_at:
                raise KeyboardInterrupt

        position = self.setting.order.position
        run_steps(self.stepper, self.objective, start=start, position=position, log=log, save=save)
        return [line["loss"] for line in log.lines]


@pytest.mark.parametrize("loss", ["judge_kl", "hybrid"])
def test_a_resumed_run_repeats_an_undisturbed_one_exactly(scene, tmp_path, loss):
    changes = {"loss": loss, "lora": {"rank": 4, "alpha": 8.0, "dropout": 0.2}}
    expected = Training(scene, **changes).run(StepLog(str(tmp_path / "whole.jsonl"), 0))
    log = str(tmp_path / "log.jsonl")
    with pytest.raises(KeyboardInterrupt):
        Training(scene, **changes).run(StepLog(log, 0), folder=tmp_path, stop_at=4)
    resumed = Training(scene, **changes, seed=0)
    start = load_checkpoint(tmp_path, resumed.stepper.module, resumed.stepper.optimizer, IDENTITY)["step"]
    assert start == 4
    assert resumed.run(StepLog(log, start), start=start) == expected
    assert [line["step"] for line in read_log(log)] == [1, 2, 3, 4, 5, 6]
    assert len(set(expected)) == 6


def test_training_lowers_the_loss_and_touches_only_the_adapter(scene, tmp_path):
    training = Training(scene, steps=20)
    before = {name: weight.clone() for name, weight in training.stepper.module.named_parameters()}
    losses = training.run(StepLog(str(tmp_path / "log.jsonl"), 0))
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    for name, weight in training.stepper.module.named_parameters():
        assert torch.equal(weight, before[name]) != ("lora_" in name), name


def test_a_loss_that_is_not_finite_names_step_and_queries(scene, tmp_path):
    training = Training(scene, temperature=1e-45)
    with pytest.raises(TrainingError, match=r"step 1: the loss is (nan|inf) at queries [0-9a-f]{32}, .* and 1 more; "):
        training.run(StepLog(str(tmp_path / "log.jsonl"), 0))


def test_a_gradient_that_is_not_finite_stops_training(scene, tmp_path):
    training = Training(scene)
    weight = training.stepper.weights[0]
    weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TrainingError, match="step 1: the gradient's norm is"):
        training.run(StepLog(str(tmp_path / "log.jsonl"), 0))


@pytest.mark.parametrize("table", ["items", "images"])
def test_a_payload_that_is_gone_is_named(tmp_path, table):
    build_scene(tmp_path)
    uri = Run(str(tmp_path / "run")).artifact(table).data_uri
    rows = lance.dataset(uri).to_table()
    gone = rows.column(f"{table[:-1]}_id")[0].as_py()
    lance.write_dataset(rows.slice(1), uri, mode="overwrite")
    training = Training(tmp_path, batch_queries=14)
    with pytest.raises(ArtifactError, match=f"{table}/data.lance: no row with id {gone.hex()}"):
        training.run(StepLog(str(tmp_path / "log.jsonl"), 0))


def test_a_picture_that_does_not_decode_names_its_item(tmp_path):
    build_scene(tmp_path)
    uri = Run(str(tmp_path / "run")).artifact("images").data_uri
    rows = lance.dataset(uri).to_table().to_pylist()
    broken = [row | {"bytes": row["bytes"][:40]} for row in rows]
    lance.write_dataset(pa.Table.from_pylist(broken, schema=IMAGES), uri, mode="overwrite")
    with pytest.raises(TrainingError, match="item [0-9a-f]{32} cannot be trained on: .*; leave it out of the corpus"):
        Training(tmp_path, batch_queries=14).run(StepLog(str(tmp_path / "log.jsonl"), 0))


def linear(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    module = nn.Linear(3, 2)
    return module, torch.optim.AdamW(module.parameters())


def test_a_checkpoint_restores_weights_and_optimizer(tmp_path):
    module, optimizer = linear()
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path, module, optimizer, {"step": 7, "epoch": 1, "batch": 2}, IDENTITY)
    other, fresh = linear(seed=1)
    assert load_checkpoint(tmp_path, other, fresh, IDENTITY) == {"step": 7, "epoch": 1, "batch": 2}
    assert torch.equal(other.weight, module.weight)
    assert fresh.state_dict()["state"][0]["step"] == 1


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    module, optimizer = linear()
    save_checkpoint(tmp_path, module, optimizer, {"step": 1}, IDENTITY)
    with pytest.raises(TrainingError, match="checkpoint of another model"):
        load_checkpoint(tmp_path, module, optimizer, IDENTITY | {"model": "other"})
    before, after = ({"config": json.dumps({"steps": steps, "seed": 0})} for steps in (5, 6))
    save_checkpoint(tmp_path, module, optimizer, {"step": 1}, before)
    with pytest.raises(TrainingError, match=r"another config \(steps: 5, this run has 6\); remove it"):
        load_checkpoint(tmp_path, module, optimizer, after)
    save_checkpoint(tmp_path, module, optimizer, {"step": 1}, IDENTITY)
    bigger = nn.Sequential(module, nn.Linear(2, 2))
    with pytest.raises(TrainingError, match="disagree on weight '0.bias'"):
        load_checkpoint(tmp_path, bigger, torch.optim.AdamW(bigger.parameters()), IDENTITY)


def test_half_a_checkpoint_is_named(tmp_path):
    module, optimizer = linear()
    save_checkpoint(tmp_path, module, optimizer, {"step": 1}, IDENTITY)
    whole = (tmp_path / FILE).read_bytes()
    for kept in (whole[: len(whole) // 2], whole[:10], b""):
        (tmp_path / FILE).write_bytes(kept)
        with pytest.raises(TrainingError, match=f"{tmp_path}: not a whole checkpoint .*remove it"):
            load_checkpoint(tmp_path, module, optimizer, IDENTITY)
    (tmp_path / FILE).unlink()
    with pytest.raises(TrainingError, match="s3://b/checkpoint_1: not a whole checkpoint"):
        load_checkpoint(tmp_path, module, optimizer, IDENTITY, "s3://b/checkpoint_1")
    torch.save([1, 2], tmp_path / FILE)
    with pytest.raises(TrainingError, match="checkpoint of format list"):
        load_checkpoint(tmp_path, module, optimizer, IDENTITY)


def test_a_checkpoint_whose_weights_have_another_shape_is_refused(tmp_path):
    save_checkpoint(tmp_path, *linear(), {"step": 1}, IDENTITY)
    wider = nn.Linear(4, 2)
    with pytest.raises(TrainingError, match="disagree on weight 'weight'"):
        load_checkpoint(tmp_path, wider, torch.optim.AdamW(wider.parameters()), IDENTITY)


def test_kept_picture_features_change_no_loss(scene, tmp_path):
    def losses_of(name: str, **changes: Any) -> list[float]:
        return Training(scene, steps=4, **changes).run(StepLog(str(tmp_path / name), 0))

    assert losses_of("off", feature_cache_mb=0) == pytest.approx(losses_of("on"), rel=1e-6)


def test_checkpointed_activations_give_the_same_gradient_and_bfloat16_one_near_it(scene):
    section = SECTION | {"lora": {"rank": 4, "alpha": 8.0, "dropout": 0.3}, "loss": "hybrid"}
    loss, expected = gradients(scene, EmbedderConfig.model_validate(section))
    again, found = gradients(scene, EmbedderConfig.model_validate(section | {"gradient_checkpointing": True}))
    assert again == pytest.approx(loss, rel=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    half, rounded = gradients(scene, EmbedderConfig.model_validate(section | {"dtype": "bfloat16"}))
    assert half == pytest.approx(loss, rel=0.05) and half != loss
    one, other = (torch.cat([g.flatten() for g in found.values()]) for found in (expected, rounded))
    assert one.dtype == other.dtype == torch.float32
    assert torch.cosine_similarity(one, other, dim=0) > 0.95


def test_workers_and_strategies_that_cannot_be_are_refused():
    for wrong, message in (
        ({"num_workers": [3, 2]}, r"num_workers: \[3, 2\] should be \[least, most\]"),
        ({"strategy": "fsdp", "lora": {"train_vision": True}}, "set lora.train_vision: false"),
        ({"tracker": ["mlflow"]}, "tracker"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainConfig.model_validate(wrong)
    section = TrainConfig.model_validate({"num_workers": [1, 4]})
    assert (section.least_workers, section.most_workers) == (1, 4)
    assert TrainConfig(num_workers=2).least_workers == TrainConfig(num_workers=2).most_workers == 2


def test_the_log_drops_lines_that_will_be_done_again(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"step": n, "seconds": n / 2}) + "\n" for n in range(1, 8)))
    log = StepLog(str(path), start_step=4)
    assert log.seconds == 2.0
    log.add({"step": 5, "seconds": 9.0})
    log.flush(force=True)
    assert [line["step"] for line in read_log(str(path))] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447]),
    ],
)
def test_learning_rates(schedule, expected):
    config = TrainConfig(steps=6, warmup_steps=2, learning_rate=1.0, schedule=schedule)
    assert [learning_rate_at(step, config) for step in range(6)] == pytest.approx(expected, rel=1e-5)
