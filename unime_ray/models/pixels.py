"""From encoded bytes to patches: decode, resize as the checkpoint's own image processor does, cut into patches.

transformers' processor works picture by picture in float; here the resized pictures stay 8-bit until they are on the
model's device, so patches are small enough to cache. A test holds the result to the processor's within 1e-6.

Shapes: P patches of a picture, C colour channels, T frames per patch (a still picture fills all of them), p patch side.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from unime_ray.config import PixelBudget
from unime_ray.corpus.images import decode
from unime_ray.errors import ModelError, RejectedRow
from unime_ray.ids import image_id
from unime_ray.models.cache import ByteCache
from unime_ray.models.items import Item

CHECKPOINT_BUDGET = PixelBudget()
PATCH_CACHE_BYTES = 256 << 20
MAX_DECODE_THREADS = 8
Grid = tuple[int, int]


class Picture:
    """One picture, ready for a vision tower.

    Qwen2-VL's relatives: 8-bit `patches` (P, C, p*p), block-major, and `grid` = (rows, columns) of patches. Families
    that cut pictures into tiles: float32 `patches` (tiles, C, height, width), and a `grid` that their token layout
    follows from. `key` identifies the content; two pictures with one key are one picture.
    """

    __slots__ = ("_patches", "grid", "key")

    def __init__(self, key: bytes, grid: Grid, patches: np.ndarray | Callable[[], np.ndarray]) -> None:
        """`patches` that will hardly be asked for may be something that makes them."""
        self.key, self.grid, self._patches = key, grid, patches

    @property
    def patches(self) -> np.ndarray:
        return self._patches() if callable(self._patches) else self._patches

    @property
    def nbytes(self) -> int:
        """Of the patches, if they are held here."""
        return 0 if callable(self._patches) else self._patches.nbytes


class PicturePipeline(ABC):
    """Encoded pictures as what a vision tower takes: cached by content, decoded in a thread pool."""

    def __init__(self) -> None:
        self._cache: ByteCache[bytes, Picture] = ByteCache(PATCH_CACHE_BYTES)
        self._pool: ThreadPoolExecutor | None = None

    def picture(self, data: bytes, key: bytes | None = None) -> Picture:
        """One picture, from the cache if it was met before.

        Raises:
            RejectedRow: the bytes do not decode, or the picture's shape cannot be taken.
        """
        key = image_id(data) if key is None else key
        found = self._cache.get(key)
        if found is None:
            found = self._cut(key, decode(data))
            self._cache.put(key, found, found.nbytes)
        return found

    def pictures(
        self, sources: Sequence[tuple[bytes, bytes | None]], known: Callable[[bytes], Grid | None] = lambda key: None
    ) -> list[Picture | RejectedRow]:
        """Pictures of (bytes, key or None), in order; one that cannot be used is its RejectedRow instead.

        A picture whose grid is `known` under its key is decoded only when somebody reads its patches.
        """
        take = partial(self._try, known)
        if len(sources) < 4 or _num_threads() == 1:
            return [take(source) for source in sources]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_num_threads(), thread_name_prefix="decode")
        return list(self._pool.map(take, sources))

    def forget(self) -> None:
        """Drop cached patches."""
        self._cache.clear()

    def of_items(
        self, items: Sequence[Item], known: Callable[[bytes], Grid | None] = lambda key: None
    ) -> list[Picture | RejectedRow | None]:
        """Each item's picture; None if it has none, the reason if it cannot be used. Decoded in a thread pool.

        `known`: as for `pictures`.
        """
        with_image = [index for index, item in enumerate(items) if item.image is not None]
        sources = [(items[index].image or b"", items[index].image_id) for index in with_image]
        found: list[Picture | RejectedRow | None] = [None] * len(items)
        for index, picture in zip(with_image, self.pictures(sources, known), strict=True):
            found[index] = picture
        return found

    def normalise(self, pictures: Sequence[Picture], device: torch.device) -> Tensor:
        """`pixel_values` float32 as the image processor would give them for all pictures together."""
        return torch.from_numpy(np.concatenate([picture.patches for picture in pictures])).to(device)

    def _try(self, known: Callable[[bytes], Grid | None], source: tuple[bytes, bytes | None]) -> Picture | RejectedRow:
        data, key = source
        grid = known(key) if key is not None else None
        if key is not None and grid is not None:
            return Picture(key, grid, lambda: self.picture(data, key).patches)
        try:
            return self.picture(data, key)
        except RejectedRow as reason:
            return reason

    @abstractmethod
    def _cut(self, key: bytes, image: Image.Image) -> Picture:
        """A decoded picture as the vision tower takes it."""


class TilePipeline(PicturePipeline):
    """The checkpoint's own image processor, picture by picture, for families whose pictures are tiles of one size."""

    def __init__(self, process: Callable[[Image.Image], tuple[np.ndarray, tuple[int, int]]]) -> None:
        """`process` makes (tiles, C, height, width) float32 and the grid of a decoded picture."""
        super().__init__()
        self._process = process

    def _cut(self, key: bytes, image: Image.Image) -> Picture:
        tiles, grid = self._process(image)
        return Picture(key, grid, np.ascontiguousarray(tiles, dtype=np.float32))


class PixelPipeline(PicturePipeline):
    """What a checkpoint's image processor does to a picture, as data: sizes, resampling, normalisation."""

    def __init__(self, processor: object, budget: PixelBudget = CHECKPOINT_BUDGET) -> None:
        """`processor` is a Qwen2-VL image processor; `budget` overrides its pixel limits where it has values.

        Raises:
            ModelError: the processor lacks a patch or merge size, or the budget's minimum exceeds its maximum.
        """
        super().__init__()
        for name in ("patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std", "size"):
            if getattr(processor, name, None) is None:
                raise ModelError(
                    f"image processor {type(processor).__name__} has no `{name}`: not of the Qwen2-VL family"
                )
        self.patch: int = processor.patch_size  # type: ignore[attr-defined]
        self.merge: int = processor.merge_size  # type: ignore[attr-defined]
        self.frames: int = processor.temporal_patch_size  # type: ignore[attr-defined]
        self.resample = Image.Resampling(int(getattr(processor, "resample", None) or Image.Resampling.BICUBIC))
        size = processor.size  # type: ignore[attr-defined]
        self.min_pixels = int(budget.min_pixels or _edge(size, "shortest_edge", "min_pixels"))
        self.max_pixels = int(budget.max_pixels or _edge(size, "longest_edge", "max_pixels"))
        if self.min_pixels > self.max_pixels:
            raise ModelError(
                f"pixels: min_pixels {self.min_pixels} exceeds max_pixels {self.max_pixels}; raise the latter"
            )
        self._scale, self._shift = _normalisation(processor)

    @property
    def budget(self) -> tuple[int, int]:
        """(min_pixels, max_pixels) in effect."""
        return self.min_pixels, self.max_pixels

    def num_tokens(self, grid: tuple[int, int]) -> int:
        """Image tokens of a picture after the vision tower merges its patches."""
        return grid[0] * grid[1] // self.merge**2

    def normalise(self, pictures: Sequence[Picture], device: torch.device) -> Tensor:
        """`pixel_values` (sum of P, C*T*p*p) float32 as the image processor would give them."""
        flat = torch.from_numpy(np.concatenate([picture.patches for picture in pictures])).to(device)
        scale, shift = self._scale.to(device), self._shift.to(device)
        values = flat.float() * scale - shift  # (N, C, p*p)
        return values.unsqueeze(2).expand(-1, -1, self.frames, -1).reshape(len(flat), -1)

    def _cut(self, key: bytes, image: Image.Image) -> Picture:
        try:
            height, width = smart_resize(
                image.height, image.width, self.patch * self.merge, self.min_pixels, self.max_pixels
            )
        except ValueError as error:
            raise RejectedRow(f"picture cannot be resized: {error}") from error
        if image.size != (width, height):
            image = image.resize((width, height), self.resample)
        rows, columns = height // self.patch, width // self.patch
        cut = np.asarray(image).reshape(
            rows // self.merge, self.merge, self.patch, columns // self.merge, self.merge, self.patch, 3
        )
        # Block-major: the patches that merge into one token lie beside each other.
        patches = cut.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, 3, self.patch**2)
        return Picture(key, (rows, columns), np.ascontiguousarray(patches))


def _edge(size: object, *names: str) -> int:
    for name in names:
        value = size.get(name) if isinstance(size, dict) else getattr(size, name, None)
        if value:
            return int(value)
    raise ModelError(f"image processor: `size` has no {names[0]}, so its pixel budget is unknown")


def _normalisation(processor: object) -> tuple[Tensor, Tensor]:
    """(x * rescale - mean) / std as one multiply and one subtract per channel: two (C, 1) tensors."""
    rescale = float(processor.rescale_factor) if getattr(processor, "do_rescale", True) else 1.0  # type: ignore[attr-defined]
    mean = torch.tensor(processor.image_mean, dtype=torch.float64)  # type: ignore[attr-defined]
    std = torch.tensor(processor.image_std, dtype=torch.float64)  # type: ignore[attr-defined]
    if not getattr(processor, "do_normalize", True):
        mean, std = torch.zeros_like(mean), torch.ones_like(std)
    return (rescale / std).float()[:, None], (mean / std).float()[:, None]


def _num_threads() -> int:
    return min(MAX_DECODE_THREADS, len(os.sched_getaffinity(0)))
