"""A faiss snapshot of vectors: built once, searched under a mask of the rows that are wanted.

Shape suffixes: Q queries, N rows, D dimensions, K results.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

from unime_ray.config_serve import IndexConfig

PRECISIONS = {"float32": "Flat", "float16": "SQfp16", "int8": "SQ8"}
RECALL_QUERIES, RECALL_AT = 64, 10
MIN_ROWS_PER_LIST = 39
"""faiss warns below so many training rows a cluster."""


@dataclass(frozen=True)
class BuildReport:
    """What was built, in how many seconds, and the share of the exact nearest ten it finds (of sampled rows)."""

    factory: str
    rows: int
    seconds: float
    recall: float


class Snapshot:
    """Rows are numbered as they were given; similarity is the inner product of unit vectors."""

    def __init__(self, vectors_ND: np.ndarray, config: IndexConfig) -> None:
        started = time.monotonic()
        self.config = config
        self.num_rows, self.dim = vectors_ND.shape
        vectors_ND = np.ascontiguousarray(vectors_ND, np.float32)
        name = self._factory()
        self._index = faiss.index_factory(self.dim, name, faiss.METRIC_INNER_PRODUCT)
        if self.num_rows:
            self._index.train(vectors_ND)
            self._index.add(vectors_ND)
        if config.memory_map:
            self._index = _mapped(self._index)
        shown = f"{name}, memory-mapped" if config.memory_map else name
        self.report = BuildReport(shown, self.num_rows, time.monotonic() - started, self._recall(vectors_ND))

    def search(self, queries_QD: np.ndarray, k: int, wanted_N: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """(similarities, rows), both (Q, K), descending; row -1 where fewer than `k` were found.

        Args:
            wanted_N: bool (N,): only these rows (None: all).
        """
        k = min(k, self.num_rows if wanted_N is None else int(wanted_N.sum()))
        if k == 0:
            empty = np.empty((len(queries_QD), 0))
            return empty.astype(np.float32), empty.astype(np.int64)
        bits = None if wanted_N is None else np.packbits(wanted_N, bitorder="little")
        library: Any = faiss
        selector = None if bits is None else library.IDSelectorBitmap(bits)
        queries_QD = np.ascontiguousarray(queries_QD, np.float32)
        return self._index.search(queries_QD, k, params=self._parameters(selector))

    def _parameters(self, selector: Any) -> Any:
        library: Any = faiss  # its stubs miss the keyword arguments of SWIG's classes
        if isinstance(self._index, faiss.IndexIVF):
            return library.SearchParametersIVF(sel=selector, nprobe=self.config.ivf_probes)
        if isinstance(self._index, faiss.IndexHNSW):
            return library.SearchParametersHNSW(sel=selector, efSearch=self.config.hnsw_ef_search)
        return library.SearchParameters(sel=selector)

    def _factory(self) -> str:
        codes = PRECISIONS[self.config.precision]
        if self.config.kind == "hnsw":
            return f"HNSW{self.config.hnsw_links},{codes}"
        if self.config.kind == "ivf":
            # A small pool gets fewer lists: each needs rows to be trained on.
            lists = max(1, min(self.config.ivf_lists, self.num_rows // MIN_ROWS_PER_LIST))
            return f"IVF{lists},{codes}"
        return codes

    def _recall(self, vectors_ND: np.ndarray) -> float:
        if self._factory() == "Flat" or not self.num_rows:
            return 1.0
        rows = np.random.default_rng(0).choice(self.num_rows, min(RECALL_QUERIES, self.num_rows), replace=False)
        k = min(RECALL_AT, self.num_rows)
        _, exact = faiss.knn(vectors_ND[rows], vectors_ND, k, metric=faiss.METRIC_INNER_PRODUCT)
        _, found = self.search(vectors_ND[rows], k, None)
        hits = sum(len(set(a) & set(b)) for a, b in zip(exact.tolist(), found.tolist(), strict=True))
        return hits / (len(rows) * k)


def _mapped(index: Any) -> Any:
    """The same index, read from a file without copying it into memory. The file has no name left: it ends with us."""
    library: Any = faiss
    with tempfile.NamedTemporaryFile(prefix="unime-ray-", suffix=".faiss") as file:
        library.write_index(index, file.name)
        return library.read_index(file.name, library.IO_FLAG_MMAP_IFC)
