"""One call for many requests: order, sizes, deadlines, queues, and who fails with whom."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import pytest

from unime_ray.config_serve import StageConfig
from unime_ray.serve.coalesce import Coalescer
from unime_ray.serve.deadline import Deadline
from unime_ray.serve.errors import StageBroke, StageDown, StageFailed, StageLate, StageOverloaded
from unime_ray.serve.metrics import NoMeter

SOON = 5_000


class Stage:
    """Doubles numbers, slowly; `poison` breaks it."""

    def __init__(self, seconds: float = 0.01, poison: int | None = None, failure: StageFailed | None = None) -> None:
        self.seconds, self.poison, self.failure = seconds, poison, failure
        self.batches: list[list[int]] = []
        self.under_way = self.most = 0

    async def __call__(self, requests: list[int], deadline: Deadline) -> Sequence[int]:
        self.batches.append(requests)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await asyncio.sleep(self.seconds)
        self.under_way -= 1
        if self.failure is not None:
            raise self.failure
        if self.poison in requests:
            raise StageBroke("stage", "it raised an error")
        return [2 * number for number in requests]


def ask_all(stage: Stage, count: int, milliseconds: float = SOON, **config: Any) -> list[Any]:
    """Answers (or errors) of so many requests that arrive together."""

    async def together() -> list[Any]:
        coalescer = Coalescer("stage", stage, StageConfig(**{"batch_wait_ms": 0.0, **config}))
        calls = (coalescer.ask(number, Deadline.after_ms(milliseconds)) for number in range(count))
        return await asyncio.gather(*calls, return_exceptions=True)

    return asyncio.run(together())


def test_calls_that_arrive_together_go_together_and_in_order() -> None:
    stage = Stage()
    assert ask_all(stage, 20, max_batch=8) == [2 * number for number in range(20)]
    assert [number for batch in stage.batches for number in batch] == list(range(20))
    assert max(len(batch) for batch in stage.batches) == 8 and len(stage.batches) == 3
    assert stage.most == 2, "one batch computes and one waits its turn; the rest stay here"


def test_without_batching_every_request_is_a_call() -> None:
    stage = Stage()
    assert len(ask_all(stage, 9, max_batch=1, max_ongoing=4)) == 9
    assert [len(batch) for batch in stage.batches] == [1] * 9 and stage.most == 4


def test_a_lone_call_waits_no_longer_than_told() -> None:
    started = time.monotonic()
    assert ask_all(Stage(seconds=0), 1, batch_wait_ms=20.0) == [0]
    assert 0.015 < time.monotonic() - started < 1


def test_a_late_stage_is_late_for_each_and_never_hangs() -> None:
    started = time.monotonic()
    answers = ask_all(Stage(seconds=30), 12, milliseconds=60, max_batch=4)
    assert {type(answer) for answer in answers} == {StageLate} and time.monotonic() - started < 2


def test_a_full_queue_refuses() -> None:
    answers = ask_all(Stage(), 10, max_batch=2, max_queued=3)
    assert [type(answer) for answer in answers].count(StageOverloaded) == 3, "four are under way, three wait"


def test_a_failing_stage_fails_all_of_a_batch() -> None:
    answers = ask_all(Stage(failure=StageDown("stage", "gone")), 3)
    assert {type(answer) for answer in answers} == {StageDown}


def test_a_request_that_breaks_the_stage_breaks_no_other() -> None:
    stage = Stage(poison=2)
    answers = ask_all(stage, 5)
    assert [type(answer) for answer in answers] == [int, int, StageBroke, int, int]
    assert stage.batches[0] == [0, 1, 2, 3, 4] and stage.batches[1:] == [[0], [1], [2], [3], [4]]


def test_an_unforeseen_error_leaves_nobody_waiting() -> None:
    async def broken(requests: list[int], deadline: Deadline) -> Sequence[int]:
        raise KeyError("unforeseen")

    async def once() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        with pytest.raises(StageDown):
            await Coalescer("stage", broken, StageConfig()).ask(1, Deadline.after_ms(SOON))

    asyncio.run(once())


def test_batches_are_counted() -> None:
    counted: list[tuple[str, int]] = []

    class Counting(NoMeter):
        def batch(self, stage: str, size: int, waiting: int) -> None:
            counted.append((stage, size))

    async def once() -> None:
        coalescer = Coalescer("encoder", Stage(), StageConfig(max_batch=4), Counting())
        await asyncio.gather(*(coalescer.ask(number, Deadline.after_ms(SOON)) for number in range(6)))

    asyncio.run(once())
    assert counted == [("encoder", 4), ("encoder", 2)]
