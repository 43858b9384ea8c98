"""The Serve config file: deployed, then changed under load. Another embedder and another index without a failure."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import yaml

from tests.conftest import picture
from tests.unit.models_fixtures import make_item, save_checkpoint
from tests.unit.serve_fixtures import data_url, trained_run
from unime_ray.artifacts import Manifest, Run
from unime_ray.config_serve import ServeConfig
from unime_ray.serve.bundle import resolve_bundle, run_config
from unime_ray.serve.config_file import deploy_file, write_file

pytestmark = pytest.mark.slow
SECONDS = 200
QUERY = {"image": data_url(picture("red")), "k": 16, "rerank": False, "deadline_ms": 30_000}


def add_embedder(run: Run, model: Path, name: str) -> None:
    """A trained embedder with other weights than `model`'s."""
    from safetensors.numpy import load_file, save_file

    artifact = run.artifact("embedder", name)
    folder = Path(artifact.child("model"))
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    noise = np.random.default_rng(0)
    changed = {
        key: value + 0.1 * noise.normal(size=value.shape).astype(value.dtype) if value.ndim > 1 else value
        for key, value in weights.items()
    }
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    artifact.finish(Manifest(table="embedder", name=name, stage="test", fingerprint="1"))


@pytest.fixture(scope="module")
def deployed(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, Run]]:
    """(address, config file, run): served from the file with the base embedder."""
    from ray import serve

    root = tmp_path_factory.mktemp("swap")
    run, _ = trained_run(root / "run", save_checkpoint(root / "model"))
    add_embedder(run, root / "model", "other")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    write_file(run, ServeConfig(embedder="base"), root / "serve.yaml", "127.0.0.1", port)
    deploy_file(root / "serve.yaml")
    address = f"http://127.0.0.1:{port}"
    wait_for(lambda: ready(address))
    yield address, root / "serve.yaml", run
    serve.shutdown()


def ready(address: str) -> bool:
    try:
        return requests.get(f"{address}/ready", timeout=60).status_code == 200
    except (requests.ConnectionError, requests.Timeout):
        return False


def wait_for(done: Any) -> None:
    end = time.monotonic() + SECONDS
    while not done():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.3)


def change(file: Path, **models: Any) -> None:
    """Edit what is served in the one place of the file, and apply it."""
    content = yaml.safe_load(file.read_text())
    content["applications"][0]["deployments"][0]["user_config"].update(models)
    file.write_text(yaml.safe_dump(content))
    deploy_file(file)


class Clients:
    """Four that search without a pause; every answer is kept."""

    def __init__(self, address: str) -> None:
        self.address, self.stop = address, threading.Event()
        self.answers: list[requests.Response] = []
        self.threads = [threading.Thread(target=self._search) for _ in range(4)]

    def _search(self) -> None:
        while not self.stop.is_set():
            self.answers.append(requests.post(f"{self.address}/v1/search", json=QUERY, timeout=60))

    def __enter__(self) -> Clients:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()


def similarities(run: Run, embedder: str) -> dict[str, float]:
    """What a search with this embedder gives, computed by the model itself."""
    from unime_ray.serve.engines import EncoderEngine

    bundle = resolve_bundle(run, run_config(run), ServeConfig(embedder=embedder))
    ids = sorted(set(run.artifact("pools").read(["item_id"]).column(0).to_pylist()))
    query = make_item(None, picture("red"), "Name the color in the picture.")
    vectors = EncoderEngine(bundle.embedder).embed_groups([[query, *bundle.payload().items(ids)]])[0].vectors  # type: ignore[list-item]
    return {identifier.hex(): float(vector @ vectors[0]) for identifier, vector in zip(ids, vectors[1:], strict=True)}


def test_models_and_index_are_swapped_without_a_failed_request(deployed: tuple[str, Path, Run]) -> None:
    address, file, run = deployed
    live = {"items": [{"id": "live-1", "text": "written before the change"}]}
    assert requests.post(f"{address}/v1/items", json=live, timeout=60).status_code == 200
    with Clients(address) as clients:
        time.sleep(1)
        change(file, embedder="other")
        wait_for(lambda: clients.answers[-1].json().get("embedder") == "other")
        index = ServeConfig().index.model_dump() | {"kind": "hnsw"}
        change(file, index=index)
        wait_for(lambda: requests.get(f"{address}/v1/info", timeout=60).json()["index"].startswith("HNSW"))
        time.sleep(1)
    assert {answer.status_code for answer in clients.answers} == {200} and len(clients.answers) > 40
    expected = {name: similarities(run, name) for name in ("base", "other")}
    told = [answer.json() for answer in clients.answers]
    assert {answer["embedder"] for answer in told} == {"base", "other"}
    for answer in told:
        found = {hit["id"]: hit["similarity"] for hit in answer["results"] if hit["id"] != "live-1"}
        wanted = expected[answer["embedder"]]
        np.testing.assert_allclose(list(found.values()), [wanted[name] for name in found], atol=5e-5)
    assert requests.get(f"{address}/v1/items/live-1", timeout=60).status_code == 200, "live items came along"
    assert requests.get(f"{address}/v1/info", timeout=60).json()["embedder"] == "other"
