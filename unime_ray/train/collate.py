"""From row numbers to what a forward pass takes: payload by id, each distinct item once, and the work ahead of time.

`prefetch` runs the whole of it (Lance, decoding, tokenising) in one thread beside the training steps.

Shapes: B queries of a micro-batch, K = 1 + k candidates (column 0 is the positive), U distinct items, M candidates of
the global batch, P known positives of a query.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from unime_ray.corpus.payload import PayloadStore
from unime_ray.errors import RejectedRow, TrainingError
from unime_ray.ids import show
from unime_ray.losses import PADDING_KEY
from unime_ray.models.backbone import Backbone, Batch
from unime_ray.models.cache import ByteCache
from unime_ray.models.pixels import Picture
from unime_ray.models.tokens import Segment
from unime_ray.train.data import Asked, Example, Examples

SEGMENT_CACHE_BYTES = 256 << 20
MAX_STRETCH, MIN_PACK = 1.25, 16
"""Rows of one batch differ by at most a quarter in length, unless the batch would have fewer than 16 rows."""
Content = tuple[str, tuple[Picture, ...]]
"""An item's rendered text and its pictures."""
Work = TypeVar("Work")


@dataclass(frozen=True)
class Packed:
    """Rows in batches of similar length, so that little is padded; a forward pass takes all of them."""

    batches: tuple[Batch, ...]
    place: tuple[int, ...]
    """Where each row, in the order it was given, stands in the batches laid end to end."""

    def __len__(self) -> int:
        return len(self.place)

    @property
    def num_tokens(self) -> int:
        return sum(int(batch.attention_mask.sum()) for batch in self.batches)


def pack(segments: Sequence[Segment], backbone: Backbone) -> Packed:
    """Sort rows by length and cut where one would be over a quarter longer than the first of its batch."""
    order = sorted(range(len(segments)), key=lambda row: len(segments[row]))
    groups: list[list[Segment]] = []
    for row in order:
        longer = not groups or len(segments[row]) > MAX_STRETCH * len(groups[-1][0])
        if longer and (not groups or len(groups[-1]) >= MIN_PACK):
            groups.append([])
        groups[-1].append(segments[row])
    place = [0] * len(order)
    for position, row in enumerate(order):
        place[row] = position
    return Packed(tuple(backbone.collate(group) for group in groups), tuple(place))


def filler(backbone: Backbone) -> Batch:
    """The cheapest forward pass there is, for ranks that must make as many as the others."""
    return backbone.collate([backbone.tokens.text("a")])


@dataclass(frozen=True)
class MicroBatch:
    """Whole queries that go through the model together; each distinct item is one row of `inputs`."""

    inputs: Packed
    query_B: Tensor
    """Row of each query in the packed batches."""
    candidate_BK: Tensor
    """Row of each candidate in the packed batches."""
    scores_BK: Tensor
    """Judge scores in [0, 1]."""
    examples: tuple[Asked, ...]

    @property
    def packs(self) -> tuple[Packed, ...]:
        return (self.inputs,)

    def with_packs(self, inputs: Packed) -> MicroBatch:
        return replace(self, inputs=inputs)

    @property
    def num_items(self) -> int:
        return len(self.inputs)

    @property
    def num_tokens(self) -> int:
        return self.inputs.num_tokens


@dataclass(frozen=True)
class InBatch:
    """What an in-batch loss must know of the global batch. Candidates stand rank after rank, K to a query."""

    keys_M: Tensor
    known_BP: Tensor
    targets_B: Tensor
    rows_per_rank: tuple[int, ...]


@dataclass(frozen=True)
class TeacherBatch:
    """What a teacher says of the texts of the global batch, rank after rank. T: the teacher's width."""

    vectors_MT: Tensor
    own_B: Tensor
    """Places of this rank's texts."""
    rows_per_rank: tuple[int, ...]


@dataclass(frozen=True)
class StepBatch(Generic[Work]):
    """One rank's part of one optimizer step."""

    step: int
    batch_size: int
    """Queries of the global batch: what the loss is the mean over."""
    micro_batches: tuple[Work, ...]
    in_batch: InBatch | TeacherBatch | None = None


class SegmentStore:
    """Model inputs of items by id, kept while memory lasts: an item is read, decoded and tokenised once.

    `segments` are the items as the embedder sees them; a prompt around them is the caller's.
    """

    def __init__(self, payload: PayloadStore, backbone: Backbone) -> None:
        self._payload, self._backbone = payload, backbone
        self._cache: ByteCache[bytes, Segment] = ByteCache(SEGMENT_CACHE_BYTES)

    def segments(self, ids: Sequence[bytes]) -> list[Segment]:
        """One segment per id, in order.

        Raises:
            ArtifactError: an id has no payload. TrainingError: an item cannot be used; the message has its id.
        """
        found = {identifier: self._cache.get(identifier) for identifier in dict.fromkeys(ids)}
        missing = [identifier for identifier, segment in found.items() if segment is None]
        for identifier, fresh in zip(missing, self._read(missing), strict=True):
            found[identifier] = fresh
            self._cache.put(identifier, fresh, _segment_bytes(fresh))
        return [segment for identifier in ids if (segment := found[identifier]) is not None]

    def contents(self, ids: Sequence[bytes]) -> dict[bytes, Content]:
        """Text and pictures by id, for prompts that are built around them.

        Raises:
            ArtifactError, TrainingError: as `segments`.
        """
        items = self._payload.items(list(dict.fromkeys(ids)))
        found: dict[bytes, Content] = {}
        for item, picture in zip(items, self._backbone.pictures(items), strict=True):
            if isinstance(picture, RejectedRow):
                raise _unusable(item.item_id, picture)
            found[item.item_id] = item.rendered, () if picture is None else (picture,)
        return found

    def _read(self, ids: list[bytes]) -> list[Segment]:
        segments = []
        for item, segment in zip(ids, self._backbone.segments(self._payload.items(ids)), strict=True):
            if isinstance(segment, RejectedRow):
                raise _unusable(item, segment)
            segments.append(segment)
        return segments


def _unusable(item: bytes, reason: RejectedRow) -> TrainingError:
    return TrainingError(f"item {show(item)} cannot be trained on: {reason.reason}; leave it out of the corpus")


def _segment_bytes(segment: Segment) -> int:
    # Pictures live in the pixel pipeline's own cache, but a cached segment keeps its picture alive.
    return segment.ids.nbytes * 4 + sum(picture.nbytes for picture in segment.pictures) + 256


def embedder_micro_batch(
    examples: Sequence[Example], num_negatives: int, store: SegmentStore, backbone: Backbone
) -> MicroBatch:
    """Queries with their positive and first `num_negatives` hard negatives; items that repeat are encoded once."""
    ids_B = [(e.query_id, e.positive_id, *e.negative_ids[:num_negatives]) for e in examples]
    unique = list(dict.fromkeys(identifier for row in ids_B for identifier in row))
    inputs = pack(store.segments(unique), backbone)
    row_of = dict(zip(unique, inputs.place, strict=True))
    index_BK1 = torch.tensor([[row_of[identifier] for identifier in row] for row in ids_B], dtype=torch.long)
    index_BK1 = index_BK1.view(len(examples), 2 + num_negatives)
    scores = [(e.positive_score, *e.negative_scores[:num_negatives]) for e in examples]
    return MicroBatch(
        inputs=inputs,
        query_B=index_BK1[:, 0].to(backbone.device),
        candidate_BK=index_BK1[:, 1:].to(backbone.device),
        scores_BK=torch.tensor(scores, dtype=torch.float32, device=backbone.device).view(-1, 1 + num_negatives),
        examples=tuple(examples),
    )


def in_batch_info(
    rows: np.ndarray, rank: int, world: int, examples: Examples, num_negatives: int, device: torch.device
) -> InBatch:
    """Identities of all ranks' candidates. The order is known to every rank, so no id has to be sent.

    Args:
        rows: the rows of the *global* batch.
    """
    parts = [[examples[int(row)] for row in rows[other::world]] for other in range(world)]
    keys: dict[bytes, int] = {}
    flat = [
        keys.setdefault(identifier, len(keys))
        for part in parts
        for example in part
        for identifier in (example.positive_id, *example.negative_ids[:num_negatives])
    ]
    known = [[keys[p] for p in examples.known_positives(example) if p in keys] for example in parts[rank]]
    width = max(map(len, known))
    offset, stride = sum(len(part) for part in parts[:rank]), 1 + num_negatives
    return InBatch(
        keys_M=torch.tensor(flat, device=device),
        known_BP=torch.tensor([row + [PADDING_KEY] * (width - len(row)) for row in known], device=device),
        targets_B=(offset + torch.arange(len(parts[rank]), device=device)) * stride,
        rows_per_rank=tuple(len(part) * stride for part in parts),
    )


def split(rows: Sequence[Work], size: int) -> Iterator[Sequence[Work]]:
    """Consecutive parts of at most `size`."""
    return (rows[start : start + size] for start in range(0, len(rows), size))


def prefetch(make: Callable[[int], Work], steps: range, depth: int = 2) -> Generator[Work]:
    """`make(step)` for each step, made in one thread up to `depth` steps ahead; an error surfaces at its own step."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        ahead = deque(pool.submit(make, step) for step in steps[:depth])
        for step in steps:
            made = ahead.popleft().result()
            if step + depth in steps:
                ahead.append(pool.submit(make, step + depth))
            yield made
    finally:
        pool.shutdown(cancel_futures=True)
