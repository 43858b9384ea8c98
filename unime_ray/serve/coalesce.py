"""Puts calls that arrive together, or while others are under way, into one: a stage is asked once for many requests.

Between processes a call costs more than a small model's share of a batch, so the batch is made before the hop, not
behind it. Nothing waits for company longer than `wait_seconds`: while `limit` batches are under way, the next fills by
itself.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from unime_ray.config_serve import StageConfig
from unime_ray.serve.deadline import Deadline
from unime_ray.serve.errors import StageBroke, StageDown, StageFailed, StageLate, StageOverloaded
from unime_ray.serve.metrics import Meter, NoMeter

BATCHES_PER_REPLICA = 2
"""One that computes and one that waits for its turn."""
Send = Callable[[list[Any], Deadline], Awaitable[Sequence[Any]]]


@dataclass(eq=False, slots=True)
class _Call:
    request: Any
    deadline: Deadline
    answer: asyncio.Future[Any]


class Coalescer:
    """`send(requests, deadline)` gives one answer per request, in order, or raises StageFailed for all of them."""

    def __init__(self, stage: str, send: Send, config: StageConfig, meter: Meter | None = None) -> None:
        self.stage, self.send, self.meter = stage, send, meter or NoMeter()
        self.max_batch, self.max_waiting = config.max_batch, config.max_queued
        self.wait_seconds = config.batch_wait_ms / 1000
        per_replica = BATCHES_PER_REPLICA if config.max_batch > 1 else config.max_ongoing
        self.limit = per_replica * config.max_replicas
        self._waiting: deque[_Call] = deque()
        self._under_way: set[asyncio.Task[None]] = set()

    async def ask(self, request: Any, deadline: Deadline) -> Any:
        """The answer to one request.

        Raises:
            StageOverloaded: `max_queued` calls wait already.
            StageLate: no answer by the deadline.
            StageFailed: as `send` raised it.
        """
        if len(self._waiting) >= self.max_waiting:
            raise StageOverloaded(self.stage)
        loop = asyncio.get_running_loop()
        call = _Call(request, deadline, loop.create_future())
        self._waiting.append(call)
        if len(self._waiting) == 1:
            # Not at once: what else arrives in this turn of the loop comes along.
            loop.call_later(self.wait_seconds, self._start)
        elif len(self._waiting) >= self.max_batch:
            self._start()
        try:
            return await asyncio.wait_for(call.answer, max(deadline.left(), 0))
        except TimeoutError as error:
            raise StageLate(self.stage) from error

    def _start(self) -> None:
        while self._waiting and len(self._under_way) < self.limit:
            batch = self._next_batch()
            if batch:
                task = asyncio.get_running_loop().create_task(self._run(batch))
                self._under_way.add(task)
                task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        self._start()

    def _next_batch(self) -> list[_Call]:
        """Calls in the order they came; those whose callers have left are dropped."""
        batch: list[_Call] = []
        while self._waiting and len(batch) < self.max_batch:
            call = self._waiting.popleft()
            if not call.answer.done():
                batch.append(call)
        return batch

    async def _run(self, batch: list[_Call]) -> None:
        self.meter.batch(self.stage, len(batch), len(self._waiting))
        deadline = max((call.deadline for call in batch), key=lambda each: each.at)
        try:
            _answer(batch, await self.send([call.request for call in batch], deadline))
        except StageBroke as failure:
            if len(batch) == 1:
                _fail(batch, failure)
            for call in batch if len(batch) > 1 else ():
                # Whose request broke it is not known: each again, alone.
                await self._run([call])
        except StageFailed as failure:
            _fail(batch, failure)
        finally:
            _fail(batch, StageDown(self.stage, "its call ended without an answer"))


def _answer(batch: Sequence[_Call], answers: Sequence[Any]) -> None:
    for call, answer in zip(batch, answers, strict=True):
        if not call.answer.done():
            call.answer.set_result(answer)


def _fail(batch: Sequence[_Call], failure: StageFailed) -> None:
    for call in batch:
        if not call.answer.done():
            call.answer.set_exception(failure)
