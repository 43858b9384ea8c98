"""What travels between the driver, Ray Train's controller and the workers. Imports neither torch nor transformers, so
that the controller, which unpickles it, does not either."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray.train.v2.api.callback import UserCallback

from unime_ray.config import PixelBudget
from unime_ray.errors import ConfigError, UnimeError


class TrainingJob(BaseModel):
    """Everything a worker needs, as plain values that travel to another machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    section: dict[str, Any]
    model: str
    revision: str | None
    pixels: PixelBudget
    examples_uri: str
    images_uri: str
    items_uri: str
    artifact_uri: str
    identity: dict[str, str]


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError if a tracker's library is not installed here."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"tracker: {name} is not installed; pip install 'unime-ray[{name}]'")


class StopOnOwnErrors(UserCallback):
    """Ends training at an error raised on purpose: another attempt would only meet it again."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for rank in sorted(worker_exceptions):
            if isinstance(worker_exceptions[rank], UnimeError):
                raise worker_exceptions[rank]
