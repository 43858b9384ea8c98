"""The index that serves: a faiss snapshot of the run's pool, an exact tail of what was written since, and what is gone.

Everything here is derived: from the run's pools and vectors, and from the live log. Every vector was made by one
revision of the embedder. Row numbers run on from the snapshot (0 .. N-1) into the tail (N ..).

Shape suffixes: N snapshot rows, T tail rows, D dimensions.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from unime_ray.config_serve import IndexConfig
from unime_ray.serve.live import DELETE, LogRow
from unime_ray.serve.snapshot import Snapshot

TAIL_CAPACITY = 64
MAX_MASKS = 64
"""Filters whose rows are kept; anyone may ask for any."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A filter: only items of this dataset, split and kind (`text`: without a picture, `image`: with one)."""

    dataset: str | None = None
    split: str | None = None
    kind: str | None = None

    def all(self) -> bool:
        return self == Wanted()


@dataclass(frozen=True, slots=True)
class Shard:
    """One of `count` parts of the index; what an item is called decides which part holds it."""

    place: int = 0
    count: int = 1

    def holds(self, name: str) -> bool:
        return shard_of(name, self.count) == self.place


WHOLE = Shard()


def shard_of(name: str, count: int) -> int:
    """The part that holds the item called `name`; the same in every process."""
    return zlib.crc32(name.encode()) % count


@dataclass(frozen=True, slots=True)
class Ref:
    """Where an item's payload is: in the run (`log_row` None) under `item_id`, or in that row of the live log."""

    id: str
    item_id: bytes
    image_id: bytes | None
    log_row: int | None
    dataset: str
    split: str


@dataclass(frozen=True, slots=True)
class Found:
    ref: Ref
    similarity: float


@dataclass(eq=False)
class Rows:
    """What rows are: their refs and, for filters, which (dataset, split) groups hold them."""

    refs: list[Ref] = field(default_factory=list)
    groups: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    """Row numbers of each group; a row may be in several."""

    def mask(self, wanted: Wanted, count: int) -> np.ndarray:
        """bool (count,): which rows pass the filter."""
        kept = np.ones(count, bool)
        if wanted.dataset is not None or wanted.split is not None:
            kept[:] = False
            for (dataset, split), rows in self.groups.items():
                if wanted.dataset in (None, dataset) and wanted.split in (None, split):
                    kept[rows] = True
        if wanted.kind is not None:
            images = np.fromiter((ref.image_id is not None for ref in self.refs), bool, count)
            kept &= images if wanted.kind == "image" else ~images
        return kept


class Catalog:
    """Search and replay of the log; thread-safe. One lock guards the tail; faiss searches outside it."""

    def __init__(
        self,
        base: Rows,
        vectors_ND: np.ndarray,
        config: IndexConfig,
        revision: str,
        log: Sequence[LogRow] = (),
        shard: Shard = WHOLE,
    ) -> None:
        """`base` and `vectors_ND` are the run's pool (of this shard); `revision` made the vectors; `log` (from row 0,
        of every shard) is folded in."""
        self.version = log[-1].row + 1 if log else 0
        """Log rows taken in."""
        log = [row for row in log if shard.holds(row.id)]
        rows, vectors = fold(base, vectors_ND, log, revision)
        self.shard = shard
        self.config, self.revision = config, revision
        self.snapshot = Snapshot(vectors, config)
        self.dim = vectors.shape[1]
        self._rows = rows
        self._place = {ref.id: place for place, ref in enumerate(rows.refs)}
        self._alive = np.ones(len(rows.refs) + TAIL_CAPACITY, bool)
        self._tail = np.empty((TAIL_CAPACITY, self.dim), np.float32)
        self._stale = {row.id: row for row in last_words(log) if row.op != DELETE and not _usable(row, revision)}
        self._num_live = sum(ref.log_row is not None for ref in rows.refs)
        self._masks: dict[Wanted, np.ndarray] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        with self._lock:
            return len(self._place)

    @property
    def num_live(self) -> int:
        """Searchable items that were written over the API."""
        return self._num_live

    @property
    def tail_rows(self) -> int:
        return len(self._rows.refs) - self.snapshot.num_rows

    @property
    def stale(self) -> list[LogRow]:
        """Live items whose vector another revision made: not searched until they are embedded again."""
        with self._lock:
            return list(self._stale.values())

    def groups(self) -> dict[tuple[str, str], int]:
        """Searchable items of each (dataset, split)."""
        with self._lock:
            counts = {group: int(self._alive[rows].sum()) for group, rows in self._rows.groups.items()}
        return {group: count for group, count in sorted(counts.items()) if count}

    def apply(self, log: Sequence[LogRow]) -> None:
        """Take in the log rows that follow those taken in before; rows of the past are skipped."""
        with self._lock:
            for row in log:
                if row.row < self.version:
                    continue
                if self.shard.holds(row.id):
                    self._forget(row.id)
                    if row.op != DELETE:
                        self._add(row)
                self.version = row.row + 1
            self._masks.clear()

    def get(self, name: str) -> Ref | None:
        """The item called `name`, if it is there."""
        with self._lock:
            place = self._place.get(name)
            return None if place is None else self._rows.refs[place]

    def page(self, start: int, limit: int, wanted: Wanted) -> tuple[list[Ref], int | None, int]:
        """(items from row `start` on, the row to go on at or None, number of items that pass the filter)."""
        with self._lock:
            mask = self._mask(wanted)
            places = np.flatnonzero(mask[start:])[: limit + 1] + start
            refs = [self._rows.refs[place] for place in places[:limit]]
            return refs, int(places[limit]) if len(places) > limit else None, int(mask.sum())

    def search(self, queries_QD: np.ndarray, ks: Sequence[int], wanted: Sequence[Wanted]) -> list[list[Found]]:
        """The nearest items of each query, most similar first, ties by id. Queries with one filter go together."""
        found: list[list[Found]] = [[] for _ in ks]
        for each in dict.fromkeys(wanted):
            places = [place for place, other in enumerate(wanted) if other == each]
            k = max(ks[place] for place in places)
            for place, hits in zip(places, self._search(queries_QD[places], k, each), strict=True):
                found[place] = hits[: ks[place]]
        return found

    def _search(self, queries_QD: np.ndarray, k: int, wanted: Wanted) -> list[list[Found]]:
        with self._lock:
            count, base = len(self._rows.refs), self.snapshot.num_rows
            mask = self._mask(wanted)
            tail_TD, tail_rows = self._tail[: count - base][mask[base:]], np.flatnonzero(mask[base:]) + base
        kept = mask[:base]
        similarities, rows = self.snapshot.search(queries_QD, k, None if kept.all() else kept)
        exact_QT = queries_QD @ tail_TD.T
        answers = []
        for query in range(len(queries_QD)):
            pairs = [(float(s), int(r)) for s, r in zip(similarities[query], rows[query], strict=True) if r >= 0]
            pairs += [(float(s), int(r)) for s, r in zip(exact_QT[query], tail_rows, strict=True)]
            ranked = sorted(pairs, key=lambda pair: (-pair[0], self._rows.refs[pair[1]].id))[:k]
            answers.append([Found(self._rows.refs[row], similarity) for similarity, row in ranked])
        return answers

    def _mask(self, wanted: Wanted) -> np.ndarray:
        """bool (N + T,): alive rows that pass the filter. The last few are kept until the next write."""
        found = self._masks.get(wanted)
        if found is None:
            found = self._alive[: len(self._rows.refs)] & self._rows.mask(wanted, len(self._rows.refs))
            while len(self._masks) >= MAX_MASKS:
                del self._masks[next(iter(self._masks))]
            self._masks[wanted] = found
        return found

    def _forget(self, name: str) -> None:
        place = self._place.pop(name, None)
        if place is not None:
            self._alive[place] = False
            self._num_live -= self._rows.refs[place].log_row is not None
        self._stale.pop(name, None)

    def _add(self, row: LogRow) -> None:
        if not _usable(row, self.revision):
            self._stale[row.id] = row
            return
        tail, place = self.tail_rows, len(self._rows.refs)
        if tail == len(self._tail):
            # Twice the room. A search under way keeps the arrays it started with.
            self._tail = np.concatenate([self._tail, np.empty_like(self._tail)])
            self._alive = np.concatenate([self._alive, np.ones(tail, bool)])
        self._tail[tail] = row.vector
        self._rows.refs.append(_ref(row))
        self._rows.groups.setdefault((row.dataset, row.split), []).append(place)
        self._place[row.id] = place
        self._alive[place] = True
        self._num_live += 1


def last_words(log: Sequence[LogRow]) -> list[LogRow]:
    """The last row of each id."""
    return list({row.id: row for row in log}.values())


def fold(base: Rows, vectors_ND: np.ndarray, log: Sequence[LogRow], revision: str) -> tuple[Rows, np.ndarray]:
    """What a new snapshot holds: the run's rows, and the log's last word on each id with a vector of `revision`."""
    last = last_words(log)
    written = {row.id for row in last}
    kept = [place for place, ref in enumerate(base.refs) if ref.id not in written]
    number = {old: new for new, old in enumerate(kept)}
    refs = [base.refs[place] for place in kept]
    groups = {group: [number[row] for row in rows if row in number] for group, rows in base.groups.items()}
    puts = [row for row in last if row.op != DELETE and _usable(row, revision)]
    for place, row in enumerate(puts, len(refs)):
        groups.setdefault((row.dataset, row.split), []).append(place)
    added = np.array([row.vector for row in puts], np.float32).reshape(len(puts), vectors_ND.shape[1])
    return Rows(refs + [_ref(row) for row in puts], groups), np.concatenate([vectors_ND[kept], added])


def _usable(row: LogRow, revision: str) -> bool:
    return row.revision == revision and row.vector is not None


def _ref(row: LogRow) -> Ref:
    assert row.item_id is not None, "a put carries its item's id"
    return Ref(row.id, row.item_id, row.image_id, row.row, row.dataset, row.split)
