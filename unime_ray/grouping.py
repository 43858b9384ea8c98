"""Groups of near-duplicates: which pairs are near, and the groups that such pairs link. Pure: no ray, no torch.

Groups are transitive: a chain of pairs, each near, is one group, however far its ends are apart.

Shape suffixes: N things, B of them in a block, D dimensions, C colors of a thumbnail.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

HASH_BITS = 64
COLUMNS = 8192

Pair = tuple[int, int, float]
"""Positions of two things and their distance."""


class Groups:
    """Disjoint groups of whatever was joined; each thing is a position."""

    def __init__(self) -> None:
        self._parent: dict[int, int] = {}
        self._nearest: dict[int, float] = {}

    def join(self, a: int, b: int, distance: float) -> None:
        """Put two things, `distance` apart, into one group."""
        low, high = sorted((self._root(a), self._root(b)))
        self._parent[high] = low
        for thing in (a, b):
            self._nearest[thing] = min(self._nearest.get(thing, distance), distance)

    def members(self) -> list[Pair]:
        """(thing, the first thing of its group, distance to the nearest it was joined with), in order."""
        return [(thing, self._root(thing), self._nearest[thing]) for thing in sorted(self._parent)]

    def _root(self, thing: int) -> int:
        parent = self._parent
        parent.setdefault(thing, thing)
        while parent[thing] != thing:
            parent[thing] = parent[parent[thing]]
            thing = parent[thing]
        return thing


def near_hashes(hashes_N: np.ndarray, colors_NC: np.ndarray, max_hamming: int, max_color: int) -> Iterator[Pair]:
    """Pairs of hashes at most `max_hamming` bits apart whose colors nowhere differ by more than `max_color`.

    Exact, without comparing all pairs: cut into `max_hamming` + 1 bands, two such hashes agree in one band at least,
    so only those that share a band are compared. A pair may come several times.

    Args:
        hashes_N: uint64.
        colors_NC: uint8.
    """
    num_bands = max_hamming + 1
    edges = [HASH_BITS * band // num_bands for band in range(num_bands + 1)]
    colors_NC = colors_NC.astype(np.int16)
    for low, high in zip(edges, edges[1:], strict=False):
        mask = np.uint64((1 << (high - low)) - 1)
        band_N = (hashes_N >> np.uint64(low)) & mask
        order_N = np.argsort(band_N, kind="stable")
        _, starts = np.unique(band_N[order_N], return_index=True)
        for bucket in np.split(order_N, starts[1:]):
            for place in range(len(bucket) - 1):
                yield from _near_one(bucket[place], bucket[place + 1 :], hashes_N, colors_NC, max_hamming, max_color)


def _near_one(
    one: int, others: np.ndarray, hashes_N: np.ndarray, colors_NC: np.ndarray, max_hamming: int, max_color: int
) -> Iterator[Pair]:
    distances = np.bitwise_count(hashes_N[others] ^ hashes_N[one])
    for other, distance in zip(others[distances <= max_hamming], distances[distances <= max_hamming], strict=True):
        if np.abs(colors_NC[other] - colors_NC[one]).max(initial=0) <= max_color:
            yield int(one), int(other), float(distance)


def near_vectors(vectors_ND: np.ndarray, start: int, stop: int, min_cosine: float) -> Iterator[Pair]:
    """Pairs (a, b), a in [start, stop) and before b, of unit vectors whose cosine is at least `min_cosine`.

    Exact: every row of the block is compared with every later row. The distance is 1 - cosine, 0 at least.

    Args:
        vectors_ND: float32.
    """
    for first in range(start, len(vectors_ND), COLUMNS):
        cosines_BM = vectors_ND[start:stop] @ vectors_ND[first : first + COLUMNS].T
        for row, column in zip(*np.nonzero(cosines_BM >= min_cosine), strict=True):
            if start + row < first + column:
                yield start + int(row), first + int(column), max(0.0, 1.0 - float(cosines_BM[row, column]))


def spanning(pairs: Iterable[Pair]) -> list[Pair]:
    """Fewer pairs that link the same groups: each member with the first of its group, at its own nearest distance."""
    groups = Groups()
    for a, b, distance in pairs:
        groups.join(a, b, distance)
    return groups.members()
