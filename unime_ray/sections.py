"""What every section of a config is made of, and the sections that several share."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """Base of every section: immutable, and a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Resources(Section):
    """What one actor of a stage takes, and how many there may be."""

    num_actors: Count = 1
    max_actors: int | None = None
    """With a value, Ray scales between `num_actors` and this many."""
    num_cpus: Positive = 1.0
    num_gpus: Annotated[float, Field(ge=0.0)] = 0.0


class PixelBudget(Section):
    """Pixels a model gets per picture after resizing; None keeps the checkpoint's own setting."""

    min_pixels: int | None = None
    max_pixels: int | None = None
