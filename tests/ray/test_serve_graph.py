"""The whole graph on Ray Serve with tiny random models: over HTTP, with replicas killed under it."""

from __future__ import annotations

import concurrent.futures
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import requests

from tests.conftest import picture
from tests.unit.models_fixtures import make_item, save_checkpoint
from tests.unit.serve_fixtures import SHOW, data_url, trained_run
from unime_ray.config_serve import LimitsConfig, ServeConfig
from unime_ray.serve.bundle import Bundle
from unime_ray.serve.cli import APP, serve_run

pytestmark = pytest.mark.slow
READY_SECONDS = 240


@pytest.fixture(scope="module")
def served(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Bundle]]:
    """(address, what is served): the graph of a run of eight pictures and eight names."""
    from ray import serve

    root = tmp_path_factory.mktemp("served")
    run, config = trained_run(root / "run", save_checkpoint(root / "model"))
    settings = ServeConfig(limits=LimitsConfig(deadline_ms=30_000, rerank_budget_ms=10_000))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    bundle = serve_run(run, config, port=port, blocking=False, settings=settings)
    address = f"http://127.0.0.1:{port}"
    wait(lambda: requests.get(f"{address}/ready", timeout=60).json()["ready"])
    yield address, bundle
    serve.shutdown()


def wait(ready: object, seconds: float = READY_SECONDS) -> None:
    """Until `ready()` is true."""
    end = time.monotonic() + seconds
    while not ready():  # type: ignore[operator]
        assert time.monotonic() < end, "not ready in time"
        time.sleep(0.3)


def ask(address: str, **body: object) -> requests.Response:
    return requests.post(f"{address}/v1/search", json=body, timeout=60)


def kill_replicas(name: str) -> None:
    """End the processes of a deployment's replicas, as the operating system would."""
    import ray

    actors = ray.util.list_named_actors(all_namespaces=True)
    victims = [each for each in actors if each["name"].startswith("SERVE_REPLICA") and f"#{name}#" in each["name"]]
    assert victims, f"no replica of {name} among {actors}"
    for each in victims:
        ray.kill(ray.get_actor(each["name"], namespace=each["namespace"]))


def test_search_equals_the_models_called_directly(served: tuple[str, Bundle]) -> None:
    from unime_ray.serve.engines import EncoderEngine, RerankerEngine

    address, bundle = served
    plain = ask(address, image=data_url(picture("red")), k=16, rerank=False).json()
    engine = EncoderEngine(bundle.embedder)
    items = {item.item_id: item for item in bundle.payload().items(pool(bundle))}
    query = make_item(None, picture("red"), "Name the color in the picture.")
    vectors = engine.embed_groups([[query, *items.values()]])[0].vectors
    expected = dict(zip(items, vectors[1:] @ vectors[0], strict=True))
    found = {bytes.fromhex(hit["id"]): hit["similarity"] for hit in plain["results"]}
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([found[key] for key in items], [expected[key] for key in items], atol=2e-5)
    turned = ask(address, image=data_url(picture("red")), k=10).json()
    assert turned["reranked"] and turned["reranker"] == "order"
    head = [items[bytes.fromhex(hit["id"])] for hit in sorted(turned["results"], key=lambda hit: hit["retrieval_rank"])]
    shares = RerankerEngine(bundle.reranker).score_groups([(query, head, "listwise")])[0]  # type: ignore[arg-type]
    by_rank = {hit["retrieval_rank"]: hit["rerank_score"] for hit in turned["results"]}
    np.testing.assert_allclose([by_rank[n] for n in range(1, 11)], shares, atol=1e-4)


def pool(bundle: Bundle) -> list[bytes]:
    return sorted(set(bundle.run.artifact("pools").read(["item_id"]).column(0).to_pylist()))


def test_many_clients_at_once_get_what_one_gets(served: tuple[str, Bundle]) -> None:
    address, _ = served
    texts = ["red", "blue", "green", "a longer question about purple"] * 8
    alone = {text: ask(address, text=text).json()["results"] for text in set(texts)}
    with concurrent.futures.ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(lambda text: ask(address, text=text), texts))
    assert [answer.status_code for answer in answers] == [200] * len(texts)
    for text, answer in zip(texts, answers, strict=True):
        ids = [hit["id"] for hit in answer.json()["results"]]
        assert sorted(ids) == sorted(hit["id"] for hit in alone[text])
        np.testing.assert_allclose(
            sorted(hit["similarity"] for hit in answer.json()["results"]),
            sorted(hit["similarity"] for hit in alone[text]),
            atol=1e-4,
        )


def test_written_items_are_found_at_once(served: tuple[str, Bundle]) -> None:
    address, _ = served
    new = {"id": "written", "image": data_url(picture((1, 200, 120))), "dataset": "mine"}
    assert requests.post(f"{address}/v1/items", json={"items": [new]}, timeout=60).status_code == 200
    hit = ask(address, image=new["image"], instruction=SHOW, k=1, rerank=False).json()["results"][0]
    assert hit["id"] == "written" and hit["similarity"] == pytest.approx(1.0, abs=1e-4)
    assert ask(address, image=new["image"], k=10).json()["reranked"], "the reranker reads written items too"
    assert requests.get(address + hit["image_url"], timeout=60).content == picture((1, 200, 120))
    assert requests.delete(f"{address}/v1/items/written", timeout=60).status_code == 200


def test_embeddings_and_rerank_answer(served: tuple[str, Bundle]) -> None:
    address, bundle = served
    body = {"input": ["a", "b"], "model": bundle.embedder.name}
    data = requests.post(f"{address}/v1/embeddings", json=body, timeout=60).json()["data"]
    assert len(data) == 2 and np.linalg.norm(data[0]["embedding"]) == pytest.approx(1, abs=1e-4)
    for count, mode in ((3, "listwise"), (12, "pointwise")):
        body = {"query": "red", "documents": [f"the color number {n}" for n in range(count)]}
        answer = requests.post(f"{address}/v2/rerank", json=body, timeout=60).json()
        assert answer["mode"] == mode and len(answer["results"]) == count


def test_a_killed_reranker_degrades_and_a_killed_retriever_is_waited_for(served: tuple[str, Bundle]) -> None:
    address, _ = served
    for name in ("reranker", "retriever", "encoder"):
        kill_replicas(name)
        answer = ask(address, text="red", deadline_ms=60_000)
        assert answer.status_code == 200, (name, answer.text)
        if name == "reranker" and answer.json()["degraded"]:
            assert answer.json()["degraded_reason"] in ("late", "down")
        wait(lambda: ask(address, text="red").json().get("reranked"))


def test_an_item_written_before_a_kill_is_there_after_it(served: tuple[str, Bundle]) -> None:
    address, _ = served
    body = {"items": [{"id": "kept", "text": "kept through a kill"}]}
    assert requests.post(f"{address}/v1/items", json=body, timeout=60).status_code == 200
    kill_replicas("retriever")
    wait(lambda: requests.get(f"{address}/v1/items/kept", timeout=60).status_code == 200, 60)


def test_the_graph_is_four_deployments(served: tuple[str, Bundle]) -> None:
    from ray import serve

    deployments = serve.status().applications[APP].deployments
    assert set(deployments) == {"ingress", "encoder", "retriever", "reranker"}


def test_every_metric_of_the_dashboard_is_exported(served: tuple[str, Bundle]) -> None:
    import ray

    address, _ = served
    dashboard = (Path(__file__).parents[2] / "docs" / "grafana_serving.json").read_text()
    named = set(re.findall(r"\bray_\w+", dashboard)) - {"ray_unime_degraded_total"}
    assert ask(address, text="red").status_code == 200
    hit = ask(address, image=data_url(picture("red")), k=1).json()["results"][0]
    requests.get(f"{address}/v1/items/{hit['id']}/image", timeout=60)
    port = ray.nodes()[0]["MetricsExportPort"]

    def missing() -> set[str]:
        lines = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=60).text.splitlines()
        return named - {re.split(r"[{ ]", line)[0] for line in lines}

    end = time.monotonic() + 60
    while missing() and time.monotonic() < end:
        time.sleep(1)
    assert not missing(), "no metric of this name is exported"
