"""Duplicates: groups of pictures by perceptual hash, and of items by the cosine of their embeddings.

Runs between embed and retrieve when `duplicates.methods` names any method. Retrieve then takes no candidate from the
group of a query or of its positives (they would be false negatives), and `duplicates.leak: drop` keeps training items
out of mining that are held out under another name. Needs a Ray cluster.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ray.data import Dataset

from unime_ray.artifacts import Artifact, Manifest, Run, StageResult, remove, run_stage
from unime_ray.config import EmbedConfig, Resources, RunConfig
from unime_ray.corpus.lance_io import open_lance
from unime_ray.corpus.payload import PayloadStore
from unime_ray.corpus.phash import COLORS, perceptual_hash
from unime_ray.errors import ConfigError, RejectedRow
from unime_ray.grouping import Pair, near_hashes, near_vectors, spanning
from unime_ray.schemas import DUPLICATES, ID
from unime_ray.stages.embed import ItemEmbedder, load_embedder, mining_items, run_embed
from unime_ray.stages.engine import blocks_of, map_actors, map_tasks, stage_context
from unime_ray.stages.twins import NearGroups, held_out_items, leaked_items

CODE_VERSION = 1
HELD_OUT = "held_out"
"""Name of the embeddings of held-out items, which mining does not need and this stage makes."""
MAX_ACTORS = 64
PICTURES_AT_ONCE = 32
"""Held in memory, each of up to `corpus.image.max_source_bytes`."""

log = logging.getLogger(__name__)

_HASHES = pa.schema([("image_id", ID), ("phash", pa.uint64()), ("colors", pa.binary(COLORS))])
_LINKS = pa.schema([("a", pa.int64()), ("b", pa.int64()), ("distance", pa.float64())])


def run_duplicates(
    run: Run, config: RunConfig, load: Callable[[EmbedConfig], ItemEmbedder] = load_embedder
) -> Manifest:
    """Write `duplicates`: one row per member of a group of at least two; the manifest counts groups and leaks.

    Raises:
        ConfigError: `duplicates.methods` is empty.
        ArtifactError: ingest has not run; or embed, for the method `embedding`.
    """
    settings, artifact = config.duplicates, run.artifact("duplicates")
    if not settings.methods:
        raise ConfigError("duplicates.methods is empty: nothing to compare by")
    vectors = _embedded(run, config, load) if "embedding" in settings.methods else []

    def build() -> StageResult:
        remove(artifact.data_uri)  # an attempt that was killed starts over
        rows: list[pa.Table] = []
        counts: dict[str, Any] = {}
        with stage_context():
            if "phash" in settings.methods:
                table, found = _by_hash(run, config)
                rows, counts = [*rows, table], counts | found
            if vectors:
                table, found = _by_vector(run, config, vectors)
                rows, counts = [*rows, table], counts | found
        groups = pa.concat_tables(rows)
        artifact.write(groups, DUPLICATES)
        leaked = len(leaked_items(run, NearGroups.of(groups)))
        if leaked:
            what = (
                "are left out of mining" if settings.leak == "drop" else "stay (duplicates.leak: drop leaves them out)"
            )
            log.warning(
                "%d training items with a picture are held out too, as they are or nearly: they %s", leaked, what
            )
        return StageResult(groups.num_rows, counts | {"leaked_items": leaked})

    return run_stage(
        artifact,
        stage="duplicates",
        code_version=CODE_VERSION,
        config=settings.model_dump(mode="json", exclude={"leak", "rows_per_task", "num_cpus"}),
        inputs=[*(run.artifact(table) for table in ("images", "items", "qrels", "pools")), *vectors],
        build=build,
    )


def _embedded(run: Run, config: RunConfig, load: Callable[[EmbedConfig], ItemEmbedder]) -> list[Artifact]:
    """The embeddings to compare: those of mining, and of what is held out, made here."""
    base = run.artifact("embeddings", "base")
    base.require()
    mined = set(mining_items(run).to_pylist())
    others = [item for item in held_out_items(run).to_pylist() if item not in mined]
    if not others:
        return [base]
    run_embed(run, config, HELD_OUT, item_ids=others, load=load)
    return [base, run.artifact("embeddings", HELD_OUT)]


def _by_hash(run: Run, config: RunConfig) -> tuple[pa.Table, dict[str, Any]]:
    settings = config.duplicates
    ids = open_lance(run.artifact("images").data_uri).to_table(columns=["image_id"])
    store = PayloadStore(run.artifact("images").data_uri, run.artifact("items").data_uri)
    arguments = {"store": store, "policy": config.corpus.image}
    blocks = blocks_of(ids, settings.rows_per_task)
    parts = _tables(map_tasks(blocks, hash_pictures, arguments))
    hashes = pa.concat_tables([_HASHES.empty_table(), *(part.cast(_HASHES) for part in parts)]).sort_by("image_id")
    pairs = near_hashes(
        hashes.column("phash").to_numpy(),
        np.frombuffer(b"".join(hashes.column("colors").to_pylist()), np.uint8).reshape(-1, COLORS),
        settings.max_hamming,
        settings.max_color,
    )
    table, counts = _rows(pairs, hashes.column("image_id").to_pylist(), "image_id", "phash")
    return table, {"images": ids.num_rows, "images_unreadable": ids.num_rows - hashes.num_rows} | counts


def hash_pictures(batch: pa.Table, store: PayloadStore, policy: Any) -> pa.Table:
    """Ray Data: (image_id) -> (image_id, phash, colors); a picture that does not decode gives no row."""
    ids = batch.column("image_id").to_pylist()
    rows = []
    for start in range(0, len(ids), PICTURES_AT_ONCE):
        for identifier, data in store.images(ids[start : start + PICTURES_AT_ONCE]).items():
            try:
                phash, colors = perceptual_hash(data, policy)
            except RejectedRow:
                continue
            rows.append({"image_id": identifier, "phash": phash, "colors": colors})
    return pa.Table.from_pylist(rows, _HASHES)


def _by_vector(run: Run, config: RunConfig, vectors: Sequence[Artifact]) -> tuple[pa.Table, dict[str, Any]]:
    settings = config.duplicates
    kinds = _kinds(run)
    ids = sorted((kinds[item], item) for item in _ids(vectors))
    starts = pa.table({"start": np.arange(0, len(ids), settings.rows_per_task)})
    blocks = blocks_of(starts, 1)
    resources = Resources(num_actors=1, max_actors=min(MAX_ACTORS, len(blocks)), num_cpus=settings.num_cpus)
    arguments = {
        "vectors": list(vectors),
        "order": ids,
        "rows": settings.rows_per_task,
        "min_cosine": settings.min_cosine,
    }
    found = _tables(map_actors(blocks, NearActor, arguments, resources, 1))
    pairs = (pair for part in found for pair in zip(*(part.column(at).to_pylist() for at in range(3)), strict=True))
    return _rows(pairs, [item for _, item in ids], "item_id", "embedding")


class NearActor:
    """Ray Data: (first row of a block) -> (a, b, distance) of near items of one kind. Holds every vector."""

    def __init__(
        self, vectors: Sequence[Artifact], order: Sequence[tuple[int, bytes]], rows: int, min_cosine: float
    ) -> None:
        tables = [artifact.read() for artifact in vectors]
        place = {item: row for row, (_, item) in enumerate(order)}
        width = tables[0].column("embedding").type.list_size
        self._vectors_ND = np.empty((len(order), width), np.float32)
        for table in tables:
            flat = table.column("embedding").combine_chunks().flatten().to_numpy(zero_copy_only=False)
            self._vectors_ND[[place[item] for item in table.column("item_id").to_pylist()]] = flat.reshape(-1, width)
        kinds = np.array([kind for kind, _ in order])
        self._ends = {int(kind): int(np.flatnonzero(kinds == kind)[-1]) + 1 for kind in np.unique(kinds)}
        self._kinds, self._rows, self._min_cosine = kinds, rows, min_cosine

    def __call__(self, batch: pa.Table) -> pa.Table:
        start = batch.column("start")[0].as_py()
        stop = min(start + self._rows, len(self._kinds))
        links = spanning(self._near(start, stop))
        return pa.table([list(column) for column in zip(*links, strict=True)] or [[], [], []], schema=_LINKS)

    def _near(self, start: int, stop: int) -> Iterator[Pair]:
        """Items are ordered by kind, so that each part of the block is compared with the rest of its kind."""
        while start < stop:
            end = self._ends[int(self._kinds[start])]
            yield from near_vectors(self._vectors_ND[:end], start, min(stop, end), self._min_cosine)
            start = end


def _rows(pairs: Iterator[Pair], ids: Sequence[bytes], column: str, method: str) -> tuple[pa.Table, dict[str, Any]]:
    """Rows of `duplicates` and the counts for the manifest."""
    members = spanning(pairs)
    groups: dict[int, list[int]] = {}
    for thing, first, _ in members:
        groups.setdefault(first, []).append(thing)
    names = {first: min(ids[thing] for thing in things) for first, things in groups.items()}
    rows = [
        {column: ids[thing], "group_id": names[first], "method": method, "distance": distance}
        for thing, first, distance in members
    ]
    largest = max((len(things) for things in groups.values()), default=0)
    counts = {f"{method}_groups": len(groups), f"{method}_members": len(rows), f"{method}_largest": largest}
    return pa.Table.from_pylist(rows, DUPLICATES), counts


def _tables(dataset: Dataset) -> Iterator[pa.Table]:
    """What comes out of Ray Data, block by block."""
    yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow")  # type: ignore[misc]


def _ids(vectors: Sequence[Artifact]) -> list[bytes]:
    return [item for artifact in vectors for item in artifact.read(["item_id"]).column(0).to_pylist()]


def _kinds(run: Run) -> dict[bytes, int]:
    """What each item is made of: 1 text, 2 a picture, 3 both. Only like is compared with like."""
    kinds: dict[bytes, int] = {}
    scanner = open_lance(run.artifact("items").data_uri).scanner(columns=["item_id", "text", "image_id"])
    for batch in scanner.to_batches():
        has_text = pc.is_valid(batch.column("text")).to_numpy(zero_copy_only=False)
        has_picture = pc.is_valid(batch.column("image_id")).to_numpy(zero_copy_only=False)
        kinds |= dict(zip(batch.column("item_id").to_pylist(), (has_text + 2 * has_picture).tolist(), strict=True))
    return kinds
