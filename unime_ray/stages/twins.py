"""Which items stand for the same thing: equal text and picture under any instruction, and, where the stage
`duplicates` has run, near-duplicates of them. And which training items are held out under another name.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from unime_ray.artifacts import Run
from unime_ray.corpus.lance_io import open_lance
from unime_ray.schemas import ID
from unime_ray.stages.embed import MINED_SPLIT, mining_items

Keys = tuple[bytes, ...]


@dataclass(frozen=True)
class NearGroups:
    """Group by image id (perceptual hashes) and by item id (embeddings); without any, only equals are twins."""

    images: Mapping[bytes, bytes] = field(default_factory=dict)
    items: Mapping[bytes, bytes] = field(default_factory=dict)

    @classmethod
    def of(cls, table: pa.Table) -> NearGroups:
        """From the rows of `duplicates`."""
        groups = table.column("group_id").to_pylist()
        images, items = (
            {key: group for key, group in zip(table.column(name).to_pylist(), groups, strict=True) if key is not None}
            for name in ("image_id", "item_id")
        )
        return cls(images, items)


def item_keys(run: Run, near: NearGroups) -> Iterator[tuple[bytes, bool, Keys]]:
    """(item id, whether it has a picture, its keys) of every item: two that share a key are twins."""
    scanner = open_lance(run.artifact("items").data_uri).scanner(columns=["item_id", "text", "image_id"])
    for batch in scanner.to_batches():
        for item, text, image in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            content = (near.images.get(image, image) or b"") + b"\x00" + (text or "").strip().encode()
            keys: Keys = (hashlib.blake2b(content, digest_size=16).digest(),)
            if item in near.items:
                keys += (b"near" + near.items[item],)
            yield item, image is not None, keys


def same_content(run: Run, ids: set[bytes], pool: pa.Array, near: NearGroups) -> Mapping[bytes, list[bytes]]:
    """For each of `ids` its twins in the pool."""
    keys: dict[bytes, Keys] = {}
    members: dict[bytes, list[bytes]] = defaultdict(list)
    in_pool = set(pool.to_pylist())
    for item, _, found in item_keys(run, near):
        if item in ids:
            keys[item] = found
        if item in in_pool:
            for key in found:
                members[key].append(item)
    twins = {item: sorted({one for key in found for one in members.get(key, ())}) for item, found in keys.items()}
    return {item: found for item, found in twins.items() if found}


def leaked_items(run: Run, near: NearGroups) -> set[bytes]:
    """Training items with a picture that are held out too, themselves or as a twin.

    Items of text alone are no leak: labels and common captions rightly stand in every split.
    """
    training, held_out = set(mining_items(run).to_pylist()), set(held_out_items(run).to_pylist())
    keys: dict[bytes, Keys] = {}
    barred: set[bytes] = set()
    for item, has_picture, found in item_keys(run, near):
        if not has_picture:
            continue
        if item in training:
            keys[item] = found
        if item in held_out:
            barred.update(found)
    return {item for item, found in keys.items() if not barred.isdisjoint(found)}


def held_out_items(run: Run) -> pa.Array:
    """Ids of queries, positives and pool items of every split that is not mined."""
    columns = []
    for table, names in (("qrels", ("query_id", "item_id")), ("pools", ("item_id",))):
        rows = run.artifact(table).read(["split", *names])
        rows = rows.filter(pc.not_equal(rows.column("split"), MINED_SPLIT))
        columns += [rows.column(name) for name in names]
    return _unique(columns)


def _unique(columns: Iterable[pa.ChunkedArray]) -> pa.Array:
    return pa.chunked_array([chunk for column in columns for chunk in column.chunks], ID).unique()
