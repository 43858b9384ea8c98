"""Scores that need not be computed again: those of the run itself, and those in a cache that runs share.

    RUN/judged_before/<judge>/<scorer>/*.parquet   what was judged when the run's candidates were others
    CACHE/scorer=<scorer>/*.parquet                what any run judged; `scorer.json` beside it says by whom

A *scorer* is all that a score depends on besides the pair: see `scorer_key`. Pairs that failed are never known.
"""

from __future__ import annotations

import hashlib
import json
import threading
import uuid
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from unime_ray.artifacts import Artifact, Run, filesystem, join, read_text, remove, write_text
from unime_ray.config import JudgeConfig
from unime_ray.models.judge import Verdict
from unime_ray.schemas import ID
from unime_ray.stages.engine import Progress, parquet_files

SCORES_VERSION = 1
"""Counts changes of our own code that change scores."""
SCORER = "scorer.json"
FILES_IN_MEMORY = 16
COPIES_AT_ONCE = 16
SORTED_ROWS, FILE_ROWS = 4_000_000, 250_000
"""New scores are sorted by query in runs of so many rows, and cut into files of so many."""

Pair = tuple[bytes, bytes]
"""(query id, candidate id)"""
VALUES = ("logit_yes", "logit_no", "score")
PAIR = ("query_id", "candidate_id")


def scorer_key(settings: JudgeConfig, revision: str, prompt_hash: str) -> dict[str, Any]:
    """All that a score depends on besides its pair; a checkpoint counts by its content, not by its path."""
    key: dict[str, Any] = {
        "version": SCORES_VERSION,
        "engine": settings.engine,
        "model_revision": revision,
        "prompt_hash": prompt_hash,
        "prompt_order": settings.prompt_order,
        "repetition_penalty": settings.repetition_penalty,
        "min_pixels": settings.pixels.min_pixels,
        "max_pixels": settings.pixels.max_pixels,
        "dtype": settings.dtype,
    }
    if settings.engine == "openai":
        key["model"] = settings.model
    if settings.engine == "oracle":
        key["noise_auc"] = settings.noise_auc
    return key


def scorer_hash(key: Mapping[str, Any]) -> str:
    """24 hex digits that name a scorer."""
    return hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=12).hexdigest()


class KnownScores:
    """Verdicts by pair from a folder of Parquet files; only an index of its queries and a few files are in memory.

    The index takes about 150 bytes a query. Safe to use from several threads; each process opens it for itself.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._lock = threading.Lock()
        self._paths: list[str] = []
        self._files_of: dict[bytes, list[int]] | None = None
        self._open_files: OrderedDict[int, pa.Table] = OrderedDict()

    def __reduce__(self) -> tuple[type[KnownScores], tuple[str]]:
        return KnownScores, (self.uri,)

    def verdicts(self, query_ids: Sequence[bytes]) -> dict[Pair, Verdict]:
        """Every known pair of these queries."""
        table = self.rows(query_ids)
        columns = (table.column(name).to_pylist() for name in (*PAIR, *VALUES))
        return {(query, item): Verdict(*values) for query, item, *values in zip(*columns, strict=True)}

    def rows(self, query_ids: Sequence[bytes]) -> pa.Table:
        """(query_id, candidate_id, logit_yes, logit_no, score) of every known pair of these queries."""
        wanted = pa.array(query_ids, ID)
        with self._lock:
            index = self._index()
            files = sorted({number for query in query_ids for number in index.get(query, ())})
            parts = [self._table(number) for number in files]
        found = [part.filter(pc.is_in(part.column("query_id"), value_set=wanted)) for part in parts]
        return pa.concat_tables(found) if found else _SCORES.empty_table()

    def _index(self) -> dict[bytes, list[int]]:
        if self._files_of is None:
            self._paths, fs = parquet_files(self.uri)
            found: dict[bytes, list[int]] = defaultdict(list)
            for number, path in enumerate(self._paths):
                for query in pq.read_table(path, columns=["query_id"], filesystem=fs).column(0).unique().to_pylist():
                    found[query].append(number)
            self._files_of = dict(found)
        return self._files_of

    def _table(self, number: int) -> pa.Table:
        if number not in self._open_files:
            fs, _ = filesystem(self.uri)
            self._open_files[number] = _scored(pq.read_table(self._paths[number], filesystem=fs))
            if len(self._open_files) > FILES_IN_MEMORY:
                self._open_files.popitem(last=False)
        self._open_files.move_to_end(number)
        return self._open_files[number]


def read_scorer(artifact: Artifact) -> str | None:
    """Who wrote, or is writing, an artifact of judgements."""
    found = json.loads(read_text(artifact.child(SCORER)) or "{}").get("scorer")
    return None if found is None else str(found)


def kept_uri(run: Run, judge_name: str, scorer: str) -> str:
    """Where a run keeps what this scorer judged when its candidates were others."""
    return run.child("judged_before", judge_name, scorer)


def keep_judged(run: Run, artifact: Artifact, scorer: str) -> None:
    """Copy what `artifact` holds aside, if this very scorer wrote it: its folder is about to be cleared.

    An unfinished artifact counts too, as far as its checkpoints vouch for it. Repeating this changes nothing.
    """
    if read_scorer(artifact) != scorer:
        return
    if artifact.manifest() is None:
        Progress(artifact, "query_id").settle()
    keep_files(run, artifact, scorer, parquet_files(artifact.data_uri)[0])


def keep_files(run: Run, artifact: Artifact, scorer: str, paths: Sequence[str]) -> None:
    """Copy some of the artifact's files, which `scorer` wrote, aside, each whole or not at all.

    They are to be made again, and the scores in them need not be.
    """
    fs, folder = filesystem(kept_uri(run, str(artifact.name), scorer))

    def copy(path: str) -> None:
        target = f"{folder}/{path.rsplit('/', 1)[-1]}"
        fs.copy_file(path, f"{target}.tmp")
        fs.move(f"{target}.tmp", target)

    if paths:
        fs.create_dir(folder, recursive=True)
        with ThreadPoolExecutor(COPIES_AT_ONCE) as pool:
            list(pool.map(copy, paths))


def forget_kept(run: Run, judge_name: str) -> None:
    """Remove what `keep_judged` kept: a finished artifact holds all of it that is still asked for."""
    remove(run.child("judged_before", judge_name))


def cache_uri(cache: str, scorer: str) -> str:
    """The folder of one scorer in a cache."""
    return join(cache, f"scorer={scorer}")


def add_to_cache(cache: str, key: Mapping[str, Any], artifact: Artifact) -> int:
    """Add every scored pair of `artifact` that the cache lacks; returns how many.

    Files appear whole or not at all. Runs that add at the same time may both add a pair, which costs only space.
    """
    folder = cache_uri(cache, scorer_hash(key))
    known, added = KnownScores(folder), 0
    write_text(join(folder, SCORER), json.dumps(dict(key), indent=2))
    for table in _sorted_runs(artifact):
        fresh = _without(table, known.rows(table.column("query_id").unique().to_pylist()))
        for start in range(0, fresh.num_rows, FILE_ROWS):
            _write_whole(folder, _with_key(fresh.slice(start, FILE_ROWS), key))
        added += fresh.num_rows
    return added


def _sorted_runs(artifact: Artifact) -> Iterator[pa.Table]:
    """Scored pairs in tables of bounded size, each sorted by query, so that a query's scores lie in few files."""
    paths, fs = parquet_files(artifact.data_uri)
    pending: list[pa.Table] = []
    for number, path in enumerate(paths):
        pending.append(_scored(pq.read_table(path, filesystem=fs)))
        if number == len(paths) - 1 or sum(table.num_rows for table in pending) >= SORTED_ROWS:
            merged = pa.concat_tables(pending).group_by(list(PAIR)).aggregate([(name, "min") for name in VALUES])
            yield merged.rename_columns([*PAIR, *VALUES]).cast(_SCORES).sort_by("query_id")
            pending = []


def _without(table: pa.Table, known: pa.Table) -> pa.Table:
    if not known.num_rows:
        return table
    return table.filter(pa.array(~np.isin(_pair_keys(table), _pair_keys(known))))


def _pair_keys(table: pa.Table) -> np.ndarray:
    """(N,) 32-byte strings: query id and candidate id."""
    sides = [table.column(name).cast(pa.binary()).combine_chunks() for name in PAIR]
    return np.array(pc.binary_join_element_wise(*sides, b"").to_pylist(), dtype="S32")


def _scored(table: pa.Table) -> pa.Table:
    """The pairs that have a score, with the columns of a cache."""
    kept = table.select([*PAIR, *VALUES])
    return kept.filter(pc.is_valid(kept.column("score"))).cast(_SCORES)


def _with_key(table: pa.Table, key: Mapping[str, Any]) -> pa.Table:
    """The rows with the scorer's key beside them, so that a file explains itself."""
    for name, value in key.items():
        kind = pa.int64() if name.endswith("_pixels") else None
        table = table.append_column(name, pa.repeat(pa.scalar(value, kind), table.num_rows))
    return table


def _write_whole(folder: str, table: pa.Table) -> None:
    fs, path = filesystem(folder)
    name = uuid.uuid4().hex
    unfinished = f"{path}/{name}.tmp" if isinstance(fs, pafs.LocalFileSystem) else f"{path}/{name}.parquet"
    pq.write_table(table, unfinished, filesystem=fs)
    if unfinished.endswith(".tmp"):
        fs.move(unfinished, f"{path}/{name}.parquet")


_SCORES = pa.schema([("query_id", ID), ("candidate_id", ID), *((name, pa.float32()) for name in VALUES)])
