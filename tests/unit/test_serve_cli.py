"""The commands around serving: items of a running server, and the Serve config file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.conftest import picture
from tests.unit.models_fixtures import save_checkpoint
from tests.unit.serve_fixtures import trained_run
from tests.unit.test_serve_clients import address  # noqa: F401 - a fixture
from unime_ray.cli import main
from unime_ray.config_serve import ServeConfig
from unime_ray.errors import ConfigError
from unime_ray.serve.bundle import chosen, resolve_bundle, run_config
from unime_ray.serve.config_file import check_file, write_file


def run(*arguments: str) -> int:
    try:
        main([*arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_items_are_added_listed_and_deleted(
    address: str,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "red.png").write_bytes(picture("red"))
    rows = [{"id": "a/b", "text": "no such id"}, {"id": "sku-1", "image": "red.png", "dataset": "shop"}]
    file = tmp_path / "items.jsonl"
    file.write_text(json.dumps(rows[1]) + "\n\n")
    assert run("serve", "items", "list", "--server", address) == 2, "the key is missing"
    assert "authorization" in capsys.readouterr().err
    monkeypatch.setenv("UNIME_RAY_API_KEY", "secret")
    assert run("serve", "items", "add", str(file), "--server", address) == 0
    capsys.readouterr()
    assert run("serve", "items", "list", "--server", address, "--dataset", "shop") == 0
    assert [json.loads(line)["id"] for line in capsys.readouterr().out.splitlines()] == ["sku-1"]
    assert run("serve", "items", "list", "--server", address, "--limit", "5") == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert run("serve", "items", "get", "sku-1", "--server", address) == 0
    assert json.loads(capsys.readouterr().out)["live"]
    assert run("serve", "items", "delete", "sku-1", "--server", address) == 0
    assert run("serve", "items", "delete", "sku-1", "--server", address) == 2
    assert "no item 'sku-1'" in capsys.readouterr().err
    file.write_text(json.dumps(rows[0]))
    assert run("serve", "items", "add", str(file), "--server", address) == 2
    assert "items[0].id" in capsys.readouterr().err
    file.write_text('{"id": ')
    assert run("serve", "items", "add", str(file), "--server", address) == 2
    assert "items.jsonl:1" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("serve", "items", "list", "--server", "http://127.0.0.1:9") == 2
    assert "does not answer" in capsys.readouterr().err
    assert run("serve", "items", "list", "--server", "localhost") == 2
    assert "no address" in capsys.readouterr().err
    assert run("serve", "/nonexistent") == 2
    assert "is it a run folder" in capsys.readouterr().err


def test_the_config_file_says_what_is_served_in_one_place(tmp_path: Path) -> None:
    served, _ = trained_run(tmp_path / "run", save_checkpoint(tmp_path / "model"))
    file = tmp_path / "serve.yaml"
    write_file(served, ServeConfig(retriever_shards=2), file, "127.0.0.1", 8123)
    with pytest.raises(ConfigError, match="already there"):
        write_file(served, ServeConfig(), file, "127.0.0.1", 8123)
    content = check_file(file)
    application = content["applications"][0]
    names = [each["name"] for each in application["deployments"]]
    assert names == ["ingress", "encoder", "retriever-0", "retriever-1", "reranker"]
    assert application["deployments"][4]["user_config"]["embedder"] == "base"
    assert content["http_options"]["port"] == 8123 and file.read_text().count("&models") == 1
    torn = yaml.safe_load(file.read_text())
    torn["applications"][0]["deployments"][1]["user_config"] = {"embedder": "base"}
    file.write_text(yaml.safe_dump(torn))
    with pytest.raises(ConfigError, match="same user_config"):
        check_file(file)
    file.write_text("applications: []")
    with pytest.raises(ConfigError, match="no config of"):
        check_file(file)


def test_a_choice_that_cannot_be_served_is_refused(tmp_path: Path) -> None:
    served, _ = trained_run(tmp_path / "run", save_checkpoint(tmp_path / "model"))
    bundle = resolve_bundle(served, run_config(served), ServeConfig())
    assert chosen(bundle, {"index": {"kind": "hnsw"}}).config.index.kind == "hnsw"
    for choice, told in (
        ({"embedder": "bse"}, "no 'bse'; did you mean 'base'"),
        ({"embeder": "base"}, "user_config.embeder: unknown; did you mean 'embedder'"),
        ({"index": {"kind": "tree"}}, "index.*kind"),
    ):
        with pytest.raises(ConfigError, match=told):
            chosen(bundle, choice)
