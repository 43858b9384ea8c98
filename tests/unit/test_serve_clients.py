"""The official clients of OpenAI and Cohere against the graph's interface; they are used where they are installed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from tests.conftest import picture
from tests.unit.serve_fixtures import (
    FakeEncoder,
    FakeReranker,
    LocalRetriever,
    data_url,
    filled_engine,
    listening,
    make_bundle,
    make_run,
)
from unime_ray.serve.app import Stages, build_app
from unime_ray.serve.gate import key_digests
from unime_ray.serve.metrics import NoMeter

MODEL = "colors-embedder"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The interface over stages without models, with the API key `secret`."""
    bundle = make_bundle(make_run(tmp_path_factory.mktemp("clients") / "run"))
    stages = Stages(FakeEncoder(), LocalRetriever(filled_engine(bundle)), FakeReranker())
    app = build_app(bundle, stages, [], {}, NoMeter(), key_digests("secret"))
    with listening(app) as url:
        yield url


def test_openai_embeddings(address: str) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0)
    packed = client.embeddings.create(model=MODEL, input=["a", "b"])
    plain = client.embeddings.create(model=MODEL, input="b", encoding_format="float", dimensions=8)
    whole = np.array(packed.data[1].embedding)
    assert len(packed.data) == 2 and len(whole) == 16
    np.testing.assert_allclose(plain.data[0].embedding, whole[:8] / np.linalg.norm(whole[:8]), rtol=1e-5)
    assert {model.id for model in client.models.list()} == {MODEL, "colors-reranker"}
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.embeddings.create(model="other", input="a")
    with pytest.raises(openai.UnprocessableEntityError, match=r"input\[1\]"):
        client.embeddings.create(model=MODEL, input=["a", ""])
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0).models.list()


def test_openai_takes_pictures(address: str) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0)
    shown = client.embeddings.create(model=MODEL, input=[{"image": data_url(picture("red"))}, "the color red"])
    np.testing.assert_allclose(shown.data[0].embedding, shown.data[1].embedding)


@pytest.mark.parametrize("version", ["Client", "ClientV2"])
def test_cohere_rerank(address: str, version: str) -> None:
    cohere = pytest.importorskip("cohere")
    client = getattr(cohere, version)(api_key="secret", base_url=address)
    answer = client.rerank(model="colors-reranker", query="q", documents=["a", "b", "c"], top_n=2)
    assert [result.index for result in answer.results] == [2, 1]
    assert answer.results[0].relevance_score == pytest.approx(0.5)
