"""A request's deadline, in wall-clock time, so that it means the same in every process that works on the request."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Deadline:
    """The moment (seconds since the epoch) after which nobody waits for the answer any more."""

    at: float

    @classmethod
    def after_ms(cls, milliseconds: float) -> Deadline:
        return cls(time.time() + milliseconds / 1000)

    def left(self) -> float:
        """Seconds left; negative when it has passed."""
        return self.at - time.time()

    def passed(self) -> bool:
        return self.left() <= 0

    def at_most_ms(self, milliseconds: float) -> Deadline:
        """This deadline or one `milliseconds` from now, whichever comes first."""
        return Deadline(min(self.at, time.time() + milliseconds / 1000))
