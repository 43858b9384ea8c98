"""A progress bar with its rate: live in a terminal, one line at the end elsewhere."""

from __future__ import annotations

import logging
import time
from types import TracebackType

from rich import progress as bars

log = logging.getLogger("unime_ray")


class _Rate(bars.ProgressColumn):
    def render(self, task: bars.Task) -> str:
        speed = task.finished_speed or task.speed
        return "" if speed is None else f"{speed:,.0f}/s"


class Progress:
    """`with Progress(title, total, unit) as p: p.advance(n)`; nothing is shown if `total` is 0."""

    def __init__(self, title: str, total: int, unit: str) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, 0
        columns = (bars.TextColumn("      {task.description}"), bars.BarColumn(), bars.MofNCompleteColumn(), _Rate())
        self._bar = bars.Progress(*columns, bars.TimeRemainingColumn(compact=True), transient=True)
        self._task = self._bar.add_task(title, total=total)

    def __enter__(self) -> Progress:
        self._clock = time.monotonic()
        if self.total and self._bar.console.is_terminal:
            self._bar.start()
        return self

    def advance(self, count: int) -> None:
        self.done += count
        self._bar.advance(self._task, count)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if self.total and kind is None:
            seconds = max(time.monotonic() - self._clock, 1e-9)
            rate = self.done / seconds
            log.info("      %s: %d %s in %.1f s (%.0f/s)", self.title, self.done, self.unit, seconds, rate)
