"""From the staged units to the tables of a run: duplicates out, one row per id, qrels and pools.

Works on ids alone: no text and no picture passes through here. `Corpus` says which staged rows of `items` and `images`
are kept; whoever writes those tables streams the payload from the staged files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unime_ray.artifacts import filesystem
from unime_ray.corpus.staging import UnitSummary, read_staged, staged
from unime_ray.corpus.units import STAGE
from unime_ray.schemas import EVAL_CANDIDATES, HARD_NEGATIVES, ID, POOLS, QRELS, REJECTS, conform

ROW_COLUMNS = ["unit", "source_index", "source", "row", "dataset", "split", "meta_task", "row_id", "query_id"]
ROW_COLUMNS += ["positive_ids", "relevances", "negative_ids", "negative_scores", "positive_score", "item_id"]


@dataclass
class Corpus:
    """All staged units of one ingest, in order."""

    folder: str
    units: Sequence[UnitSummary]

    @cached_property
    def rows(self) -> pa.Table:
        """The good rows, without those that repeat an id of their source."""
        return self._staged_rows.filter(self._is_first)

    @cached_property
    def rejects(self) -> pa.Table:
        """Every row that cannot be used: refused when read, or repeating an id."""
        tables = [read_staged(self.folder, "rejects", unit.number) for unit in self.units if unit.rejected]
        repeated = self._staged_rows.filter(pc.invert(self._is_first))
        reasons = [
            f"duplicate id {row_id!r}: an earlier row has it (set `columns.id: null` if ids need not be unique)"
            for row_id in repeated.column("row_id").to_pylist()
        ]
        stages = [STAGE] * len(reasons)
        columns = [repeated.column("source"), repeated.column("row"), stages, reasons]
        tables.append(conform(pa.table(columns, names=REJECTS.names), REJECTS, "rejects"))
        return pa.concat_tables(tables).sort_by([("source", "ascending"), ("row", "ascending")])

    @property
    def num_rows(self) -> int:
        """Rows that were read, good and bad."""
        return sum(unit.rows + unit.rejected for unit in self.units)

    def qrels(self) -> pa.Table:
        """(query, positive) of every pair once per dataset and split; the highest relevance counts."""
        pairs = self.rows.filter(pc.is_valid(self.rows.column("query_id")))
        parents, positives = _exploded(pairs, "positive_ids")
        table = parents.select(["dataset", "split", "query_id"]).append_column("item_id", positives)
        table = table.append_column("relevance", pc.list_flatten(pairs.column("relevances")))
        keys = ["dataset", "split", "query_id", "item_id"]
        best = table.group_by(keys).aggregate([("relevance", "max")]).rename_columns([*keys, "relevance"])
        return conform(_sorted(best, keys), QRELS, "qrels")

    def pools(self) -> pa.Table:
        """Every pool row, positive and negative, in the pool of its own dataset and split: never another split's."""
        parts = [_exploded(self.rows, name) for name in ("positive_ids", "negative_ids")]
        single = self.rows.filter(pc.is_valid(self.rows.column("item_id")))
        parts.append((single, single.column("item_id")))
        columns = ["dataset", "split"]
        tables = [rows.select(columns).append_column("item_id", ids.cast(ID)) for rows, ids in parts]
        keys = [*columns, "item_id"]
        return conform(_sorted(pa.concat_tables(tables).group_by(keys).aggregate([]), keys), POOLS, "pools")

    def eval_candidates(self) -> Iterator[tuple[int, pa.Table]]:
        """(unit, its rows' own candidate lists); a unit at a time, since such lists are long."""
        good = self._positions(self.rows)
        for unit in self.units:
            if unit.has_candidates:
                table = read_staged(self.folder, "rows", unit.number)
                keep = pc.and_(pc.is_in(self._positions(table), good), pc.is_valid(table.column("candidate_ids")))
                yield unit.number, conform(table.filter(keep).select(EVAL_CANDIDATES.names), EVAL_CANDIDATES)

    def imported_negatives(self) -> pa.Table:
        """Training rows that came with scored negatives, as `hard_negatives`; their similarities are unknown (null)."""
        rows = self.rows.filter(
            pc.and_(
                pc.and_(pc.equal(self.rows.column("split"), "train"), pc.is_valid(self.rows.column("positive_score"))),
                pc.greater(pc.list_value_length(self.rows.column("negative_scores")), 0),
            )
        )
        found: dict[tuple[bytes, bytes], dict[str, Any]] = {}
        for row in rows.select(ROW_COLUMNS[8:]).to_pylist():
            negatives = row["negative_ids"]
            key = (row["query_id"], row["positive_ids"][0])
            found.setdefault(
                key,
                {
                    "query_id": key[0],
                    "positive_id": key[1],
                    "positive_score": row["positive_score"],
                    "negative_ids": negatives,
                    "negative_scores": row["negative_scores"],
                    "negative_similarities": [None] * len(negatives),
                    "negative_reasons": ["imported"] * len(negatives),
                },
            )
        return pa.Table.from_pylist(list(found.values()), HARD_NEGATIVES)

    def kept_items(self) -> list[np.ndarray]:
        """Per unit, a mask over its staged items: the first of each id that a good row names."""
        used = [self.rows.column(name) for name in ("query_id", "item_id")]
        used += [pc.list_flatten(self.rows.column(name)) for name in ("positive_ids", "negative_ids")]
        used += [pc.list_flatten(table.column("candidate_ids")) for _, table in self.eval_candidates()]
        wanted = pc.unique(pa.chunked_array([chunk for column in used for chunk in column.chunks], ID)).drop_null()
        return _first_of_each(self._id_columns("items", "item_id"), wanted)

    def kept_images(self, kept_items: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Per unit, a mask over its staged pictures: the first of each id that a kept item names."""
        columns = self._id_columns("items", "image_id")
        kept = [column.filter(pa.array(mask)) for column, mask in zip(columns, kept_items, strict=True)]
        wanted = pc.unique(pa.chunked_array([chunk for column in kept for chunk in column.chunks], ID)).drop_null()
        return _first_of_each(self._id_columns("images", "image_id"), wanted)

    def ids(self, table: str, column: str, masks: Sequence[np.ndarray]) -> pa.ChunkedArray:
        """The ids of the kept rows of a payload table."""
        columns = self._id_columns(table, column)
        kept = [ids.filter(pa.array(mask)) for ids, mask in zip(columns, masks, strict=True)]
        return pa.chunked_array([chunk for ids in kept for chunk in ids.chunks], ID)

    def paths(self) -> pa.Table:
        """The picture files looked at, with the size and time they had."""
        tables = [read_staged(self.folder, "paths", unit.number) for unit in self.units]
        return pa.concat_tables(tables).group_by("path").aggregate([("size", "max"), ("mtime_ns", "max")])

    def per_dataset(self) -> dict[str, dict[str, Any]]:
        """Good rows by `dataset/split`, pairs and pool rows apart, and the meta task of each dataset that has one."""
        keys = ["dataset", "split", "meta_task"]
        found = self.rows.group_by(keys).aggregate([("query_id", "count"), ("item_id", "count")]).to_pylist()
        counts: dict[str, dict[str, Any]] = {"pairs": {}, "pool_rows": {}, "meta_tasks": {}}
        for row in sorted(found, key=lambda row: (row["dataset"], row["split"])):
            for name, column in (("pairs", "query_id_count"), ("pool_rows", "item_id_count")):
                if row[column]:
                    key = f"{row['dataset']}/{row['split']}"
                    counts[name][key] = counts[name].get(key, 0) + row[column]
            if row["meta_task"] is not None:
                counts["meta_tasks"][row["dataset"]] = row["meta_task"]
        return counts

    @cached_property
    def _staged_rows(self) -> pa.Table:
        tables = [read_staged(self.folder, "rows", unit.number, ROW_COLUMNS) for unit in self.units]
        return pa.concat_tables(tables)

    @cached_property
    def _is_first(self) -> pa.Array:
        """Whether a staged row is the first of its source with its id; rows without an id always are."""
        keys = self._staged_rows.select(["source_index", "row_id"])
        keys = keys.append_column("at", pa.array(np.arange(keys.num_rows)))
        first = keys.group_by(["source_index", "row_id"]).aggregate([("at", "min")]).column("at_min")
        return pc.or_(pc.is_in(keys.column("at"), first.combine_chunks()), pc.is_null(keys.column("row_id")))

    def _positions(self, rows: pa.Table) -> pa.Array:
        """One number per row that identifies it among all staged rows."""
        unit, row = rows.column("unit").cast(pa.int64()), rows.column("row")
        return pc.add(pc.multiply(unit, pa.scalar(2**40)), row).combine_chunks()

    def _id_columns(self, table: str, column: str) -> list[pa.ChunkedArray]:
        return [read_staged(self.folder, table, unit.number, [column]).column(0) for unit in self.units]


def kept_batches(
    folder: str, table: str, numbers: Sequence[int], masks: Sequence[np.ndarray], schema: pa.Schema
) -> Iterator[pa.RecordBatch]:
    """Stream the kept rows of a payload table from the staged files of some units."""
    for number, mask in zip(numbers, masks, strict=True):
        if not mask.any():
            continue
        fs, path = filesystem(staged(folder, table, number))
        at = 0
        with fs.open_input_file(path) as stream:
            parquet = pq.ParquetFile(stream)
            for group in range(parquet.num_row_groups):  # each was flushed at a bounded size, whatever its rows
                rows = parquet.read_row_group(group, use_threads=False)
                kept = rows.filter(pa.array(mask[at : at + rows.num_rows]))
                at += rows.num_rows
                yield from conform(kept, schema, table).to_batches()


def digest(*columns: pa.ChunkedArray | pa.Array) -> str:
    """24 hex digits of the values of columns, in their order: the content of a table."""
    hasher = hashlib.blake2b(digest_size=12)
    for column in columns:
        hasher.update(f"{column.type}:{len(column)}:".encode())
        values = column.to_pylist()
        hasher.update(b"".join(values) if column.type == ID else repr(values).encode())
    return hasher.hexdigest()


def _exploded(rows: pa.Table, name: str) -> tuple[pa.Table, pa.ChunkedArray]:
    """The rows repeated once per entry of a list column, and the entries."""
    column = rows.column(name).combine_chunks()
    return rows.take(pc.list_parent_indices(column)), pc.list_flatten(column)


def _first_of_each(columns: Sequence[pa.ChunkedArray], wanted: pa.Array) -> list[np.ndarray]:
    """Per column, which of its ids are wanted and stand nowhere before."""
    ids = pa.chunked_array([chunk for column in columns for chunk in column.chunks], ID)
    table = pa.table({"id": ids, "at": np.arange(len(ids))})
    first = table.group_by("id").aggregate([("at", "min")])
    keep = first.filter(pc.is_in(first.column("id"), wanted)).column("at_min").to_numpy()
    mask = np.zeros(len(ids), dtype=bool)
    mask[keep] = True
    return np.split(mask, np.cumsum([len(column) for column in columns])[:-1])


def _sorted(table: pa.Table, keys: Sequence[str]) -> pa.Table:
    return table.sort_by([(key, "ascending") for key in keys])
