"""A judge behind any OpenAI-compatible server that returns log-probabilities: for those who already run one.

Each pair is one chat completion of a single token, its Yes and No read from `top_logprobs`. The server applies its own
chat template, tokenizer and image processor, so scores agree with the in-process engines only as far as these do.
Prefixes are shared if the server caches them: requests of one query are sent together. The key comes from an
environment variable; a config never holds it.
"""

from __future__ import annotations

import base64
import math
import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from unime_ray import prompts
from unime_ray.config_judge import ServerConfig
from unime_ray.corpus.images import decode
from unime_ray.errors import EngineDied, ModelError, RejectedRow
from unime_ray.models.items import Item
from unime_ray.models.judge import Group, Verdict

if TYPE_CHECKING:
    import httpx

UNIME_V2 = prompts.judge_prompt()
MIME_TYPES = ((b"\x89PNG", "image/png"), (b"\xff\xd8", "image/jpeg"), (b"GIF8", "image/gif"), (b"RIFF", "image/webp"))
CERTAIN = 6.9
"""An answer missing from `top_logprobs` that is at least so far below the other (e^6.9 = 1000) changes no score by more
than 0.001; its bound then stands for it."""
LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, as vLLM's server has it: logits in the tables are finite."""
REFUSED = (401, 403, 404)
MAX_ANSWER_BYTES = 2**20
MODELS_SHOWN = 5
BUSY = (408, 429, 500, 502, 503, 504)


class OpenAIJudge:
    """The judge protocol over HTTP."""

    def __init__(
        self,
        server: ServerConfig,
        model: str,
        *,
        prompt_order: str = "query_first",
        prompt: prompts.JudgePrompt = UNIME_V2,
        client: httpx.Client | None = None,
    ) -> None:
        """`model` is the name the server knows; `client` replaces the HTTP client, for proxies and tests.

        Raises:
            ModelError: httpx is not installed.
        """
        self.server, self.model, self.prompt_order, self.prompt = server, model, prompt_order, prompt
        self._client = client if client is not None else _client(server)

    def score(self, query: Item, candidates: Sequence[Item]) -> list[Verdict]:
        return self.score_groups([(query, candidates)])[0]

    def score_groups(self, groups: Sequence[Group]) -> list[list[Verdict]]:
        """Verdicts of many queries at once, `concurrency` requests in flight.

        Raises:
            ModelError: the server refuses the key or does not know the model, or returns no log-probabilities.
            EngineDied: the server does not answer, after all attempts.
        """
        parts = _Parts()
        pairs = [(query, candidate) for query, candidates in groups for candidate in candidates]
        with ThreadPoolExecutor(self.server.concurrency, thread_name_prefix="judge") as pool:
            verdicts = iter(list(pool.map(lambda pair: self._score(pair, parts), pairs)))
        return [[next(verdicts) for _ in candidates] for _, candidates in groups]

    def _score(self, pair: tuple[Item, Item], parts: _Parts) -> Verdict:
        query, candidate = pair
        first, second = (query, candidate) if self.prompt_order == "query_first" else (candidate, query)
        opening, ending = self.prompt.prefix(first.rendered, self.prompt_order), self.prompt.suffix(second.rendered)
        try:
            content = parts.of(opening, first) + parts.of(ending, second)
        except RejectedRow as reason:
            return Verdict.failed(reason.reason)
        return self._ask(content)

    def _ask(self, content: list[dict[str, Any]]) -> Verdict:
        system = self.prompt.system
        turns = [{"role": "system", "content": system}] if system is not None else []
        body = {
            "model": self.model,
            "messages": [*turns, {"role": "user", "content": content}],
            "max_tokens": 1,
            "temperature": 0.0,
            "logprobs": True,
            "top_logprobs": self.server.top_logprobs,
        }
        response = self._post(body)
        if response.status_code in REFUSED:
            raise ModelError(
                f"{self.server.base_url} answers {response.status_code} for model {self.model}: check "
                f"`base_url`, `model` and {_key_place(self.server)} ({_line(response.text)})"
            )
        if response.status_code != 200:
            return Verdict.failed(f"the server answered {response.status_code}: {_line(response.text)}")
        return self._read(_answer(response, self.server))

    def _post(self, body: dict[str, Any]) -> httpx.Response:
        """The response of the first attempt that gives one worth reading; the last one's if all were busy."""
        import httpx

        failure = "busy"
        for attempt in range(self.server.attempts):
            if attempt:  # spread, so that the requests of a pool do not come back all at once
                time.sleep(self.server.retry_seconds * 2 ** (attempt - 1) * random.uniform(0.5, 1.0))
            try:
                response = self._client.post("chat/completions", json=body)
            except httpx.TransportError as error:
                failure = f"{type(error).__name__}: {error}"
                continue
            if response.status_code not in BUSY:
                return response
            failure = f"status {response.status_code}: {_line(response.text)}"
        raise EngineDied(f"{self.server.base_url} did not answer in {self.server.attempts} attempts ({failure})")

    def _read(self, answer: dict[str, Any]) -> Verdict:
        try:
            top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            found = {str(entry["token"]): max(float(entry["logprob"]), LEAST_LOGPROB) for entry in top}
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ModelError(
                f"{self.server.base_url} returned no log-probabilities for model {self.model}: a judge needs a "
                "server that supports `top_logprobs`"
            ) from error
        if any(math.isnan(value) for value in found.values()):
            return Verdict.failed("the server gave no finite log-probabilities")
        yes, no = found.get(self.prompt.yes), found.get(self.prompt.no)
        floor = min(found.values(), default=0.0)
        if yes is not None and no is not None:
            return Verdict.of(yes, no)
        if yes is not None and yes - floor >= CERTAIN:
            return Verdict.of(yes, floor)
        if no is not None and no - floor >= CERTAIN:
            return Verdict.of(floor, no)
        missing = [word for word, value in ((self.prompt.yes, yes), (self.prompt.no, no)) if value is None]
        return Verdict.failed(f"{' and '.join(missing)} not among the server's {len(found)} most likely tokens")


class _Parts:
    """Message parts of items; each picture is checked and encoded once."""

    def __init__(self) -> None:
        self._pictures: dict[bytes, str | RejectedRow] = {}

    def of(self, text: str, item: Item) -> list[dict[str, Any]]:
        """`text` with `item`'s picture at its marker.

        Raises:
            RejectedRow: the picture does not decode, or marker and picture do not go together.
        """
        pieces = text.split(prompts.IMAGE_MARKER)
        if len(pieces) != (1 if item.image is None else 2):
            raise RejectedRow(f"the text has {len(pieces) - 1} image markers; the item's picture needs exactly its own")
        if item.image is None:
            return [_text(text)]
        picture = {"type": "image_url", "image_url": {"url": self._url(item.item_id, item.image)}}
        return [part for part in (_text(pieces[0]), picture, _text(pieces[1])) if part.get("text") != ""]

    def _url(self, key: bytes, data: bytes) -> str:
        if key not in self._pictures:
            self._pictures[key] = _data_url(data)
        found = self._pictures[key]
        if isinstance(found, RejectedRow):
            raise found
        return found


def _data_url(data: bytes) -> str | RejectedRow:
    try:
        decode(data)
    except RejectedRow as reason:
        return reason
    mime = next((name for start, name in MIME_TYPES if data.startswith(start)), "application/octet-stream")
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _client(server: ServerConfig) -> httpx.Client:
    try:
        import httpx
    except ModuleNotFoundError as error:
        raise ModelError("engine openai needs httpx: pip install httpx") from error
    return httpx.Client(
        base_url=server.base_url.rstrip("/") + "/",
        headers=_headers(server),
        timeout=server.timeout,
        limits=httpx.Limits(max_connections=server.concurrency),
    )


def _headers(server: ServerConfig) -> dict[str, str]:
    if server.api_key_env is None:
        return {}
    key = os.environ.get(server.api_key_env)
    if not key:
        raise ModelError(f"the environment variable {server.api_key_env} (server.api_key_env) is not set on this node")
    return {"Authorization": f"Bearer {key}"}


def _key_place(server: ServerConfig) -> str:
    return f"the key in ${server.api_key_env}" if server.api_key_env else "`server.api_key_env` (no key was sent)"


def _answer(response: httpx.Response, server: ServerConfig) -> dict[str, Any]:
    if len(response.content) > MAX_ANSWER_BYTES:
        raise ModelError(f"{server.base_url} answered {len(response.content)} bytes to a request for one token")
    try:
        return dict(response.json())
    except (ValueError, TypeError) as error:
        raise ModelError(f"{server.base_url} answered 200 without a JSON object: {_line(response.text)}") from error


def check_server(server: ServerConfig, model: str, client: httpx.Client | None = None) -> None:
    """Ask the server for its models, once.

    A server without such a list passes: the first pair then tells.

    Raises:
        ModelError: the key's variable is not set, the server does not answer or refuses the key, or does not have
            `model`.
    """
    asked = client if client is not None else _client(server)
    import httpx

    try:
        response = asked.get("models")
    except httpx.TransportError as error:
        raise ModelError(f"{server.base_url} does not answer: {type(error).__name__}: {_line(str(error))}") from error
    if response.status_code in (401, 403):
        raise ModelError(f"{server.base_url} answers {response.status_code}: check {_key_place(server)}")
    if response.status_code != 200:
        return
    names = _model_names(response)
    if names and model not in names:
        raise ModelError(f"{server.base_url} has no model {model!r}; it has {', '.join(sorted(names)[:MODELS_SHOWN])}")


def _model_names(response: httpx.Response) -> set[str]:
    try:
        return {str(entry["id"]) for entry in response.json()["data"]}
    except (ValueError, KeyError, TypeError):
        return set()


def _line(text: str) -> str:
    return " ".join(text.split())[:200]
