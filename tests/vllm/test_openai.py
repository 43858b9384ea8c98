"""The judge behind a server that returns log-probabilities; the server is a function."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.unit.models_fixtures import make_item, picture
from unime_ray import prompts
from unime_ray.config import JudgeConfig, RunConfig
from unime_ray.config_judge import ServerConfig
from unime_ray.errors import EngineDied, ModelError
from unime_ray.models.judge import load_judge
from unime_ray.models.judge_openai import OpenAIJudge, check_server

SERVER = ServerConfig(base_url="http://judge.test/v1", concurrency=2, attempts=3, retry_seconds=0.0)


def client_of(answer: Any) -> Any:
    httpx = pytest.importorskip("httpx", reason="engine openai needs httpx")
    return httpx.Client(base_url="http://judge.test/v1/", transport=httpx.MockTransport(answer))


def openai_judge(answer: Any, **settings: Any) -> OpenAIJudge:
    return OpenAIJudge(SERVER, "some-judge", client=client_of(answer), **settings)


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
    with pytest.raises(ModelError, match="401 for model some-judge.*no key was sent"):
        openai_judge(lambda request: httpx.Response(401)).score(item, [item])
    with pytest.raises(ModelError, match="no log-probabilities"):
        openai_judge(lambda request: httpx.Response(200, json={"choices": [{}]})).score(item, [item])
    for text in ("<html>", "[1, 2]"):
        with pytest.raises(ModelError, match="without a JSON object"):
            openai_judge(lambda request: httpx.Response(200, text=text)).score(item, [item])  # noqa: B023


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "null", '"much"'])
def test_a_log_probability_that_is_no_number_becomes_no_score(value: str) -> None:
    httpx = pytest.importorskip("httpx")
    text = json.dumps(completion(Yes=-0.1, No=-7.5)).replace("-7.5", value)
    judge, item = openai_judge(lambda request: httpx.Response(200, text=text)), make_item("a")
    if value in ("null", '"much"'):
        with pytest.raises(ModelError, match="returned no log-probabilities"):
            judge.score(item, [item])
        return
    (verdict,) = judge.score(item, [item])
    assert verdict.score == (1.0 if value == "-Infinity" else None) and (verdict.logit_no or 0) >= -9999


def test_a_yes_no_scorer_is_asked_with_its_own_prompt() -> None:
    httpx = pytest.importorskip("httpx")
    asked: list[Any] = []

    def answer(request: Any) -> Any:
        asked.append(json.loads(request.content)["messages"])
        return httpx.Response(200, json=completion(yes=-0.2, no=-1.7, Yes=-9.0))

    prompt = prompts.judge_prompt("qwen3_vl_reranker", "Find the animal.")
    query, candidate = make_item("look", picture(1)), make_item("a fox")
    (verdict,) = openai_judge(answer, prompt=prompt).score(query, [candidate])
    assert verdict.score == pytest.approx(1 / (1 + 2.718281828 ** (-1.5)))
    ((system, user),) = asked
    assert system == {"role": "system", "content": prompts.RERANKER_SYSTEM}
    opening, shown, middle, last = user["content"]
    assert opening["text"] == "<Instruct>: Find the animal.<Query>:" and shown["type"] == "image_url"
    assert (middle["text"], last["text"]) == ("look\n<Document>:", "a fox")


def test_the_server_is_asked_for_its_models_before_work_starts() -> None:
    httpx = pytest.importorskip("httpx")
    listed = httpx.Response(200, json={"data": [{"id": "other"}, {"id": "some-judge"}]})
    check_server(SERVER, "some-judge", client_of(lambda request: listed))
    check_server(SERVER, "some-judge", client_of(lambda request: httpx.Response(404)))
    with pytest.raises(ModelError, match="no model 'another'; it has other, some-judge"):
        check_server(SERVER, "another", client_of(lambda request: listed))
    with pytest.raises(ModelError, match="answers 401: check `server.api_key_env`"):
        check_server(SERVER, "some-judge", client_of(lambda request: httpx.Response(401)))

    def refuse(request: Any) -> Any:
        raise httpx.ConnectError("connection refused")

    with pytest.raises(ModelError, match="does not answer: ConnectError"):
        check_server(SERVER, "some-judge", client_of(refuse))


def test_the_key_comes_from_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("httpx")
    config = JudgeConfig(engine="openai", model="m", server=SERVER.model_copy(update={"api_key_env": "JUDGE_TEST_KEY"}))
    monkeypatch.delenv("JUDGE_TEST_KEY", raising=False)
    with pytest.raises(ModelError, match=r"variable JUDGE_TEST_KEY \(server.api_key_env\) is not set"):
        load_judge(config)
    monkeypatch.setenv("JUDGE_TEST_KEY", "s3cret")
    judge = load_judge(config)
    assert isinstance(judge, OpenAIJudge) and judge._client.headers["authorization"] == "Bearer s3cret"
    assert "s3cret" not in RunConfig(judges={"j": config}).model_dump_json()


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"engine": "openai"}, "needs `server"),
        ({"server": {"base_url": "http://x/v1"}}, "`server` is for engine `openai`"),
        ({"engine": "openai", "server": {"base_url": "x/v1"}}, "base_url must be an address"),
        ({"engine": "openai", "server": {"base_url": "http://me:pw@x/v1"}}, "which the manifest would show"),
        ({"engine": "openai", "server": {"base_url": "http://x/v1", "api_key_env": "sk-123"}}, "not the key itself"),
        ({"engine": "openai", "server": {"base_url": "http://x"}, "repetition_penalty": 1.05}, "needs logits"),
        ({"calibration_labels": "x.csv"}, "without a calibration"),
        ({"instruction": "Find it."}, "`instruction` is for prompt `qwen3_vl_reranker`"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(section: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        JudgeConfig.model_validate(section)
