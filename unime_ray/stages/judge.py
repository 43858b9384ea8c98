"""Judge: a score for every pair of a query and one of its candidates or positives (UniME-V2, semantic matching score).

One row of work is one query with all its candidates, so that an engine computes the query's part of the prompt once.
A pair that cannot be scored keeps its error in its row. Needs a Ray cluster.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.fs as pafs

from unime_ray.artifacts import Artifact, Manifest, Run, StageResult, filesystem, join, run_stage
from unime_ray.config import JudgeConfig, RunConfig
from unime_ray.corpus.payload import Item, PayloadStore
from unime_ray.errors import ArtifactError, ConfigError, ModelError
from unime_ray.ids import show
from unime_ray.models.canary import CanaryFile, load_checked
from unime_ray.models.judge import Judge, Verdict, load_judge
from unime_ray.prompts import judge_prompt
from unime_ray.schemas import JUDGEMENTS, conform
from unime_ray.stages.candidates import CandidateRows
from unime_ray.stages.engine import (
    Progress,
    blocks_of,
    map_actors,
    parquet_files,
    stage_context,
    use_threads,
    write_rows,
)

CODE_VERSION = 1
FIRST_REASONS = 10
PAIRS_BEFORE_GIVING_UP = 2000
"""An actor that has seen so many pairs stops the job at once when too many of them failed."""
IDENTITY = {"engine", "model", "revision", "dtype", "prompt_order", "repetition_penalty", "pixels", "noise_auc"}
"""Settings that scores depend on; the others only say how fast they come."""
SERVED = "served"
"""Revision of a model behind a server that the config gives none for."""
CANARY_ENGINES = {"transformers", "vllm"}
TRUTH_FILES = ("truth.parquet", "truth_items.parquet")

log = logging.getLogger(__name__)


def load_scorer(config: JudgeConfig, canary: CanaryFile | None = None) -> Judge:
    """The judge of `config`, in this process, with as many threads as the actor has CPUs; held to `canary`.

    Raises:
        CanaryError: its canary scores are not those of the reference.
    """
    if config.engine not in ("oracle", "openai"):
        use_threads(config.resources.num_cpus)
    if canary is None or config.engine not in CANARY_ENGINES:
        return load_judge(config)
    return load_checked(config, canary)


def _held_to_canary(load: Callable[..., Judge], run: Run, settings: JudgeConfig, revision: str) -> Callable[..., Judge]:
    """`load_scorer` with the reference of this judge; any other loader as it is."""
    if load is not load_scorer:
        return load
    return partial(load, canary=CanaryFile(settings.canary or run.child("canaries"), revision))


def run_judge(
    run: Run, config: RunConfig, judge_name: str, load: Callable[[JudgeConfig], Judge] = load_scorer
) -> Manifest:
    """Write `judgements/<judge_name>`: one row per (query, candidate) and per (query, positive).

    `load` is how an actor gets its judge.

    Raises:
        ConfigError: the config has no such judge.
        ArtifactError: retrieve has not run.
        ModelError: the checkpoint cannot judge, or more pairs fail than `max_error_rate` allows.
    """
    if judge_name not in config.judges:
        raise ConfigError(f"judges: no judge {judge_name!r}; the config has {', '.join(config.judges)}")
    settings = config.judges[judge_name]
    artifact = run.artifact("judgements", judge_name)
    candidates = run.artifact("candidates", "base")
    candidates.require()
    revision = judge_revision(settings)
    prompt_hash = judge_prompt(settings.prompt, settings.instruction).hash
    manifest = run_stage(
        artifact,
        stage="judge",
        code_version=CODE_VERSION,
        config=settings.model_dump(mode="json", include=IDENTITY),
        inputs=[candidates],
        extra_inputs={"model": revision, "prompt": prompt_hash},
        build=lambda: _build(run, judge_name, settings, artifact, candidates, load, revision, prompt_hash),
    )
    Progress(artifact, "query_id").clear()
    return manifest


def judge_revision(settings: JudgeConfig) -> str:
    """What exactly judges: a checkpoint's revision (a server's as the config names it), or the content of the oracle's
    truth table."""
    if settings.engine == "oracle":
        return _truth_digest(settings.truth or "")
    if settings.engine == "openai":
        return settings.revision or SERVED
    from unime_ray.models.names import model_revision, resolve_model

    return model_revision(resolve_model(settings.model), settings.revision)


def _truth_digest(folder: str) -> str:
    hasher = hashlib.blake2b(digest_size=12)
    for name in TRUTH_FILES:
        fs, path = filesystem(join(folder, name))
        if fs.get_file_info(path).type != pafs.FileType.File:
            raise ConfigError(f"judges: the truth table {join(folder, name)} is missing")
        with fs.open_input_stream(path) as stream:
            hasher.update(stream.read())
    return hasher.hexdigest()


def _build(
    run: Run,
    judge_name: str,
    settings: JudgeConfig,
    artifact: Artifact,
    candidates: Artifact,
    load: Callable[[JudgeConfig], Judge],
    revision: str,
    prompt_hash: str,
) -> StageResult:
    queries, pairs = _work(candidates)
    progress = Progress(artifact, "query_id")
    progress.settle()  # a file that a kill cut off cannot be read
    progress.forget(_failed_pairs(artifact).column("__filename").unique().to_pylist())
    todo = progress.remaining(queries)
    before = progress.settle()
    if todo.num_rows:
        arguments = {
            "settings": settings,
            "store": PayloadStore(run.artifact("images").data_uri, run.artifact("items").data_uri),
            "candidates": CandidateRows(candidates.data_uri),
            "load": _held_to_canary(load, run, settings, revision),
        }
        with stage_context(progress.config()):
            blocks = blocks_of(todo, settings.queries_per_batch)
            judged = map_actors(blocks, JudgeActor, arguments, settings.resources, settings.queries_per_batch)
            write_rows(judged, artifact, settings.resources)
    rows = progress.settle()
    if rows != pairs:
        raise ArtifactError(f"{artifact.uri}: {rows} rows for {pairs} pairs; remove the folder and run judge again")
    counts = _check_errors(artifact, settings.max_error_rate, rows)
    return StageResult(
        rows=rows,
        counts={"queries": queries.num_rows, **counts, **(_prefix(settings) if load is load_scorer else {})},
        model=settings.model if settings.engine != "oracle" else f"oracle {settings.noise_auc:g}",
        revision=revision,
        prompt_hash=prompt_hash,
        resumed_rows=before,
    )


def _prefix(settings: JudgeConfig) -> dict[str, str]:
    """For the manifest: whether a query's part of the prompts was computed once for all its candidates."""
    if settings.engine != "transformers":
        return {}
    from unime_ray.models.loading import shares_prefix

    shared = settings.share_prefix and shares_prefix(settings.model, settings.revision)
    return {"prefix": "shared" if shared else "pair by pair"}


def _work(candidates: Artifact) -> tuple[pa.Table, int]:
    """(query ids in the order of the files, number of pairs)."""
    paths, fs = parquet_files(candidates.data_uri)
    parts, pairs = [], 0
    for batch in pads.dataset(paths, filesystem=fs).to_batches(columns=["query_id", "candidate_ids", "positive_ids"]):
        parts.append(batch.select(["query_id"]))
        pairs += sum(pc.sum(pc.list_value_length(column)).as_py() or 0 for column in batch.columns[1:])
    return pa.Table.from_batches(parts).combine_chunks(), pairs


def _failed_pairs(artifact: Artifact) -> pa.Table:
    """(__filename, query_id, candidate_id, error) of every pair that could not be scored. Each attempt tries the files
    that hold one again, so that a cause that was mended leaves nothing behind.
    """
    paths, fs = parquet_files(artifact.data_uri)
    names = ["__filename", "query_id", "candidate_id", "error"]
    if not paths:
        return pa.table({name: pa.array([], pa.string()) for name in names})
    return pads.dataset(paths, filesystem=fs).to_table(columns=names, filter=pads.field("error").is_valid())


def _check_errors(artifact: Artifact, limit: float, rows: int) -> dict[str, Any]:
    """Counts of the errors; raise if they are too many."""
    failed = _failed_pairs(artifact)
    counts = {"pairs": rows, "errors": failed.num_rows}
    if failed.num_rows > limit * rows:
        reasons = [_reason(line) for line in failed.slice(0, FIRST_REASONS).to_pylist()]
        raise _too_many_errors(failed.num_rows, rows, limit, reasons)
    if failed.num_rows:
        log.warning("%d of %d pairs have no score; see column `error` of %s", failed.num_rows, rows, artifact.key)
    return counts


def _too_many_errors(failed: int, seen: int, limit: float, reasons: list[str]) -> ModelError:
    lines = "".join(f"\n  {reason}" for reason in reasons)
    return ModelError(
        f"{failed} of {seen} pairs could not be scored ({failed / seen:.1%}; the judge's max_error_rate is "
        f"{limit:.1%}); the first reasons:{lines}"
    )


class JudgeActor:
    """Ray Data: (query_id) -> `judgements` rows of all its pairs; the judge is loaded with the first batch."""

    def __init__(
        self,
        settings: JudgeConfig,
        store: PayloadStore,
        candidates: CandidateRows,
        load: Callable[[JudgeConfig], Judge],
    ) -> None:
        self._settings, self._store, self._candidates, self._load = settings, store, candidates, load
        self._turn = threading.Lock()
        self._judge: Judge | None = None
        self._seen, self._failed = 0, 0
        self._reasons: list[str] = []

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = self._candidates.take(batch.column("query_id").to_pylist()).to_pylist()
        groups = self._groups(rows)
        with self._turn:  # payload of the next batch is fetched by another call meanwhile
            if self._judge is None:
                self._judge = self._load(self._settings)
            verdicts = self._judge.score_groups(groups)
        lines = [
            _line(query.item_id, candidate.item_id, place < len(row["positive_ids"]), verdict)
            for row, (query, candidates), found in zip(rows, groups, verdicts, strict=True)
            for place, (candidate, verdict) in enumerate(zip(candidates, found, strict=True))
        ]
        self._give_up_if_hopeless(lines)
        return conform(pa.Table.from_pylist(lines, JUDGEMENTS), JUDGEMENTS, "judgements")

    def _groups(self, rows: list[dict[str, Any]]) -> list[tuple[Item, list[Item]]]:
        """Per query its payload and that of its positives and candidates, positives first."""
        members = [[row["query_id"], *row["positive_ids"], *row["candidate_ids"]] for row in rows]
        ids = sorted({identifier for group in members for identifier in group})
        items = dict(zip(ids, self._store.items(ids), strict=True))
        return [(items[query], [items[item] for item in others]) for query, *others in members]

    def _give_up_if_hopeless(self, lines: list[dict[str, Any]]) -> None:
        failed = [line for line in lines if line["error"] is not None]
        self._seen, self._failed = self._seen + len(lines), self._failed + len(failed)
        self._reasons = (self._reasons + [_reason(line) for line in failed[:FIRST_REASONS]])[:FIRST_REASONS]
        limit = self._settings.max_error_rate
        if self._seen >= PAIRS_BEFORE_GIVING_UP and self._failed > limit * self._seen:
            raise _too_many_errors(self._failed, self._seen, limit, self._reasons)


def _reason(line: dict[str, Any]) -> str:
    return f"query {show(line['query_id'])}, candidate {show(line['candidate_id'])}: {line['error']}"


def _line(query: bytes, candidate: bytes, is_positive: bool, verdict: Verdict) -> dict[str, Any]:
    return {
        "query_id": query,
        "candidate_id": candidate,
        "is_positive": is_positive,
        "logit_yes": verdict.logit_yes,
        "logit_no": verdict.logit_no,
        "score": verdict.score,
        "error": verdict.error,
    }
