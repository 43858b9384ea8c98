"""The whole recipe with its run folder on S3, again without work, and its models exported to S3."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs
import pytest
import stranger
import yaml
from safetensors.torch import load_file
from test_stranger import unime

from tests.export_run import trained_run
from tests.s3_server import s3_bucket
from unime_ray.artifacts import Run, filesystem, join, local_folder, read_text
from unime_ray.errors import ConfigError
from unime_ray.export import export_run
from unime_ray.models.names import resolve_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def config_on(bucket: str, folder: Path) -> Path:
    """A quarter of the stranger's corpus, two embedders of four steps, the second from the first, and a run on S3."""
    path = stranger.write_corpus(folder)
    for name, rows in (("train.jsonl", 40), ("test.jsonl", 10)):
        lines = (folder / name).read_text().splitlines()
        (folder / name).write_text("\n".join(lines[8 : 8 + rows]) + "\n")
    config = yaml.safe_load(path.read_text()) | {"run": join(bucket, "run")}
    config["rerankers"] = {}
    config["embedders"]["mine"] |= {"tracker": ["tensorboard"]}
    config["embedders"]["second"] = config["embedders"]["mine"] | {"start_from": "mine", "tracker": []}
    path.write_text(yaml.safe_dump(config))
    return path


def keys(uri: str) -> set[str]:
    fs, path = filesystem(uri)
    infos = fs.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
    return {info.path[len(path) + 1 :] for info in infos if info.type == pafs.FileType.File}


@pytest.fixture
def bucket(monkeypatch) -> Iterator[str]:
    """URI of an empty bucket that this process and its children may use."""
    with s3_bucket({}) as (uri, environment):
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_EC2_METADATA_DISABLED"):
            monkeypatch.setenv(name, environment[name])
        yield uri


def test_a_run_on_s3_from_pictures_to_exported_models(tmp_path, bucket):
    config = config_on(bucket, tmp_path / "corpus")
    done = unime("run", "--config", str(config), limit=900)
    print(done.stdout[-3000:], done.stderr[-3000:])
    assert done.returncode == 0
    run = Run(join(bucket, "run"))
    metrics = {(row["model"], row["stage"]) for row in run.artifact("metrics").read().to_pylist()}
    assert {"base", "mine", "second"} <= {model for model, _ in metrics}
    page = read_text(run.child("report", "report.html"))
    assert page is not None and page.count("data:image/") > 5
    found = keys(run.artifact("embedder", "mine").uri)
    assert any(key.startswith("trackers/tensorboard/events") for key in found)
    assert {"manifest.json", "log.jsonl", "model/model.safetensors", "adapter/adapter_config.json"} <= found
    assert not any(key.startswith("checkpoints/") for key in found), "checkpoints of a finished model"

    made = {artifact.key: artifact.require() for artifact in run.artifacts()}
    again = unime("run", "--config", str(config))
    assert again.returncode == 0, again.stderr[-3000:]
    assert {artifact.key: artifact.require() for artifact in run.artifacts()} == made, "nothing is done twice"

    exported = unime("export", run.root, "--to", join(bucket, "models"))
    assert exported.returncode == 0, exported.stderr[-3000:]
    check_export(join(bucket, "models"), run)
    again = unime("export", run.root, "--to", join(bucket, "models"))
    assert again.returncode != 0 and "already holds a model" in again.stderr


def test_models_of_a_run_on_s3_are_exported_to_s3(tmp_path, bucket):
    """The same without a recipe: a run that was made elsewhere and copied."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    trained_run(tmp_path / "run", tmp_path / "adapter")
    run = Run(join(bucket, "run"))
    fs, path = filesystem(run.root)
    local = pafs.LocalFileSystem()
    pafs.copy_files(str(tmp_path / "run"), path, source_filesystem=local, destination_filesystem=fs)
    found = export_run(run, join(bucket, "models"))
    assert {one.name for one in found} == {"adapted", "reordered"}
    written = keys(join(bucket, "models"))
    assert {"adapted/README.md", "adapted/1_Pooling/config.json", "adapted/adapter/adapter_config.json"} <= written
    assert {"reordered/README.md", "reordered/1_LogitScore/config.json"} <= written
    folder = Path(local_folder(join(bucket, "models", "adapted")))
    assert (folder / "model.safetensors").read_bytes() == (
        tmp_path / "run/embedder/adapted/model/model.safetensors"
    ).read_bytes()
    with pytest.raises(ConfigError, match="already holds a model"):
        export_run(run, join(bucket, "models"))


def check_export(models: str, run: Run) -> None:
    written = keys(models)
    for name in ("mine", "second"):
        assert {f"{name}/README.md", f"{name}/modules.json", f"{name}/adapter/adapter_config.json"} <= written
    folder = Path(local_folder(join(models, "mine")))
    assert json.loads((folder / "1_Pooling" / "config.json").read_text())["pooling_mode"] == "lasttoken"
    found, base = (load_file(path / "model.safetensors") for path in (folder, Path(resolve_model("tiny"))))
    trained = load_file(Path(local_folder(run.artifact("embedder", "mine").child("model"))) / "model.safetensors")
    assert all((found[name] == weight).all() for name, weight in trained.items())
    assert any((found[name] != weight).any() for name, weight in base.items())
