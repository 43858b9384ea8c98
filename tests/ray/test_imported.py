"""An embedder trains on hard negatives that the corpus brought: nothing is mined and nobody judges."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import picture
from unime_ray.artifacts import Run
from unime_ray.config import RunConfig
from unime_ray.errors import ArtifactError
from unime_ray.pipeline import mining
from unime_ray.train.embedder import run_train_embedder


def config_of(tmp_path: Path) -> RunConfig:
    source = {"format": "unime_json", "path": str(tmp_path / "v2.json")}
    section = {
        "judge": "imported", "num_negatives": 2, "steps": 2, "batch_queries": 2, "micro_batch_queries": 2,
        "log_every": 1, "lora": {"rank": 2}, "learning_rate": 1e-3,
    }  # fmt: skip
    return RunConfig.model_validate(
        {"run": str(tmp_path / "run"), "corpus": {"sources": [source]}, "judges": {}, "embedders": {"mine": section}}
    )


def write_json(folder: Path) -> None:
    (folder / "red.png").write_bytes(picture("red"))
    rows = [
        {
            "query_text": f"find number {number}", "query_image": "", "query_pos_scores": 0.9,
            "pos_text": "<|image_1|>\n" if number == 0 else f"answer {number}",
            "pos_image": "red.png" if number == 0 else "",
            "hard_negatives": [[f"wrong {number}", ""], [f"answer {number + 5}", ""]],
            "hard_negatives_scores": [0.2, 0.4],
        }
        for number in range(4)
    ]  # fmt: skip
    (folder / "v2.json").write_text(json.dumps(rows))


def test_imported_negatives_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no source of the corpus brings hard negatives with scores"):
        run_train_embedder(Run(str(tmp_path / "run")), config_of(tmp_path), "mine")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_an_embedder_trains_on_imported_negatives(tmp_path: Path) -> None:
    write_json(tmp_path)
    config = config_of(tmp_path)
    run = Run(config.run)
    (step,) = mining(run, config)
    step.run()
    assert run.artifact("hard_negatives", "imported").require().rows == 4
    manifest = run_train_embedder(run, config, "mine")
    assert manifest.rows == 4 and manifest.config["judge"] == "imported"
    log = Path(run.artifact("embedder", "mine").child("log.jsonl")).read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [1, 2]
    assert (Path(run.artifact("embedder", "mine").child("model")) / "model.safetensors").is_file()
