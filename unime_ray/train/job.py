"""What travels between the driver, Ray Train's controller and the workers. Imports neither torch nor transformers, so
that the controller, which unpickles it, does not either."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict
from ray.train.v2.api.callback import UserCallback

from unime_ray.config import PixelBudget
from unime_ray.errors import UnimeError


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


class StopOnOwnErrors(UserCallback):
    """Ends training at an error raised on purpose: another attempt would only meet it again."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for rank in sorted(worker_exceptions):
            if isinstance(worker_exceptions[rank], UnimeError):
                raise worker_exceptions[rank]
