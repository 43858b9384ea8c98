"""Judge: a score for every pair of a query and one of its candidates or positives (UniME-V2, semantic matching score).

One row of work is one query with all its candidates, so that an engine computes the query's part of the prompt once.
What was judged before is not judged again: pairs of an attempt that was stopped, of other candidates of the same run,
and of other runs that share a cache. A pair that cannot be scored keeps its error in its row. Needs a Ray cluster.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.fs as pafs

from unime_ray.artifacts import Artifact, Manifest, Run, StageResult, filesystem, join, run_stage, write_text
from unime_ray.config import JudgeConfig, RunConfig
from unime_ray.corpus.payload import PayloadStore
from unime_ray.errors import ArtifactError, ConfigError
from unime_ray.models.canary import CanaryFile, load_checked
from unime_ray.models.judge import Judge, load_judge
from unime_ray.prompts import judge_prompt
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
from unime_ray.stages.judge_actor import FIRST_REASONS, JudgeActor, reason_of, too_many_errors
from unime_ray.stages.judge_known import (
    SCORER,
    KnownScores,
    add_to_cache,
    cache_uri,
    forget_kept,
    keep_files,
    keep_judged,
    kept_uri,
    scorer_hash,
    scorer_key,
)
from unime_ray.stages.judge_watch import Watch

CODE_VERSION = 1
COUNTED = ("pairs_scored", "pairs_reused", "cache_hits", "cache_misses")
IDENTITY = {"engine", "model", "revision", "dtype", "prompt_order", "repetition_penalty", "pixels", "noise_auc"}
"""Settings that scores depend on; the others only say how fast they come."""
SERVED = "served"
"""Revision of a model behind a server that the config gives none for."""
CANARY_ENGINES = {"transformers", "vllm"}
HUB_COMMIT = re.compile("[0-9a-f]{40}")
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
    judging = Judging.of(run, config, judge_name)
    judging.candidates.require()
    artifact = judging.artifact
    manifest = run_stage(
        artifact,
        stage="judge",
        code_version=CODE_VERSION,
        config=judging.settings.model_dump(mode="json", include=IDENTITY),
        inputs=[judging.candidates],
        extra_inputs={"model": judging.revision, "prompt": judging.prompt_hash},
        build=lambda: _build(judging, load),
        before_clearing=lambda: keep_judged(run, artifact, judging.scorer),
    )
    Progress(artifact, "query_id").clear()
    Watch(artifact.child("watch")).clear()
    forget_kept(run, judge_name)
    return manifest


@dataclass(frozen=True)
class Judging:
    """One judge's work in a run: what it reads, what it writes, and who it is."""

    run: Run
    name: str
    settings: JudgeConfig
    revision: str
    prompt_hash: str

    @classmethod
    def of(cls, run: Run, config: RunConfig, name: str) -> Judging:
        """The work of `config.judges[name]`.

        Raises:
            ConfigError: the config has no such judge.
        """
        if name not in config.judges:
            raise ConfigError(f"judges: no judge {name!r}; the config has {', '.join(config.judges)}")
        settings = config.judges[name]
        asked = judge_prompt(settings.prompt, settings.instruction)
        return cls(run, name, settings, judge_revision(settings), asked.hash)

    @property
    def artifact(self) -> Artifact:
        return self.run.artifact("judgements", self.name)

    @property
    def candidates(self) -> Artifact:
        return self.run.artifact("candidates", "base")

    @property
    def cache(self) -> str | None:
        """The cache's folder; workers have other working directories, so a local one is made absolute."""
        return None if self.settings.cache is None else Run(self.settings.cache).root

    @property
    def key(self) -> dict[str, Any]:
        return scorer_key(self.settings, self.revision, self.prompt_hash)

    @property
    def scorer(self) -> str:
        return scorer_hash(self.key)

    def pinned(self) -> JudgeConfig:
        """The settings with a hub checkpoint's commit in them: its branch may move before the last actor starts."""
        found = HUB_COMMIT.fullmatch(self.revision) and self.settings.engine in CANARY_ENGINES
        return self.settings.model_copy(update={"revision": self.revision}) if found else self.settings

    def loader(self, load: Callable[..., Judge]) -> Callable[..., Judge]:
        """`load_scorer` with the reference of this judge; any other loader as it is."""
        if load is not load_scorer:
            return load
        return partial(load, canary=CanaryFile(self.settings.canary or self.run.child("canaries"), self.revision))

    def arguments(self, load: Callable[..., Judge]) -> dict[str, Any]:
        """What an actor is made of; `load` is how it gets its judge."""
        cache = self.cache
        return {
            "settings": self.pinned(),
            "load": self.loader(load),
            "store": PayloadStore(self.run.artifact("images").data_uri, self.run.artifact("items").data_uri),
            "candidates": CandidateRows(self.candidates.data_uri),
            "before": KnownScores(kept_uri(self.run, self.name, self.scorer)),
            "cache": None if cache is None else KnownScores(cache_uri(cache, self.scorer)),
        }


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


def _build(judging: Judging, load: Callable[[JudgeConfig], Judge]) -> StageResult:
    watch = Watch(judging.artifact.child("watch"))
    with watch.attempt():
        return _judge(judging, load, watch)


def _judge(judging: Judging, load: Callable[[JudgeConfig], Judge], watch: Watch) -> StageResult:
    settings, artifact = judging.settings, judging.artifact
    write_text(artifact.child(SCORER), json.dumps({"scorer": judging.scorer}))
    queries, pairs = count_work(judging.candidates)
    progress = Progress(artifact, "query_id")
    _retry_failed(judging, progress)
    todo = progress.remaining(queries)
    before = progress.settle()
    if todo.num_rows:
        with stage_context(progress.config()):
            blocks = blocks_of(todo, settings.queries_per_batch)
            arguments = judging.arguments(load) | {"watch": watch}
            judged = map_actors(blocks, JudgeActor, arguments, settings.resources, settings.queries_per_batch)
            write_rows(judged, artifact, settings.resources)
    rows = progress.settle()
    if rows != pairs:
        raise ArtifactError(f"{artifact.uri}: {rows} rows for {pairs} pairs; remove the folder and run judge again")
    counts = {"queries": queries.num_rows} | _check_errors(artifact, settings.max_error_rate, rows)
    counts |= work_counts(watch.totals())
    if judging.cache is not None:
        counts["cache_added"] = add_to_cache(judging.cache, judging.key, artifact)
    return StageResult(
        rows=rows,
        counts=counts | (_prefix(settings) if load is load_scorer else {}),
        model=settings.model if settings.engine != "oracle" else f"oracle {settings.noise_auc:g}",
        revision=judging.revision,
        prompt_hash=judging.prompt_hash,
        resumed_rows=before,
    )


def _retry_failed(judging: Judging, progress: Progress) -> None:
    """Have files with failed pairs made again; the scores beside those are kept."""
    progress.settle()  # a file that a kill cut off cannot be read
    failed = _failed_pairs(judging.artifact).column("__filename").unique().to_pylist()
    keep_files(judging.run, judging.artifact, judging.scorer, failed)
    progress.forget(failed)


def _prefix(settings: JudgeConfig) -> dict[str, str]:
    """For the manifest: whether a query's part of the prompts was computed once for all its candidates."""
    if settings.engine != "transformers":
        return {}
    from unime_ray.models.loading import shares_prefix

    shared = settings.share_prefix and shares_prefix(settings.model, settings.revision)
    return {"prefix": "shared" if shared else "pair by pair"}


def work_counts(done: Mapping[str, float]) -> dict[str, Any]:
    """Counters of all actors as the manifest has them; rates are per second of one actor that scores.

    `tokens` counts each pair's prompt whole, `tokens_computed` what went through the language model.
    """
    counts: dict[str, Any] = {name: int(done[name]) for name in COUNTED if name in done}
    done = defaultdict(float, done)
    seconds = done["scoring_seconds"]
    counts |= {"scoring_seconds": round(seconds, 3), "pairs_per_second": _rate(done["pairs_scored"], seconds)}
    whole, computed = int(done["prompt_tokens"]), int(done["computed_tokens"])
    if whole:
        counts |= {"tokens": whole, "tokens_computed": computed, "tokens_saved": whole - computed}
        counts |= {"tokens_per_second": _rate(computed, seconds), "prefix_hit_rate": round(1 - computed / whole, 4)}
    if done["pictures"]:
        encoded = int(done["pictures_encoded"])
        counts |= {"pictures_encoded": encoded, "picture_hit_rate": round(1 - encoded / done["pictures"], 4)}
    return counts


def _rate(amount: float, seconds: float) -> float:
    return round(amount / seconds, 2) if seconds else 0.0


def count_work(candidates: Artifact) -> tuple[pa.Table, int]:
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
        reasons = [reason_of(line) for line in failed.slice(0, FIRST_REASONS).to_pylist()]
        raise too_many_errors(failed.num_rows, rows, limit, reasons)
    if failed.num_rows:
        log.warning("%d of %d pairs have no score; see column `error` of %s", failed.num_rows, rows, artifact.key)
    return counts
