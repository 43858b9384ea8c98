"""The judge behind a server that returns log-probabilities; the server is a function."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.unit.models_fixtures import make_item, picture
from unime_ray import prompts
from unime_ray.errors import EngineDied, ModelError
from unime_ray.models.judge_openai import OpenAIJudge, OpenAIServer

SERVER = OpenAIServer("http://judge.test/v1", "some-judge", concurrency=2, attempts=3, retry_seconds=0.0)


def openai_judge(answer: Any, **settings: Any) -> OpenAIJudge:
    httpx = pytest.importorskip("httpx", reason="engine openai needs httpx")
    client = httpx.Client(base_url="http://judge.test/v1/", transport=httpx.MockTransport(answer))
    return OpenAIJudge(SERVER, client=client, **settings)


def completion(**logprobs: float) -> dict[str, Any]:
    top = [{"token": token, "logprob": value} for token, value in logprobs.items()]
    return {"choices": [{"logprobs": {"content": [{"token": "Yes", "logprob": 0, "top_logprobs": top}]}}]}


def test_a_server_is_asked_for_one_token_with_the_published_prompt() -> None:
    httpx = pytest.importorskip("httpx")
    asked: list[Any] = []

    def answer(request: Any) -> Any:
        asked.append((request.url.path, json.loads(request.content)))
        return httpx.Response(200, json=completion(Yes=-0.1, No=-2.4))

    image = picture(1)
    query, candidate = make_item("look", image), make_item("a fox")
    (verdict,) = openai_judge(answer).score(query, [candidate])
    assert verdict.score == pytest.approx(1 / (1 + 2.718281828 ** (-2.3))) and verdict.error is None
    ((path, body),) = asked
    assert path == "/v1/chat/completions" and body["max_tokens"] == 1 and body["logprobs"] is True
    before, shown, after, other = body["messages"][0]["content"]
    whole = before["text"] + prompts.IMAGE_MARKER + after["text"] + other["text"]
    assert whole == prompts.judge_prefix(query.rendered) + candidate.rendered
    assert shown["image_url"]["url"].startswith("data:image/png;base64,")


def test_a_servers_failures_stay_with_their_pair() -> None:
    httpx = pytest.importorskip("httpx")

    def answer(request: Any) -> Any:
        text = json.loads(request.content)["messages"][0]["content"][-1]["text"]
        if text == "long":
            return httpx.Response(400, text="prompt is too long")
        return httpx.Response(200, json=completion(Yes=-0.01, other=-9.0) if text == "sure" else completion(Yes=-1.0))

    items = [make_item(name) for name in ("long", "sure", "unsure")] + [make_item(None, b"GIF89a")]
    verdicts = openai_judge(answer).score(make_item("q"), items)
    assert "too long" in (verdicts[0].error or "")
    assert verdicts[1].error is None and (verdicts[1].score or 0) > 0.999
    assert "No not among" in (verdicts[2].error or "")
    assert "picture" in (verdicts[3].error or "")


def test_a_server_that_is_busy_is_asked_again_and_one_that_refuses_is_not() -> None:
    httpx = pytest.importorskip("httpx")
    answers = [httpx.Response(503), httpx.Response(429), httpx.Response(200, json=completion(Yes=-1.0, No=-1.0))]
    item = make_item("a")
    assert openai_judge(lambda request: answers.pop(0)).score(item, [item])[0].score == pytest.approx(0.5)
    with pytest.raises(EngineDied, match="3 attempts"):
        openai_judge(lambda request: httpx.Response(503)).score(item, [item])
    with pytest.raises(ModelError, match="OPENAI_API_KEY"):
        openai_judge(lambda request: httpx.Response(401)).score(item, [item])
    with pytest.raises(ModelError, match="no log-probabilities"):
        openai_judge(lambda request: httpx.Response(200, json={"choices": [{}]})).score(item, [item])
    with pytest.raises(ModelError, match="repetition_penalty"):
        openai_judge(lambda request: httpx.Response(200), repetition_penalty=1.05)
