"""What can go wrong with a request, and the one JSON shape it is told in (OpenAI's).

    {"error": {"message": ..., "type": ..., "param": the field or null, "code": ..., "request_id": ...}}

Stages fail in three ways, whatever the engine beneath: late, overloaded or down. A failing reranker degrades a search;
a failing encoder or retriever fails it.
"""

from __future__ import annotations

import math

from unime_ray.errors import UnimeError

RETRY_AFTER_SECONDS = 1.0


class ApiError(UnimeError):
    """A request that cannot be answered: HTTP status, machine-readable code and the field it is about."""

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.retry_after = retry_after

    def body(self, request_id: str) -> dict[str, dict[str, str | None]]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, kind)
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error | {"request_id": request_id}}

    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(math.ceil(self.retry_after))}


def invalid(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """422: the field `param` cannot be used."""
    return ApiError(422, code, f"{param}: {message}", param)


class StageFailed(UnimeError):
    """A stage did not answer. `reason` is `late`, `overloaded` or `down`."""

    reason = "down"

    def __init__(self, stage: str, detail: str = "") -> None:
        super().__init__(f"{stage} is {self.reason}{f': {detail}' if detail else ''}")
        self.stage = stage

    def as_api_error(self) -> ApiError:
        return ApiError(503, "stage_down", f"{self}; try again shortly", None, RETRY_AFTER_SECONDS)


class StageLate(StageFailed):
    reason = "late"

    def as_api_error(self) -> ApiError:
        return ApiError(504, "deadline_exceeded", f"{self}; raise `deadline_ms` or try again", "deadline_ms")


class StageOverloaded(StageFailed):
    reason = "overloaded"

    def as_api_error(self) -> ApiError:
        return ApiError(429, "overloaded", f"{self}; retry after a moment", None, RETRY_AFTER_SECONDS)


class StageDown(StageFailed):
    reason = "down"


class StageBroke(StageDown):
    """It raised an error: its code, or something in the request, is at fault."""
