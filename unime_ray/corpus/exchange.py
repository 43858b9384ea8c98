"""Corpora from one format into another: the rows of a source or of a run, checked, with their pictures in memory.

Ids survive: an item's text, instruction and picture bytes are handed on as they are. Where a format fuses instruction
and text, the fused text is what is written, and that is what an id is made of. A run whose `store_max_pixels` made it
re-encode pictures gives them as stored, under the ids of those bytes.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from unime_ray.artifacts import Run, filesystem, join
from unime_ray.config import CorpusConfig, Source, parse_config
from unime_ray.corpus.files import absolute_sources, is_remote, read_picture
from unime_ray.corpus.payload import PayloadStore
from unime_ray.corpus.readers import read_unit, work_units
from unime_ray.corpus.records import Record, Reject, Side
from unime_ray.corpus.resolve import Resolver
from unime_ray.corpus.writers import open_writer
from unime_ray.errors import CorpusError

BATCH_QUERIES = 64
FIRST_REASONS = 10
MINED = "train"


@dataclass
class Outcome:
    """What was written; `rejects` has the rows that were not."""

    pairs: int = 0
    pool: int = 0
    rejects: list[Reject] = field(default_factory=list)


def write_corpus(rows: Iterable[Record | Reject], fmt: str, out: str) -> Outcome:
    """Write the rows in `fmt`: into the folder `out`, or into the one file `out` if it ends like Parquet.

    Raises:
        ConfigError: no such format can be written.
    """
    outcome = Outcome()
    with open_writer(fmt, out) as writer:
        for row in rows:
            if isinstance(row, Reject):
                outcome.rejects.append(row)
                continue
            writer.write(row)
            outcome.pairs += row.role == "pairs"
            outcome.pool += row.role == "pool"
    return outcome


def rejects_beside(out: str) -> str:
    """Where the rejects of a file or folder go: `x.rejects.jsonl` beside `x.parquet`, else `rejects.jsonl` in it."""
    base, mark, query = out.partition("?") if is_remote(out) else (out, "", "")
    if base.endswith(".parquet"):
        return base.removesuffix(".parquet") + ".rejects.jsonl" + mark + query
    return join(out, "rejects.jsonl")


def check_outcome(outcome: Outcome, max_error_rate: float, rejects_uri: str) -> None:
    """Leave the rejects as JSON lines at `rejects_uri`, if there are any.

    Raises:
        CorpusError: nothing was written, or the share of rejects is above `max_error_rate`.
    """
    bad, total = len(outcome.rejects), outcome.pairs + outcome.pool + len(outcome.rejects)
    if bad:
        fs, path = filesystem(rejects_uri)
        with fs.open_output_stream(path) as stream:
            for one in outcome.rejects:
                line = {"source": one.source, "row": one.row, "reason": one.reason}
                stream.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    if bad == total or bad > max_error_rate * total:
        reasons = "".join(f"\n  {one.source}:{one.row}: {one.reason}" for one in outcome.rejects[:FIRST_REASONS])
        raise CorpusError(
            f"{bad} of {total} rows cannot be used; all reasons are in {rejects_uri}, the first:{reasons}"
        )


def corpus_rows(corpus: CorpusConfig) -> Iterator[Record | Reject]:
    """Every row of the sources, checked as ingest would, with its pictures loaded.

    Raises:
        CorpusError: a source is missing or unreadable.
    """
    corpus = absolute_sources(corpus)
    for source in corpus.sources:
        for unit in work_units(source, corpus.rows_per_task):
            for found in Resolver(corpus).resolve_all(read_unit(unit, source, corpus)):
                yield found if isinstance(found, Reject) else _loaded(found.record, corpus)


def source_of(fmt: str, path: str, options: Sequence[str] = ()) -> Source:
    """A source from its format, path and further keys as `key=value` or `columns.key=value`.

    Raises:
        ConfigError: an unknown key or value; the message names the nearest.
    """
    values: dict[str, Any] = {"format": fmt, "path": path}
    for option in options:
        key, _, value = option.partition("=")
        section, _, name = key.rpartition(".")
        target = values.setdefault("columns", {}) if section == "columns" else values
        target[name] = value
    return parse_config({"corpus": {"sources": [values]}}, "command line").corpus.sources[0]


def only_pairs(rows: Iterable[Record | Reject]) -> Iterator[Record | Reject]:
    """The rows without the pool's."""
    return (row for row in rows if isinstance(row, Reject) or row.role == "pairs")


def source_rows(source: Source) -> Iterator[Record | Reject]:
    """`corpus_rows` of one source under the default image policy."""
    return corpus_rows(CorpusConfig(sources=(source,)))


def _loaded(record: Record, corpus: CorpusConfig) -> Record:
    limit = corpus.image.max_source_bytes

    def side(one: Side) -> Side:
        return replace(one, image=read_picture(one.image, limit)) if isinstance(one.image, str) else one

    return replace(
        record,
        query=None if record.query is None else side(record.query),
        item=None if record.item is None else side(record.item),
        positives=tuple(map(side, record.positives)),
        negatives=tuple(map(side, record.negatives)),
        candidates=None if record.candidates is None else tuple(map(side, record.candidates)),
    )


def run_rows(run: Run, judge: str | None = None) -> Iterator[Record | Reject]:
    """The pairs of a run, then the items that are in its pools and in no pair of their dataset and split.

    Args:
        judge: with a name, training pairs of `hard_negatives/<judge>` come with their negatives and scores.

    Raises:
        ArtifactError: the run lacks `qrels`, `pools`, `items` or `images`, or that judge's negatives.
    """
    store = PayloadStore(run.artifact("images").data_uri, run.artifact("items").data_uri)
    qrels, pools = (run.artifact(table).read() for table in ("qrels", "pools"))
    named = {key: set(rows.column("item_id").to_pylist()) for key, rows in _by_split(qrels).items()}
    if judge is not None:
        train = qrels.filter(pc.equal(qrels.column("split"), MINED)).to_pylist()
        judged = run.artifact("hard_negatives", judge).read().to_pylist()
        yield from _judged(run.root, judged, {(row["query_id"], row["item_id"]): row for row in train}, store)
        done = {(row["query_id"], row["positive_id"]) for row in judged}
        pairs = zip(*(qrels.column(name).to_pylist() for name in ("split", "query_id", "item_id")), strict=True)
        qrels = qrels.filter(
            pa.array([split != MINED or (query, item) not in done for split, query, item in pairs], pa.bool_())
        )
    listed = _eval_candidates(run)
    groups = itertools.groupby(
        qrels.sort_by([(name, "ascending") for name in ("dataset", "split", "query_id")]).to_pylist(),
        key=lambda row: (row["dataset"], row["split"], row["query_id"]),
    )
    for key, rows in groups:
        found = list(rows)
        query, *sides = _sides(store, [key[2], *(row["item_id"] for row in found)])
        candidates = _sides(store, listed[key]) if key in listed else None
        yield Record(
            run.root,
            0,
            "pairs",
            *key[:2],
            query=query,
            positives=tuple(sides),
            relevances=tuple(row["relevance"] for row in found),
            candidates=None if candidates is None else tuple(candidates),
        )
    for (dataset, split), rows in _by_split(pools).items():
        taken = named.get((dataset, split), set())
        ids = [item for item in rows.column("item_id").to_pylist() if item not in taken]
        for start in range(0, len(ids), BATCH_QUERIES):
            for item in _sides(store, ids[start : start + BATCH_QUERIES]):
                yield Record(run.root, 0, "pool", dataset, split, item=item)


def _judged(
    name: str, judged: Sequence[Mapping[str, Any]], pairs: Mapping[tuple[bytes, bytes], Any], store: PayloadStore
) -> Iterator[Record]:
    """Rows of `hard_negatives` whose pair is still in the corpus."""
    for row in judged:
        pair = pairs.get((row["query_id"], row["positive_id"]))
        if pair is None:
            continue
        query, positive, *negatives = _sides(store, [row["query_id"], row["positive_id"], *row["negative_ids"]])
        yield Record(
            name,
            0,
            "pairs",
            pair["dataset"],
            MINED,
            query=query,
            positives=(positive,),
            relevances=(pair["relevance"],),
            negatives=tuple(negatives),
            negative_scores=tuple(row["negative_scores"]),
            positive_score=row["positive_score"],
        )


def _sides(store: PayloadStore, ids: Sequence[bytes]) -> list[Side]:
    items = zip(store.items(ids), store.instructions(ids), strict=True)
    return [Side(item.text, item.image, instruction) for item, instruction in items]


def _by_split(table: pa.Table) -> dict[tuple[str, str], pa.Table]:
    keys = table.group_by(["dataset", "split"]).aggregate([]).to_pylist()
    pairs = sorted((key["dataset"], key["split"]) for key in keys)
    is_one = [
        (pair, pc.and_(pc.equal(table.column("dataset"), pair[0]), pc.equal(table.column("split"), pair[1])))
        for pair in pairs
    ]
    return {pair: table.filter(mask) for pair, mask in is_one}


def _eval_candidates(run: Run) -> dict[tuple[str, str, bytes], list[bytes]]:
    artifact = run.artifact("eval_candidates")
    if artifact.manifest() is None:
        return {}
    return {
        (row["dataset"], row["split"], row["query_id"]): row["candidate_ids"] for row in artifact.read().to_pylist()
    }
