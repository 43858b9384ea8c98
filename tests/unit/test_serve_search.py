"""Deadlines, degradation and the breaker: a search is answered, refused or told to retry, and never hangs."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.unit.serve_fixtures import (
    FakeEncoder,
    FakeReranker,
    LocalRetriever,
    filled_engine,
    make_bundle,
    make_run,
    vector_of,
)
from unime_ray.config_serve import LimitsConfig, ServeConfig
from unime_ray.corpus.payload import Item
from unime_ray.serve.breaker import Breaker
from unime_ray.serve.catalog import Wanted
from unime_ray.serve.errors import StageDown, StageFailed, StageLate, StageOverloaded
from unime_ray.serve.metrics import NoMeter
from unime_ray.serve.retriever import RetrieverEngine
from unime_ray.serve.schemas import SearchAnswer, SearchRequest
from unime_ray.serve.search import Searcher, ranked
from unime_ray.serve.tasks import caption, opening

LIMITS = LimitsConfig(deadline_ms=2000, rerank_budget_ms=100)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> RetrieverEngine:
    return filled_engine(make_bundle(make_run(tmp_path_factory.mktemp("search") / "run")))


class Counting(NoMeter):
    def __init__(self) -> None:
        self.reasons: list[str] = []

    def degraded(self, reason: str) -> None:
        self.reasons.append(reason)


def searcher(engine: RetrieverEngine, **stages: object) -> Searcher:
    encoder, reranker = stages.get("encoder", FakeEncoder()), stages.get("reranker", FakeReranker())
    retriever = stages.get("retriever", LocalRetriever(engine))
    return Searcher(encoder, retriever, reranker, [], ServeConfig(limits=LIMITS), "r", Counting())  # type: ignore[arg-type]


def ask(one: Searcher, **body: object) -> SearchAnswer:
    return asyncio.run(one.search(SearchRequest.model_validate({"text": "red", **body}), "id"))


@pytest.mark.parametrize(
    ("reranker", "reason"),
    [
        (FakeReranker(delay=5.0), "late"),
        (FakeReranker(failure=StageOverloaded("reranker")), "overloaded"),
        (FakeReranker(failure=StageDown("reranker")), "down"),
    ],
)
def test_a_failing_reranker_degrades_the_search(engine: RetrieverEngine, reranker: FakeReranker, reason: str) -> None:
    one = searcher(engine, reranker=reranker)
    started = time.monotonic()
    answer = ask(one, k=5)
    assert time.monotonic() - started < 1.5, "it waits for the budget of the reranker, not for the reranker"
    assert (answer.degraded, answer.degraded_reason, answer.reranked, answer.reranker) == (True, reason, False, None)
    assert [hit.retrieval_rank for hit in answer.results] == [1, 2, 3, 4, 5]
    assert one.meter.reasons == [reason]  # type: ignore[attr-defined]


def test_rerank_off_is_not_degraded(engine: RetrieverEngine) -> None:
    answer = ask(searcher(engine, reranker=FakeReranker(failure=StageDown("reranker"))), rerank=False)
    assert not answer.degraded and not answer.reranked


@pytest.mark.parametrize(
    ("failure", "status", "retry"),
    [(StageOverloaded("encoder"), 429, "1"), (StageDown("encoder"), 503, "1"), (StageLate("encoder"), 504, None)],
)
def test_a_failing_encoder_fails_the_search(
    engine: RetrieverEngine, failure: StageFailed, status: int, retry: str | None
) -> None:
    for stages in ({"encoder": FakeEncoder(failure=failure)}, {"retriever": LocalRetriever(engine, failure)}):
        with pytest.raises(StageFailed) as caught:
            ask(searcher(engine, **stages))
        error = caught.value.as_api_error()
        assert error.status == status and error.headers().get("Retry-After") == retry


def test_the_deadline_of_the_request_counts(engine: RetrieverEngine) -> None:
    one = searcher(engine, encoder=FakeEncoder(delay=5.0))
    started = time.monotonic()
    with pytest.raises(StageLate):
        ask(one, deadline_ms=80)
    assert time.monotonic() - started < 1.5


def test_a_reranker_that_keeps_failing_is_left_alone(engine: RetrieverEngine) -> None:
    reranker = FakeReranker(delay=5.0)
    one = searcher(engine, reranker=reranker)
    for _ in range(6):
        assert ask(one).degraded
    assert reranker.calls == 3, "after three failures it is only probed every two seconds"
    reranker.delay = 0.0
    one.breaker._next_probe = 0.0
    assert not ask(one).degraded and not ask(one).degraded


def test_breaker_probes_and_closes() -> None:
    now = [0.0]
    breaker = Breaker(failures=2, cooldown=10, clock=lambda: now[0])
    breaker.failed()
    assert breaker.allows() and not breaker.open
    breaker.failed()
    assert breaker.open and not breaker.allows()
    now[0] = 11
    assert breaker.allows() and not breaker.allows(), "one probe, not two"
    breaker.succeeded()
    assert breaker.allows() and not breaker.open


def test_unscored_candidates_follow_the_scored(engine: RetrieverEngine) -> None:
    red = vector_of(Item(bytes(16), "red", "red", None, None))
    hits = engine.search(red[None], [4], [Wanted()])[0]
    order = [hit.retrieval_rank for hit in ranked(hits, [0.1, None, 0.7])]
    assert order == [3, 1, 2, 4]
    assert [hit.retrieval_rank for hit in ranked(hits, [0.5, 0.5])] == [1, 2, 3, 4], "ties keep the retrieval order"


def test_the_opening_that_queries_share() -> None:
    assert opening(["Find the color: red", "Find the color: rose", "Find the color: blue"]) == "Find the color:"
    assert opening(["Find the color: red", "Find the color: rose"]) == "Find the color:"
    assert opening(["who was it", "who were they"]) == "", "one shared word is chance"
    assert opening(["Say what this is.", "Say what this is."]) == "Say what this is."
    assert opening(["", "Find the color red"]) == ""


def test_captions_leave_the_instruction_out() -> None:
    assert caption("Represent the picture.", ["Represent the picture."]) is None
    assert caption("Represent the picture. A cat", ["Represent the picture.", ""]) == "A cat"
    assert caption("A cat", []) == "A cat" and caption(None, ["x"]) is None
