"""Canary scores: a few fixed pairs whose scores every engine must give again before it may judge.

The reference is made once, by the transformers engine, for each combination of checkpoint, prompt, dtype and picture
budget, and stored as a small file (in the run, or wherever `judge.canary` says). An actor scores the same pairs when it
starts; if one of them is off by more than the dtype allows, its engine reads the checkpoint differently (a driver, a
library, a setting), and it refuses to run. What these pairs cannot show: faults that only long prompts, large pictures
or full batches bring out.
"""

from __future__ import annotations

import gc
import hashlib
import io
import json
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
from PIL import Image

from unime_ray.artifacts import join, read_text, write_text
from unime_ray.config import JudgeConfig
from unime_ray.errors import CanaryError
from unime_ray.ids import image_id, item_id
from unime_ray.models.judge import Group, Judge, load_judge
from unime_ray.prompts import judge_prompt, render

VERSION = 1
"""Of the pairs below: another set has other scores."""
REFERENCE_ENGINE = "transformers"
TOLERANCE = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.07}
"""Largest difference of a score that rounding explains: twice the largest between two ways to score these pairs
(docs/vllm.md)."""
SCORED_BY = {"model", "dtype", "prompt_order", "repetition_penalty", "pixels"}


@dataclass(frozen=True)
class CanaryItem:
    """The shape of an item as engines see it."""

    item_id: bytes
    rendered: str
    text: str | None
    image_id: bytes | None
    image: bytes | None


@dataclass(frozen=True)
class CanaryFile:
    """Where the reference of one judge lies. `folder` is a local path or a URI."""

    folder: str
    revision: str
    """What exactly the judge's checkpoint is."""

    def uri(self, config: JudgeConfig) -> str:
        """The file of this judge: its name says all that scores depend on but the engine."""
        return join(self.folder, f"{_key(config, self.revision)}.json")

    def read(self, config: JudgeConfig) -> list[float | None] | None:
        """The reference scores (None: a pair that cannot be scored), or None if there is no file yet.

        Raises:
            CanaryError: the file holds something else.
        """
        text = read_text(self.uri(config))
        if text is None:
            return None
        try:
            scores = json.loads(text)["scores"]
            return [None if score is None else float(score) for score in scores]
        except (ValueError, TypeError, KeyError) as error:
            raise CanaryError(f"{self.uri(config)}: holds no canary scores; remove the file") from error

    def write(self, config: JudgeConfig, scores: list[float | None]) -> None:
        """Store the reference with what it was made by. Of several actors that write at once the last one stays."""
        about = {"engine": config.engine, **{name: version(name) for name in ("torch", "transformers")}}
        found = {"scores": scores, **_depends(config, self.revision), **about}
        write_text(self.uri(config), json.dumps(found, indent=2) + "\n")


def load_checked(config: JudgeConfig, file: CanaryFile) -> Judge:
    """The judge a config describes, held to the reference; the first one to start makes that reference.

    Raises:
        CanaryError: its scores differ; the message has the largest difference.
        ModelError: the checkpoint cannot judge.
    """
    reference = file.read(config)
    if reference is None and config.engine != REFERENCE_ENGINE:
        reference = make_reference(config, file)
    judge = load_judge(config)
    found = canary_scores(judge)
    if reference is None:
        file.write(config, found)
    else:
        compare(found, reference, config, file.uri(config))
    return judge


def make_reference(config: JudgeConfig, file: CanaryFile) -> list[float | None]:
    """Score the pairs with the transformers engine, store them, and let go of the model."""
    import torch

    plain = config.model_copy(update={"engine": REFERENCE_ENGINE})
    judge = load_judge(plain)
    scores = canary_scores(judge)
    file.write(plain, scores)
    del judge
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the engine that comes next asks for most of the memory
    return scores


def canary_scores(judge: Judge) -> list[float | None]:
    """The judge's scores of the fixed pairs, in order; None where it gives an error."""
    return [verdict.score for verdicts in judge.score_groups(canary_groups()) for verdict in verdicts]


def compare(found: list[float | None], reference: list[float | None], config: JudgeConfig, where: str) -> None:
    """Raise CanaryError unless every score is within the dtype's tolerance of its reference."""
    labels = [f"{_label(query)} with {_label(item)}" for query, items in canary_groups() for item in items]
    if len(reference) != len(labels):
        raise CanaryError(f"{where}: {len(reference)} canary scores for {len(labels)} pairs; remove the file")
    gaps = [_gap(ours, theirs) for ours, theirs in zip(found, reference, strict=True)]
    worst = int(np.argmax(gaps))
    limit = TOLERANCE[config.dtype]
    if not gaps[worst] <= limit:
        raise CanaryError(
            f"engine {config.engine} of {config.model} ({config.dtype}) drifted from the reference {where}: largest "
            f"difference {gaps[worst]:.3g} (allowed {limit:g}), {labels[worst]}: {found[worst]} instead of "
            f"{reference[worst]}; use the library versions the file names, or remove it if this engine is right"
        )


def canary_groups() -> list[Group]:
    """Text, picture and both on either side, pictures of sizes that need resizing; the same bytes of pixels always."""
    fox, wave = _picture(90, 40, 1), _picture(64, 120, 2)
    plain, shown = _item("a red fox in the snow"), _item(None, fox)
    both = _item("a wave", wave, "Represent the given picture with its name.")
    asked = _item("a wave at sea, 2 birds above it", None, "Find a picture that matches the given name:")
    other = _item("No, this is a long description of something else. " * 6)
    return [(asked, [both, shown, other]), (shown, [plain, other, both]), (both, [shown, plain]), (plain, [other])]


def _item(text: str | None, image: bytes | None = None, instruction: str | None = None) -> CanaryItem:
    rendered = render(text, image is not None, instruction)
    key = image_id(image) if image is not None else None
    return CanaryItem(item_id(rendered, key), rendered, text, key, image)


def _picture(width: int, height: int, seed: int) -> bytes:
    """A PNG of smooth colours made by integer arithmetic, so that its pixels are the same everywhere."""
    rows, columns = np.mgrid[0:height, 0:width]
    channels = [(rows * (3 + seed) + columns * (5 * axis + seed) + rows * columns // 16) % 256 for axis in range(3)]
    buffer = io.BytesIO()
    Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def _gap(found: float | None, reference: float | None) -> float:
    """Distance of two scores; infinite if only one of them is a score."""
    if found is None or reference is None:
        return 0.0 if found is reference else float("inf")
    return abs(found - reference)


def _depends(config: JudgeConfig, revision: str) -> dict[str, Any]:
    settings = config.model_dump(mode="json", include=SCORED_BY)
    prompt = judge_prompt(config.prompt, config.instruction).hash
    return {"version": VERSION, "revision": revision, "prompt": prompt, **settings}


def _key(config: JudgeConfig, revision: str) -> str:
    depends = {key: value for key, value in _depends(config, revision).items() if key != "model"}
    return hashlib.blake2b(json.dumps(depends, sort_keys=True).encode(), digest_size=12).hexdigest()


def _label(item: Any) -> str:
    kind = "picture and text" if item.image and item.text else "picture" if item.image else "text"
    return f"{kind} {item.text[:24]!r}" if item.text else kind
