"""Ingest: the corpus' files become `images`, `items`, `qrels`, `pools` and, per bad row, a line of `rejects`.

Ray Data maps over work units (parts of files). Each task reads, checks and stages its unit on its own, so no process
holds more than a few rows' pictures; only ids come together on the driver, where duplicates are taken out; the payload
is then streamed from the staged files into Lance, in parts, in the order of the corpus.

Fingerprints are those of the tables' contents: a corpus that moved, or whose files were rewritten with the same rows,
leaves every later stage valid. Whether to read at all is decided by `corpus.freshness`. A killed ingest starts over.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from unime_ray.artifacts import Manifest, Run, StageResult, filesystem, join, remove, run_stage
from unime_ray.config import CorpusConfig, RunConfig
from unime_ray.corpus.assemble import Corpus, digest, kept_batches
from unime_ray.corpus.files import absolute_sources, corpus_root
from unime_ray.corpus.freshness import remember, signature, unchanged
from unime_ray.corpus.lance_io import commit_fragments, write_fragments
from unime_ray.corpus.readers import work_units
from unime_ray.corpus.staging import UnitSummary, stage_unit
from unime_ray.corpus.units import STAGE, Unit
from unime_ray.errors import CorpusError
from unime_ray.schemas import EVAL_CANDIDATES, HARD_NEGATIVES, IMAGES, ITEMS, POOLS, QRELS, REJECTS

CODE_VERSION = 2
FIRST_REASONS = 10
MAX_BLOCKS = 1000
PART_ROWS, PART_BYTES = 65_536, 512 * 2**20

log = logging.getLogger(__name__)


def run_ingest(run: Run, config: RunConfig, name: str | None = None) -> Manifest:
    """Read the corpus into the run; returns the manifest of `items`, whose counts tell of all tables.

    Raises:
        CorpusError: a source is missing or unreadable, no row is good, or the share of bad rows is above
            `corpus.max_error_rate` (the message holds the first ten reasons; all of them are in `rejects/ingest`).
    """
    corpus = absolute_sources(config.corpus)
    folder = run.child(".ingest")
    mark = signature(corpus, CODE_VERSION)
    if unchanged(run, folder, mark):
        return run.artifact("items").require()
    clock = time.monotonic()
    remove(folder)
    staging = join(folder, "units")
    staged = Corpus(staging, _stage(corpus, staging))
    manifests = _write_tables(run, staged, corpus)
    manifest = _with_counts(run, manifests, staged, time.monotonic() - clock)
    remember(folder, mark, manifests, staged.paths())
    remove(staging)
    return manifest


def _stage(corpus: CorpusConfig, staging: str) -> list[UnitSummary]:
    """Read every unit on the cluster; the summaries in the order of the units."""
    import ray.data

    rows: list[dict[str, Any]] = []
    for index, source in enumerate(corpus.sources):
        for unit in work_units(source, corpus.rows_per_task):
            rows.append({"number": len(rows), "source_index": index, **asdict(unit)})
    if not rows:
        raise CorpusError("the sources of the corpus hold no rows; check corpus.sources")
    fs, path = filesystem(staging)
    fs.create_dir(path, recursive=True)
    dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), MAX_BLOCKS))
    dataset.context.raise_original_map_exception = True
    arguments = {"corpus": corpus, "staging": staging}
    done = dataset.map_batches(stage_batch, batch_size=1, batch_format="pyarrow", fn_kwargs=arguments).take_all()  # type: ignore[arg-type]
    return sorted((UnitSummary(**summary) for summary in done), key=lambda summary: summary.number)


def stage_batch(batch: pa.Table, corpus: CorpusConfig, staging: str) -> pa.Table:
    """Ray Data: (one unit a row) -> (one `UnitSummary` a row); what was read goes to the staging folder."""
    summaries = []
    for row in batch.to_pylist():
        number, index = row.pop("number"), row.pop("source_index")
        summaries.append(asdict(stage_unit(number, index, Unit(**row), corpus.sources[index], corpus, staging)))
    return pa.Table.from_pylist(summaries)


def _write_tables(run: Run, staged: Corpus, corpus: CorpusConfig) -> dict[str, Manifest]:
    """Every table of the run, by artifact key. `rejects` comes first: it must be there if the corpus is too bad."""
    counts = {"rows": staged.num_rows, "rejected": staged.rejects.num_rows}
    manifests = {"rejects/ingest": _write_table(run, "rejects", STAGE, staged.rejects, REJECTS, counts)}
    _check_share(run, staged, corpus)
    items, policy = staged.kept_items(), {"store_max_pixels": corpus.image.store_max_pixels}
    manifests["items"] = _write_payload(run, "items", ITEMS, staged, items, {})
    manifests["images"] = _write_payload(run, "images", IMAGES, staged, staged.kept_images(items), policy)
    manifests["qrels"] = _write_table(run, "qrels", None, staged.qrels(), QRELS)
    manifests["pools"] = _write_table(run, "pools", None, staged.pools(), POOLS)
    # These two are only there if the corpus brings them; what an earlier corpus brought must go.
    imported = staged.imported_negatives()
    if imported.num_rows:
        manifests["hard_negatives/imported"] = _write_table(run, "hard_negatives", "imported", imported, HARD_NEGATIVES)
    else:
        remove(run.artifact("hard_negatives", "imported").uri)
    if any(unit.has_candidates for unit in staged.units):
        manifests["eval_candidates"] = _write_eval_candidates(run, staged)
    else:
        remove(run.artifact("eval_candidates").uri)
    return manifests


def _check_share(run: Run, staged: Corpus, corpus: CorpusConfig) -> None:
    """Raise CorpusError if too many rows, or all, are bad."""
    limit, root = corpus.max_error_rate, corpus_root(corpus)
    bad, total = staged.rejects.num_rows, staged.num_rows
    if not total:
        raise CorpusError("the sources of the corpus hold no rows; check corpus.sources")
    where = run.artifact("rejects", STAGE).data_uri
    if bad < total and bad <= limit * total:
        if bad:
            log.warning("%d of %d rows rejected; reasons in %s", bad, total, where)
        return
    first = staged.rejects.slice(0, FIRST_REASONS).to_pylist()
    reasons = "".join(f"\n  {row['source']}:{row['row']}: {row['reason']}" for row in first)
    raise CorpusError(
        f"{bad} of {total} rows cannot be used ({bad / total:.1%}; corpus.max_error_rate is {limit:.1%}); "
        f"all reasons are in {where}, the first{f' (files under {root})' if root else ''}:{reasons}"
    )


def _save(
    run: Run, table: str, name: str | None, content: str, config: Mapping[str, Any], build: Callable[[], StageResult]
) -> Manifest:
    """Write an artifact unless it is there with the same content."""
    return run_stage(
        run.artifact(table, name),
        stage=STAGE,
        code_version=CODE_VERSION,
        config=config,
        extra_inputs={"content": content},
        build=build,
    )


def _write_table(
    run: Run, table: str, name: str | None, content: pa.Table, schema: pa.Schema, counts: dict[str, Any] | None = None
) -> Manifest:
    def build() -> StageResult:
        run.artifact(table, name).write(content, schema)
        return StageResult(content.num_rows, counts or {})

    return _save(run, table, name, digest(*content.columns), {}, build)


def _write_eval_candidates(run: Run, staged: Corpus) -> Manifest:
    def build() -> StageResult:
        rows = 0
        for number, content in staged.eval_candidates():
            run.artifact("eval_candidates").write(content, EVAL_CANDIDATES, part=f"part-{number}")
            rows += content.num_rows
        return StageResult(rows)

    content = [digest(*table.columns) for _, table in staged.eval_candidates()]
    return _save(run, "eval_candidates", None, digest(pa.array(content)), {}, build)


def _write_payload(
    run: Run, table: str, schema: pa.Schema, staged: Corpus, masks: Sequence[np.ndarray], config: Mapping[str, Any]
) -> Manifest:
    """Write `items` or `images`: the rows that `masks` keep of each unit, streamed from the staged files."""
    uri = run.artifact(table).data_uri

    def build() -> StageResult:
        remove(uri)
        _write_lance(uri, table, schema, staged, masks)
        return StageResult(int(sum(mask.sum() for mask in masks)))

    ids = staged.ids(table, schema.names[0], masks)
    return _save(run, table, None, digest(ids.sort()), config, build)


def _write_lance(uri: str, table: str, schema: pa.Schema, staged: Corpus, masks: Sequence[np.ndarray]) -> None:
    """Parts are written side by side on the cluster and become the dataset, in order, in one commit."""
    import ray

    write = ray.remote(_write_part)
    parts = [
        write.remote(
            uri, staged.folder, table, [staged.units[one].number for one in part], [masks[one] for one in part]
        )
        for part in _parts(staged.units, masks)
    ]
    fragments = [fragment for part in ray.get(parts) for fragment in part]
    commit_fragments(fragments, schema, uri)


def _write_part(uri: str, folder: str, table: str, numbers: Sequence[int], masks: Sequence[np.ndarray]) -> list[Any]:
    """Ray task: one part of a Lance dataset, from the staged files of some units."""
    schema = ITEMS if table == "items" else IMAGES
    return write_fragments(kept_batches(folder, table, numbers, masks, schema), schema, uri)


def _parts(units: Sequence[UnitSummary], masks: Sequence[np.ndarray]) -> list[list[int]]:
    """Consecutive units with rows to keep, grouped so that a part is neither tiny nor huge."""
    parts: list[list[int]] = [[]]
    rows = size = 0
    for index, (unit, mask) in enumerate(zip(units, masks, strict=True)):
        if not mask.any():
            continue
        if parts[-1] and (rows >= PART_ROWS or size >= PART_BYTES):
            parts.append([])
            rows = size = 0
        parts[-1].append(index)
        rows, size = rows + int(mask.sum()), size + unit.image_bytes
    return [part for part in parts if part]


def _with_counts(run: Run, manifests: dict[str, Manifest], staged: Corpus, seconds: float) -> Manifest:
    """Put the numbers of the whole ingest into the manifest of `items`."""
    keys = ("images", "qrels", "pools")
    counts = {
        "rows": staged.num_rows,
        "rejected": staged.rejects.num_rows,
        **{key: manifests[key].rows for key in keys},
        **staged.per_dataset(),
    }
    rate = staged.num_rows / seconds if seconds else 0.0
    update = {"counts": counts, "seconds": round(seconds, 3), "rows_per_second": round(rate, 3)}
    manifest = manifests["items"].model_copy(update=update)
    run.artifact("items").finish(manifest)
    return manifest
