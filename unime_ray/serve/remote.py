"""The stages as Ray Serve deployments: calls through handles, bounded by the request's deadline.

A replica that dies under a call is no failed request: the call goes to another, for as long as there is time. That is
right for reads and for writes alike, since writing the same item twice is writing it once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from unime_ray.config_serve import StageConfig
from unime_ray.corpus.payload import Item
from unime_ray.serve.agree import OtherRevision
from unime_ray.serve.catalog import Found, Ref, Wanted
from unime_ray.serve.coalesce import Coalescer
from unime_ray.serve.deadline import Deadline
from unime_ray.serve.errors import StageBroke, StageDown, StageLate, StageOverloaded
from unime_ray.serve.metrics import Meter
from unime_ray.serve.stages import Encoded, IndexState, NewItem, Page

log = logging.getLogger("ray.serve.unime")
RETRY_SECONDS = 0.05


async def call(handle: DeploymentHandle, stage: str, method: str, *arguments: Any, deadline: Deadline) -> Any:
    """The answer of one replica.

    Raises:
        StageLate: none by the deadline.
        StageOverloaded: the deployment's queue is full.
        StageDown: the deployment is unavailable; StageBroke: the replica raised.
    """
    while True:
        left = deadline.left()
        if left <= 0:
            raise StageLate(stage)
        response = getattr(handle, method).remote(*arguments)
        try:
            return await asyncio.wait_for(response, left)
        except TimeoutError as error:
            response.cancel()
            raise StageLate(stage) from error
        except BackPressureError as error:
            raise StageOverloaded(stage) from error
        except RayTaskError as error:
            if not isinstance(error, RayActorError):
                log.error("%s raised in %s", stage, method, exc_info=error)
                raise StageBroke(stage, "it raised an error") from error
            await asyncio.sleep(RETRY_SECONDS)
        except RayActorError:
            await asyncio.sleep(RETRY_SECONDS)
        except RayServeException as error:
            raise StageDown(stage, str(error)) from error


class RemoteEncoder:
    def __init__(self, handle: DeploymentHandle, config: StageConfig, meter: Meter | None = None) -> None:
        self.handle = handle
        self._embed = Coalescer("encoder", self._send, config, meter)

    async def embed(self, items: Sequence[Item], deadline: Deadline, revision: str | None = None) -> Encoded:
        return _in_time("encoder", await self._embed.ask((list(items), revision, deadline), deadline))

    async def _send(self, calls: list[Any], deadline: Deadline) -> Sequence[Any]:
        return await call(self.handle, "encoder", "embed", calls, deadline=deadline)


class RemoteRetriever:
    def __init__(self, handle: DeploymentHandle, config: StageConfig, meter: Meter | None = None) -> None:
        self.handle = handle
        self._search = Coalescer("retriever", self._send, config, meter)

    async def search(
        self, vector_D: np.ndarray, revision: str, k: int, wanted: Wanted, deadline: Deadline
    ) -> list[tuple[Found, Item]]:
        return _same_model(await self._search.ask((vector_D, revision, k, wanted), deadline))

    async def _send(self, calls: list[Any], deadline: Deadline) -> Sequence[Any]:
        return await self._call("search", calls, deadline=deadline)

    async def write(
        self, items: Sequence[NewItem], vectors_ND: np.ndarray, revision: str, deadline: Deadline
    ) -> tuple[list[str], int]:
        return _same_model(await self._call("write", list(items), vectors_ND, revision, deadline=deadline))

    async def delete(self, name: str, deadline: Deadline) -> int | None:
        return await self._call("delete", name, deadline=deadline)

    async def get(self, name: str, deadline: Deadline) -> tuple[Ref, Item] | None:
        return await self._call("get", name, deadline=deadline)

    async def page(self, start: int, limit: int, wanted: Wanted, deadline: Deadline) -> Page:
        return await self._call("page", start, limit, wanted, deadline=deadline)

    async def picture(self, name: str, deadline: Deadline) -> tuple[bytes, bytes] | None:
        return await self._call("picture", name, deadline=deadline)

    async def state(self, deadline: Deadline) -> IndexState:
        return await self._call("state", deadline=deadline)

    async def _call(self, method: str, *arguments: Any, deadline: Deadline) -> Any:
        return await call(self.handle, "retriever", method, *arguments, deadline=deadline)


class RemoteReranker:
    def __init__(self, handle: DeploymentHandle, config: StageConfig, meter: Meter | None = None) -> None:
        self.handle = handle
        self._score_many = Coalescer("reranker", self._send, config, meter)

    async def rerank_refs(self, query: Item, refs: Sequence[Ref], deadline: Deadline) -> list[float | None]:
        return await self._score(query, list(refs), "listwise", deadline)

    async def rerank_items(
        self, query: Item, items: Sequence[Item], mode: str, deadline: Deadline
    ) -> list[float | None]:
        return await self._score(query, list(items), mode, deadline)

    async def _score(
        self, query: Item, candidates: list[Ref] | list[Item], mode: str, deadline: Deadline
    ) -> list[float | None]:
        return _in_time("reranker", await self._score_many.ask((query, candidates, mode, deadline), deadline))

    async def _send(self, calls: list[Any], deadline: Deadline) -> Sequence[Any]:
        return await call(self.handle, "reranker", "score", calls, deadline=deadline)


def _in_time(stage: str, answer: Any) -> Any:
    """`answer`, unless the deadline passed before its turn came (None)."""
    if answer is None:
        raise StageLate(stage)
    return answer


def _same_model(answer: Any) -> Any:
    """`answer`, unless it is the name of the revision the index holds instead."""
    if isinstance(answer, str):
        raise OtherRevision(answer)
    return answer
