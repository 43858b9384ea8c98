"""The index over a run's pool and live items inside one process: opened, filled, searched, written to. No Ray.

Opening takes the vectors that are known; `missing` says which pool items still need one, and `take_in` adds them.
Writes go to the live log first; what it has acknowledged is then taken into the catalog, so that it is searchable when
the write returns. Other replicas take it in when they `refresh`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

import numpy as np

from unime_ray.corpus.payload import Item
from unime_ray.ids import show
from unime_ray.serve.bundle import Bundle
from unime_ray.serve.catalog import WHOLE, Catalog, Found, Ref, Rows, Shard, Wanted
from unime_ray.serve.live import LiveLog, LogRow, Put
from unime_ray.serve.payloads import Payloads
from unime_ray.serve.pool import known_vectors, pool_rows, save_vectors
from unime_ray.serve.stages import IndexState, NewItem, Page

log = logging.getLogger("unime_ray.serve")


class RetrieverEngine:
    """Thread-safe. `revision` is the embedder's: vectors of no other are searched. `shard`: the part it holds."""

    def __init__(self, bundle: Bundle, shard: Shard = WHOLE) -> None:
        self.shard = shard
        self.run, self.config = bundle.run, bundle.config.index
        self.revision, self.dim = bundle.embedder.revision, bundle.embedder.dim
        self.payload = bundle.payload()
        self.live = LiveLog(bundle.run)
        self._texts = Payloads(self.payload, self.live, pictures=False)
        self._pool = pool_rows(bundle.run, shard)
        self._vectors = known_vectors(bundle.run, self.revision, shard)
        self._unusable: set[bytes] = set()
        self._given_up: set[int] = set()
        self._write_lock = threading.Lock()
        self._rebuilding = threading.Lock()
        self.catalog = self._build()

    @property
    def missing(self) -> list[bytes]:
        """Pool items without a vector of this revision."""
        known = self._vectors.keys() | self._unusable
        return [ref.item_id for ref in self._pool.refs if ref.item_id not in known]

    @property
    def stale(self) -> list[LogRow]:
        """Live items to be embedded again: another revision made their vector, and this one has not failed at them."""
        return [row for row in self.catalog.stale if row.row not in self._given_up]

    def give_up(self, rows: Sequence[LogRow], errors: Sequence[str | None]) -> None:
        """Note which of `rows` this embedder cannot embed: they are not searched, nor tried for ever."""
        for row, error in zip(rows, errors, strict=True):
            if error is not None:
                log.warning("item %s is not indexed: %s", row.id, error)
                self._given_up.add(row.row)

    def take_in(self, ids: Sequence[bytes], vectors_ND: np.ndarray, errors: Sequence[str | None]) -> None:
        """Keep the vectors of pool items embedded just now; they are searched after `rebuild`."""
        good = [row for row, error in enumerate(errors) if error is None]
        for identifier, error in zip(ids, errors, strict=True):
            if error is not None:
                log.warning("item %s is not indexed: %s", show(identifier), error)
                self._unusable.add(identifier)
        if good:
            save_vectors(self.run, self.revision, [ids[row] for row in good], vectors_ND[good])
        self._vectors |= {ids[row]: vectors_ND[row] for row in good}

    def rebuild(self) -> bool:
        """Build a new snapshot from the truth and switch to it; False if another thread is at it already."""
        if not self._rebuilding.acquire(blocking=False):
            return False
        try:
            catalog = self._build()
            with self._write_lock:
                catalog.apply(self.live.read_from(catalog.version))
                self.catalog = catalog
        finally:
            self._rebuilding.release()
        return True

    def refresh(self) -> None:
        """Take in what anyone has written since."""
        with self._write_lock:
            self.catalog.apply(self.live.read_from(self.catalog.version))

    def needs_rebuild(self) -> bool:
        return self.catalog.tail_rows >= self.config.rebuild_after

    def search(
        self, vectors_QD: np.ndarray, ks: Sequence[int], wanted: Sequence[Wanted]
    ) -> list[list[tuple[Found, Item]]]:
        """Hits of several queries, with texts; pictures are left out."""
        found = self.catalog.search(vectors_QD, ks, wanted)
        items = iter(self._texts.items([hit.ref for hits in found for hit in hits]))
        return [[(hit, next(items)) for hit in hits] for hits in found]

    def write(self, items: Sequence[NewItem], vectors_ND: np.ndarray) -> tuple[list[str], int]:
        """(ids, version): durable and searchable when this returns."""
        names = [new.name for new in items]
        puts = [
            Put(name, new.item, new.dataset, new.split, self.revision, vector)
            for name, new, vector in zip(names, items, vectors_ND, strict=True)
        ]
        self.live.append_puts(puts)
        self.refresh()
        return names, self.catalog.version

    def delete(self, name: str) -> int | None:
        """The version after the deletion, or None if there is no such item."""
        if self.catalog.get(name) is None:
            self.refresh()
            if self.catalog.get(name) is None:
                return None
        self.live.append_deletes([name])
        self.refresh()
        return self.catalog.version

    def reembedded(self, rows: Sequence[LogRow], items: Sequence[Item], vectors_ND: np.ndarray) -> None:
        """Write live items again with vectors of this revision, unless someone has changed them meanwhile."""
        still = {row.id: row.row for row in self.catalog.stale}
        puts = [
            Put(row.id, item, row.dataset, row.split, self.revision, vector)
            for row, item, vector in zip(rows, items, vectors_ND, strict=True)
            if still.get(row.id) == row.row
        ]
        if puts:
            self.live.append_puts(puts)
            self.refresh()

    def get(self, name: str) -> tuple[Ref, Item] | None:
        ref = self.catalog.get(name)
        return None if ref is None else (ref, self._texts.items([ref])[0])

    def page(self, start: int, limit: int, wanted: Wanted) -> Page:
        refs, following, total = self.catalog.page(start, limit, wanted)
        return Page(list(zip(refs, self._texts.items(refs), strict=True)), following, total)

    def picture(self, name: str) -> tuple[bytes, bytes] | None:
        """(image id, encoded picture) of the item called `name`."""
        ref = self.catalog.get(name)
        if ref is None or ref.image_id is None:
            return None
        data = Payloads(self.payload, self.live, pictures=True, cache_bytes=0).items([ref])[0].image
        return None if data is None else (ref.image_id, data)

    def state(self) -> IndexState:
        catalog = self.catalog
        report = catalog.snapshot.report
        built = f"{report.factory}: {report.rows} rows in {report.seconds:.2f} s, recall@10 {report.recall:.3f}"
        return IndexState(
            revision=self.revision,
            dim=catalog.dim,
            indexed=len(catalog),
            expected=len(catalog) + self._pending + len(self.stale),
            live=catalog.num_live,
            version=catalog.version,
            groups=catalog.groups(),
            built=built,
        )

    def _build(self) -> Catalog:
        known = [place for place, ref in enumerate(self._pool.refs) if ref.item_id in self._vectors]
        number = {old: new for new, old in enumerate(known)}
        refs = [self._pool.refs[place] for place in known]
        groups = {group: [number[row] for row in rows if row in number] for group, rows in self._pool.groups.items()}
        log_rows = self.live.read_from(0)
        self._pending = len(self._pool.refs) - len(refs) - len(self._unusable)
        vectors = [self._vectors[ref.item_id] for ref in refs]
        vectors_ND = np.array(vectors, np.float32).reshape(len(refs), self.dim)
        return Catalog(Rows(refs, groups), vectors_ND, self.config, self.revision, log_rows, self.shard)
