"""Random access to texts and pictures by id, from the `items` and `images` datasets of a run.

Tables of the later stages carry ids; whoever needs what they stand for (judge, training, serving) asks a
`PayloadStore` inside its own process. An id's row is found in a sorted index of 24 bytes an id, built by one scan of
the id column; pictures stay in a bounded cache of encoded bytes.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from unime_ray.corpus.lance_io import open_lance
from unime_ray.errors import ArtifactError
from unime_ray.ids import ID_BYTES, show

if TYPE_CHECKING:
    import lance

DEFAULT_CACHE_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Item:
    """What a model gets for one id: `rendered` is the exact text, `image` the encoded picture the marker stands for."""

    item_id: bytes
    rendered: str
    text: str | None
    image_id: bytes | None
    image: bytes | None


class IdIndex:
    """Row number by id. N ids take 24 N bytes; a lookup is a binary search."""

    def __init__(self, ids: pa.ChunkedArray) -> None:
        keys_N2 = _as_words(ids.combine_chunks())
        self._rows_N = np.lexsort((keys_N2[:, 1], keys_N2[:, 0]))
        self._keys_N2 = keys_N2[self._rows_N]

    def __len__(self) -> int:
        return len(self._rows_N)

    def rows(self, ids: Sequence[bytes], where: str) -> list[int]:
        """The row of each id.

        Raises:
            ArtifactError: an id is not there; `where` names the table in the message.
        """
        wanted_M2 = np.frombuffer(b"".join(ids), dtype=">u8").reshape(-1, 2)
        starts_M = np.searchsorted(self._keys_N2[:, 0], wanted_M2[:, 0])
        found = []
        for identifier, wanted, start in zip(ids, wanted_M2, starts_M, strict=True):
            at = int(start)
            # Different ids may share the first eight bytes: walk on while they do.
            while at < len(self) and self._keys_N2[at, 0] == wanted[0] and self._keys_N2[at, 1] != wanted[1]:
                at += 1
            if at == len(self) or self._keys_N2[at, 0] != wanted[0]:
                raise ArtifactError(
                    f"{where}: no row with id {show(identifier)}; the run's tables do not belong together"
                )
            found.append(int(self._rows_N[at]))
        return found


class _Table:
    """A Lance dataset opened on first use, with its id index."""

    def __init__(self, uri: str, id_column: str) -> None:
        self.uri, self.id_column = uri, id_column
        self._lock = threading.Lock()
        self._opened: tuple[lance.LanceDataset, IdIndex] | None = None

    def take(self, ids: Sequence[bytes], columns: list[str]) -> pa.Table:
        """The rows of `ids`, in their order, repeated where an id is."""
        dataset, index = self._open()
        unique = list(dict.fromkeys(ids))
        taken = dataset.take(index.rows(unique, self.uri), columns=columns)
        if len(unique) == len(ids):
            return taken
        position = {identifier: row for row, identifier in enumerate(unique)}
        return taken.take([position[identifier] for identifier in ids])

    def _open(self) -> tuple[lance.LanceDataset, IdIndex]:
        with self._lock:
            if self._opened is None:
                dataset = open_lance(self.uri)
                self._opened = dataset, IdIndex(dataset.to_table(columns=[self.id_column]).column(0))
            return self._opened


class PayloadStore:
    """Items and pictures of a run by id; safe to use from several threads, and cheap to send to another process.

    Args:
        images_uri: `run.artifact("images").data_uri`.
        items_uri: `run.artifact("items").data_uri`.
        cache_bytes: bound of the encoded pictures kept in memory; the least recently used go first.
    """

    def __init__(self, images_uri: str, items_uri: str, cache_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self._arguments = (images_uri, items_uri, cache_bytes)
        self._images = _Table(images_uri, "image_id")
        self._items = _Table(items_uri, "item_id")
        self._cache: OrderedDict[bytes, bytes] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[PayloadStore], tuple[str, str, int]]:
        """Only the addresses travel: each process opens and caches for itself."""
        return PayloadStore, self._arguments

    def items(self, ids: Sequence[bytes], pictures: bool = True) -> list[Item]:
        """One `Item` per id, in order; ids may repeat. Without `pictures` their bytes stay where they are.

        Raises:
            ArtifactError: an id is in neither table, or a dataset is missing.
        """
        if not ids:
            return []
        table = self._items.take(ids, ["item_id", "rendered", "text", "image_id"])
        columns = [table.column(name).to_pylist() for name in ("item_id", "rendered", "text", "image_id")]
        encoded = self.images([image for image in columns[3] if image is not None]) if pictures else {}
        rows = zip(*columns, strict=True)
        return [Item(item, rendered, text, image, encoded.get(image)) for item, rendered, text, image in rows]

    def instructions(self, ids: Sequence[bytes]) -> list[str | None]:
        """The instruction of each item, in order; `rendered` has it fused with the text.

        Raises:
            ArtifactError: an id is not in `items`.
        """
        return self._items.take(ids, ["instruction"]).column(0).to_pylist() if ids else []

    def images(self, ids: Sequence[bytes]) -> dict[bytes, bytes]:
        """Encoded picture by image id.

        Raises:
            ArtifactError: an id is not in `images`.
        """
        found, missing = self._from_cache(dict.fromkeys(ids))
        if missing:
            table = self._images.take(missing, ["image_id", "bytes"])
            fresh = dict(zip(table.column(0).to_pylist(), table.column(1).to_pylist(), strict=True))
            self._keep(fresh)
            found |= fresh
        return found

    def _from_cache(self, ids: dict[bytes, None]) -> tuple[dict[bytes, bytes], list[bytes]]:
        found: dict[bytes, bytes] = {}
        with self._lock:
            for identifier in ids:
                if identifier in self._cache:
                    self._cache.move_to_end(identifier)
                    found[identifier] = self._cache[identifier]
        return found, [identifier for identifier in ids if identifier not in found]

    def _keep(self, fresh: dict[bytes, bytes]) -> None:
        limit = self._arguments[2]
        with self._lock:
            for identifier, data in fresh.items():
                if identifier not in self._cache:
                    self._cache[identifier] = data
                    self._cached_bytes += len(data)
            while self._cached_bytes > limit and self._cache:
                self._cached_bytes -= len(self._cache.popitem(last=False)[1])


def _as_words(ids: pa.Array) -> np.ndarray:
    """(N, 2) big-endian 64-bit words of N 16-byte ids, whose order is the order of the bytes."""
    if ids.type.byte_width != ID_BYTES:
        raise ArtifactError(f"ids have type {ids.type}, not {ID_BYTES}-byte binaries; run ingest again")
    buffer = ids.buffers()[1]
    flat = np.frombuffer(buffer, dtype=">u8") if buffer is not None else np.empty(0, dtype=">u8")
    return flat.reshape(-1, 2)[ids.offset : ids.offset + len(ids)].astype(np.uint64)
