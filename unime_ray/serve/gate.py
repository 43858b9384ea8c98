"""What every request passes: its id, who may ask, how much may come in, how many at once; then a line in the log.

Pure ASGI, outermost, so that whatever happens inside is answered in the one JSON shape.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Iterable
from typing import Any

from unime_ray.config_serve import LimitsConfig
from unime_ray.serve.errors import RETRY_AFTER_SECONDS, ApiError
from unime_ray.serve.metrics import Meter

log = logging.getLogger("ray.serve.unime")

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/openapi.json", "/favicon.ico"})
PORT = re.compile(r":\d*$")
REQUEST_ID = re.compile(r"[\w.:-]{1,100}", re.ASCII)
SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
)
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
Scope = dict[str, Any]


def key_digests(keys: str) -> tuple[bytes, ...]:
    """Digests of comma-separated API keys: replicas get these, never the keys."""
    return tuple(_digest(key.strip()) for key in keys.split(",") if key.strip())


class Gate:
    """ASGI middleware. `digests` empty: no key is asked for. `hosts` None: any Host header is taken."""

    def __init__(
        self,
        app: Any,
        limits: LimitsConfig,
        meter: Meter,
        digests: Iterable[bytes] = (),
        hosts: Iterable[str] | None = None,
    ) -> None:
        self.app, self.limits, self.meter = app, limits, meter
        self.digests = tuple(digests)
        self.hosts = None if hosts is None else frozenset(hosts)
        self.in_flight = 0

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        request_id = _request_id(headers.get(b"x-request-id", b""))
        scope.setdefault("state", {})["request_id"] = request_id
        started, status = time.perf_counter(), 500

        async def tagged(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = [(b"x-request-id", request_id.encode()), *SECURITY_HEADERS]
                message = message | {"headers": [*message.get("headers", []), *extra]}
            await send(message)

        self.in_flight += 1
        try:
            await self._admit(scope, headers, receive, tagged, request_id)
        finally:
            self.in_flight -= 1
            self._record(scope, request_id, status, (time.perf_counter() - started) * 1000)

    async def _admit(self, scope: Scope, headers: dict[bytes, bytes], receive: Any, send: Any, request_id: str) -> None:
        try:
            self._check(scope, headers)
            body = await self._body(scope, headers, receive)
        except ApiError as error:
            await _answer(send, error, request_id)
            return
        sent = False

        async def replay() -> dict[str, Any]:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        host = PORT.sub("", headers.get(b"host", b"").decode("latin-1")).lower()
        if self.hosts is not None and host not in self.hosts:
            raise ApiError(421, "wrong_host", f"host: this server does not answer for {host!r}", "host")
        if scope["path"] not in OPEN_PATHS:
            self._check_key(headers)
        if scope["path"] not in OPEN_PATHS and self.in_flight > self.limits.max_in_flight:
            reason = f"{self.limits.max_in_flight} requests are under way; retry after a moment"
            raise ApiError(429, "overloaded", reason, None, RETRY_AFTER_SECONDS)

    def _check_key(self, headers: dict[bytes, bytes]) -> None:
        if not self.digests:
            return
        scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        given = _digest(key.strip())
        # Every key is compared, in constant time each.
        known = sum(hmac.compare_digest(given, digest) for digest in self.digests)
        if scheme.lower() != "bearer" or not known:
            raise ApiError(401, "invalid_api_key", "authorization: send `Authorization: Bearer <key>`", "authorization")

    async def _body(self, scope: Scope, headers: dict[bytes, bytes], receive: Any) -> bytes:
        # Nobody has shown a key there, and nothing there takes a body.
        limit = 0 if scope["path"] in OPEN_PATHS else self.limits.max_request_bytes
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit:
            raise _too_large(limit)
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > limit:
                raise _too_large(limit)
            more = message.get("more_body", False)
        kind = headers.get(b"content-type", b"").decode("latin-1").split(";")[0].strip().lower()
        if size and kind != "application/json":
            # Also what keeps other sites' forms from writing: JSON from elsewhere needs a CORS preflight.
            raise ApiError(415, "not_json", f"content-type: {kind!r}; send application/json", "content-type")
        return b"".join(parts)

    def _record(self, scope: Scope, request_id: str, status: int, milliseconds: float) -> None:
        route = getattr(scope.get("route"), "path", None) or "other"
        self.meter.request(route, status, milliseconds)
        line = {"request_id": request_id, "method": scope["method"], "path": scope["path"], "status": status}
        log.info(json.dumps(line | {"ms": round(milliseconds, 1)}))


async def _answer(send: Any, error: ApiError, request_id: str) -> None:
    body = json.dumps(error.body(request_id)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in error.headers().items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _too_large(limit: int) -> ApiError:
    return ApiError(413, "request_too_large", f"body: a request may have {limit} bytes", "body")


def _request_id(given: bytes) -> str:
    text = given.decode("latin-1")
    return text if REQUEST_ID.fullmatch(text) else uuid.uuid4().hex


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
