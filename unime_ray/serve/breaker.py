"""Stops asking a stage that keeps failing, so that requests don't each wait for it in vain."""

from __future__ import annotations

import time
from collections.abc import Callable


class Breaker:
    """Opens after `failures` in a row; then lets one request through every `cooldown` seconds, and closes when one
    succeeds."""

    def __init__(self, failures: int = 3, cooldown: float = 2.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.failures, self.cooldown, self._clock = failures, cooldown, clock
        self._in_row = 0
        self._next_probe = 0.0

    @property
    def open(self) -> bool:
        return self._in_row >= self.failures

    def allows(self) -> bool:
        """Whether to ask the stage now; an open breaker says yes once every `cooldown` seconds."""
        if not self.open:
            return True
        now = self._clock()
        if now < self._next_probe:
            return False
        self._next_probe = now + self.cooldown
        return True

    def succeeded(self) -> None:
        self._in_row = 0

    def failed(self) -> None:
        self._in_row += 1
        if self._in_row == self.failures:
            self._next_probe = self._clock() + self.cooldown
