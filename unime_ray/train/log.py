"""`log.jsonl` of a training run: one line a step, written by rank 0, read by the progress line and the report."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from unime_ray.artifacts import read_text, write_text

if TYPE_CHECKING:
    from unime_ray.train.trackers import Trackers

LOG = "log.jsonl"


class StepLog:
    """The lines so far, written whole every so often so that a reader never sees half a line.

    The file is small (200 bytes a step) and object stores cannot append.
    """

    def __init__(self, uri: str, start_step: int, trackers: Trackers | None = None) -> None:
        self.uri, self._trackers = uri, trackers
        self._interval = 10.0 if "://" in uri else 1.0
        self._written = float("-inf")
        # Steps after the checkpoint are done again: their old lines would stand twice.
        self.lines = [line for line in read_log(uri) if line["step"] <= start_step]

    @property
    def seconds(self) -> float:
        """Training time that the lines so far stand for."""
        return float(self.lines[-1]["seconds"]) if self.lines else 0.0

    def add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if self._trackers is not None:
            self._trackers.log(line)

    def flush(self, force: bool = False) -> None:
        now = time.monotonic()
        if force or now - self._written >= self._interval:
            write_text(self.uri, "".join(json.dumps(line) + "\n" for line in self.lines))
            self._written = now
            if force and self._trackers is not None:
                self._trackers.sync()


def read_log(uri: str) -> list[dict[str, Any]]:
    """The lines of a `log.jsonl`; an empty list if there is none."""
    text = read_text(uri)
    return [json.loads(line) for line in text.splitlines()] if text else []
