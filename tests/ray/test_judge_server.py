"""The judge stage against a real HTTP server that returns log-probabilities: the table holds what it encodes."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from mining_run import Corpus, load_fake_embedder, model_folder, settings

from tests.conftest import picture
from unime_ray import prompts
from unime_ray.artifacts import Run
from unime_ray.corpus.payload import PayloadStore
from unime_ray.preflight import check_servers
from unime_ray.stages.embed import run_embed
from unime_ray.stages.judge import run_judge
from unime_ray.stages.retrieve import run_retrieve

KEY = "a-key-for-the-stub"


def encoded(whole: str) -> tuple[float, float]:
    """The log-probabilities of Yes and No that the stub gives a prompt."""
    yes = (hashlib.sha256(whole.encode()).digest()[0] + 1) / 258
    return math.log(yes), math.log(1 - yes)


class Stub(BaseHTTPRequestHandler):
    """Chat completions of one token; busy at every seventh request, and only for those who have the key."""

    asked: list[str] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != f"Bearer {KEY}":
            return self._answer(401, {"error": "no key"})
        whole = "".join(_shown(part) for part in body["messages"][-1]["content"])
        self.asked.append(whole)
        if len(self.asked) % 7 == 0:
            return self._answer(503, {"error": "busy"})
        yes, no = encoded(whole)
        top = [{"token": "Yes", "logprob": yes}, {"token": "No", "logprob": no}, {"token": "Maybe", "logprob": -30.0}]
        content = [{"token": "Yes", "logprob": yes, "top_logprobs": top}]
        return self._answer(200, {"choices": [{"logprobs": {"content": content}}]})

    def do_GET(self) -> None:
        self._answer(200, {"data": [{"id": "stub-judge"}]})

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def _shown(part: dict[str, Any]) -> str:
    """A part of a message as text; a picture as the hash of its bytes."""
    if part["type"] == "text":
        return part["text"]
    return mark(base64.b64decode(part["image_url"]["url"].partition(",")[2]))


def mark(data: bytes) -> str:
    return f"[{hashlib.sha256(data).hexdigest()}]"


@pytest.fixture
def server() -> Iterator[str]:
    Stub.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Stub) as stub:
        thread = threading.Thread(target=stub.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{stub.server_address[1]}/v1"
        stub.shutdown()
        thread.join()


def pictured_run(folder: Path) -> Run:
    """Queries with pictures and text answers, and the other way round."""
    corpus = Corpus()
    shown = [corpus.item(f"p{number}", picture((9 * number, 80, 10))) for number in range(6)]
    answers = [corpus.item(f"a{number}") for number in range(6)]
    for number in range(6):
        corpus.pair(shown[number] if number % 2 else answers[number], answers[number] if number % 2 else shown[number])
    corpus.pool(*answers, *shown)
    return corpus.save(folder)


@pytest.mark.usefixtures("ray_cluster")
def test_scores_are_what_the_server_encodes(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_STUB_KEY", KEY)
    run, folder = pictured_run(tmp_path / "run"), model_folder(tmp_path / "model")
    address = {"base_url": server, "api_key_env": "JUDGE_STUB_KEY", "concurrency": 4, "retry_seconds": 0.01}
    judge = {"engine": "openai", "model": "stub-judge", "server": address, "queries_per_batch": 3}
    config = settings(run, embed={"model": folder}, retrieve={"top_k": 5}, judges={"remote": judge})
    check_servers(run, config)
    run_embed(run, config, load=load_fake_embedder)
    run_retrieve(run, config)
    manifest = run_judge(run, config, "remote", load=load_with_key)
    rows = run.artifact("judgements", "remote").read().to_pylist()
    ids = sorted({row[key] for row in rows for key in ("query_id", "candidate_id")})
    store = PayloadStore(run.artifact("images").data_uri, run.artifact("items").data_uri)
    items = {item.item_id: item for item in store.items(ids)}
    assert len(rows) == 6 * 6 and manifest.counts["errors"] == 0
    for row in rows:
        query, candidate = items[row["query_id"]], items[row["candidate_id"]]
        sides = [one.rendered.replace(prompts.IMAGE_MARKER, mark(one.image or b"")) for one in (query, candidate)]
        yes, no = encoded(prompts.judge_prefix(sides[0]) + sides[1])
        assert row["logit_yes"] == pytest.approx(yes, abs=1e-6) and row["logit_no"] == pytest.approx(no, abs=1e-6)
        assert row["score"] == pytest.approx(math.exp(yes), abs=1e-6)
    assert len(Stub.asked) > len(rows)  # the busy answers were asked again
    assert KEY not in Path(run.artifact("judgements", "remote").child("manifest.json")).read_text()
    assert manifest.model == "stub-judge" and manifest.revision == "served"


def load_with_key(config: Any) -> Any:
    """Workers of the test cluster started before the key was set."""
    import os

    from unime_ray.stages.judge import load_scorer

    os.environ["JUDGE_STUB_KEY"] = "a-key-for-the-stub"
    return load_scorer(config)
