"""Items by reference, kept once read: the same few thousand are found again and again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

from unime_ray.corpus.payload import Item, PayloadStore
from unime_ray.serve.catalog import Ref
from unime_ray.serve.live import LiveLog

CACHE_BYTES = 64 << 20
ITEM_OVERHEAD = 400
"""Bytes of the Python objects around a text."""
Key = tuple[bytes, int | None]


class Payloads:
    """Thread-safe. `pictures` False: items come without their picture, and none is read. Content never changes under a
    reference, so nothing kept goes stale."""

    def __init__(self, payload: PayloadStore, live: LiveLog, pictures: bool, cache_bytes: int = CACHE_BYTES) -> None:
        self.payload, self.live, self.pictures, self.cache_bytes = payload, live, pictures, cache_bytes
        self._kept: OrderedDict[Key, Item] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def items(self, refs: Sequence[Ref]) -> list[Item]:
        """Payload of items in order: those without a log row from the run, the others from the live log."""
        unique = {_key(ref): ref for ref in refs}
        found = self._known(unique)
        missing = [ref for key, ref in unique.items() if key not in found]
        if missing:
            read = dict(zip([_key(ref) for ref in missing], self._read(missing), strict=True))
            self._keep(read)
            found |= read
        return [found[_key(ref)] for ref in refs]

    def _read(self, refs: Sequence[Ref]) -> list[Item]:
        stored = [ref.item_id for ref in refs if ref.log_row is None]
        written = [ref.log_row for ref in refs if ref.log_row is not None]
        from_run = iter(self.payload.items(stored, self.pictures))
        from_log = iter(self.live.items(written, self.pictures))
        return [next(from_run) if ref.log_row is None else next(from_log) for ref in refs]

    def _known(self, unique: dict[Key, Ref]) -> dict[Key, Item]:
        with self._lock:
            found = {key: self._kept[key] for key in unique if key in self._kept}
            for key in found:
                self._kept.move_to_end(key)
        return found

    def _keep(self, read: dict[Key, Item]) -> None:
        with self._lock:
            for key, item in read.items():
                if key not in self._kept:
                    self._kept[key] = item
                    self._bytes += _size(item)
            while self._bytes > self.cache_bytes and self._kept:
                self._bytes -= _size(self._kept.popitem(last=False)[1])


def _key(ref: Ref) -> Key:
    return ref.item_id, ref.log_row


def _size(item: Item) -> int:
    return ITEM_OVERHEAD + len(item.rendered) + len(item.text or "") + len(item.image or b"")
