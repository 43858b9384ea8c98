"""What judging would cost, before it runs: pairs, tokens with and without sharing, and time from a short calibration.

Some queries, spread over all that are left, are really scored, by an actor's resources; their tokens and seconds a pair
stand for the rest. The transformers engine keeps what it makes of pictures, so its sample runs twice: the difference is
what pictures cost, and each different one is counted once an actor. (Where an actor's cache cannot hold them all, some
are encoded again and the true time is longer.) Nothing is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from unime_ray.artifacts import Run
from unime_ray.config import JudgeConfig, RunConfig
from unime_ray.corpus.lance_io import open_lance
from unime_ray.models.judge import Group, Judge, Usage, usage_of
from unime_ray.stages.engine import ACTOR_SHARE, Progress, parquet_files
from unime_ray.stages.judge import Judging, count_work, load_scorer
from unime_ray.stages.judge_actor import JudgeActor
from unime_ray.stages.judge_known import KnownScores, read_scorer
from unime_ray.stages.judge_watch import Watch

SAMPLE_PAIRS = 1500
MIN_ENCODED = 20
"""Pictures a sample must encode before their cost is told apart: of fewer, noise would be taken for it."""


@dataclass(frozen=True)
class Sample:
    """What scoring some queries took. `warm_seconds` is the second time, when pictures were there already.

    `new_share` of the sample's pairs was not known; `queries` and `pairs` count what was scored, without the warm-up.
    """

    queries: int
    pairs: int
    new_share: float
    usage: Usage
    seconds: float
    warm_seconds: float | None


@dataclass(frozen=True)
class Estimate:
    """Pairs and queries of the whole work, those left to judge, and what these cost."""

    name: str
    queries: int
    pairs: int
    queries_left: int
    pairs_left: int
    pictures: int
    actors: int
    sample: Sample

    @property
    def tokens(self) -> int:
        """Of the pairs left, each prompt counted whole."""
        return self._scaled(self.sample.usage.prompt_tokens)

    @property
    def tokens_computed(self) -> int:
        """Of those, what goes through the language model."""
        return self._scaled(self.sample.usage.computed_tokens)

    @property
    def seconds(self) -> float:
        """Wall time on all actors, without starting them."""
        sample = self.sample
        if not sample.pairs:
            return 0.0
        share = self.pairs_left / self.actors / sample.pairs
        if sample.warm_seconds is None or sample.usage.pictures_encoded < MIN_ENCODED:
            return sample.seconds * share
        per_picture = max(sample.seconds - sample.warm_seconds, 0.0) / sample.usage.pictures_encoded
        met = min(self.pictures, sample.usage.pictures * share)
        return sample.warm_seconds * share + per_picture * met

    def render(self) -> str:
        """The estimate in a few lines."""
        known = self.pairs - self.pairs_left
        lines = [
            f"{self.name}: {self.queries:,} queries, {self.pairs:,} pairs; about {known:,} known, "
            f"{self.pairs_left:,} to judge"
        ]
        if self.tokens:
            saved = 1 - self.tokens_computed / self.tokens
            lines.append(
                f"  tokens: {self.tokens:,} if every pair ran whole, {self.tokens_computed:,} with shared prefixes "
                f"({saved:.0%} saved)"
            )
        if self.pictures:
            lines.append(f"  pictures: {self.pictures:,} different ones")
        sample = self.sample
        rate = sample.pairs / sample.seconds if sample.seconds else 0.0
        lines.append(
            f"  expected: {_time(self.seconds)} on {self.actors} actor{'s' if self.actors > 1 else ''} (measured on "
            f"{sample.queries} queries, {sample.pairs:,} pairs: {rate:,.0f} pairs/s an actor)"
        )
        return "\n".join(lines)

    def _scaled(self, amount: int) -> int:
        return round(amount * self.pairs_left / self.sample.pairs) if self.sample.pairs else 0


def estimate_judge(
    run: Run,
    config: RunConfig,
    judge_name: str,
    load: Callable[[JudgeConfig], Judge] = load_scorer,
    sample_pairs: int = SAMPLE_PAIRS,
) -> Estimate:
    """Score a sample of what is left to judge and say what all of it costs. Needs a Ray cluster.

    Raises:
        ConfigError: the config has no such judge.
        ArtifactError: retrieve has not run, so the pairs are not known yet.
        ModelError: the judge cannot be loaded.
    """
    import ray

    judging = Judging.of(run, config, judge_name)
    judging.candidates.require()
    queries, pairs = count_work(judging.candidates)
    left = _left(judging, queries)
    chosen = _spread(left, max(2, round(sample_pairs * queries.num_rows / max(pairs, 1))))
    resources = judging.settings.resources
    measure = ray.remote(_measure).options(
        num_cpus=resources.num_cpus * ACTOR_SHARE, num_gpus=resources.num_gpus or None, max_retries=0
    )
    sample = ray.get(measure.remote(chosen, _before(judging, load))) if len(chosen) else _NOTHING
    return Estimate(
        name=judge_name,
        queries=queries.num_rows,
        pairs=pairs,
        queries_left=len(left),
        pairs_left=round(pairs * len(left) / max(queries.num_rows, 1) * sample.new_share),
        pictures=_pictures(judging) if sample.usage.pictures else 0,
        actors=max(resources.num_actors, resources.max_actors or 1),
        sample=sample,
    )


def _left(judging: Judging, queries: pa.Table) -> pa.Array:
    """Ids of the queries that an earlier attempt has not written."""
    ids = queries.column("query_id").combine_chunks()
    if read_scorer(judging.artifact) != judging.scorer:
        return ids
    if judging.artifact.manifest() is not None:
        return ids  # finished: `_before` finds what of it is still asked for
    done = Progress(judging.artifact, "query_id").written()
    return ids.filter(pc.invert(pc.is_in(ids, value_set=done)))


def _before(judging: Judging, load: Callable[[JudgeConfig], Judge]) -> dict[str, Any]:
    """The actor's arguments; a finished artifact of this scorer counts as judged before."""
    arguments = judging.arguments(load)
    if judging.artifact.manifest() is not None and read_scorer(judging.artifact) == judging.scorer:
        arguments["before"] = KnownScores(judging.artifact.data_uri)
    return arguments


def _spread(ids: pa.Array, count: int) -> pa.Array:
    """At most `count` ids, evenly spread."""
    step = max(1, -(-len(ids) // count))
    return ids.take(pa.array(range(0, len(ids), step), pa.int64()))


def _measure(query_ids: pa.Array, arguments: dict[str, Any]) -> Sample:
    """Ray task: what scoring the new pairs of these queries takes; the first query warms everything up."""
    settings: JudgeConfig = arguments["settings"]
    actor = JudgeActor(**arguments, watch=Watch(""))
    groups, known = actor.work(query_ids.to_pylist())
    if not groups:
        return _NOTHING
    judge: Judge = arguments["load"](settings)
    judge.score_groups(groups[:1])
    rest = groups[1:] or groups
    pairs, new = (sum(len(candidates) for _, candidates in part) for part in (rest, groups))
    before, seconds = usage_of(judge), _seconds(judge, rest, settings.queries_per_batch)
    used = usage_of(judge).less(before)
    twice = settings.engine == "transformers" and used.pictures_encoded > 0
    warm = _seconds(judge, rest, settings.queries_per_batch) if twice else None
    return Sample(len(rest), pairs, new / (new + known), used, seconds, warm)


def _seconds(judge: Judge, groups: list[Group], batch: int) -> float:
    clock = time.monotonic()
    for start in range(0, len(groups), batch):
        judge.score_groups(groups[start : start + batch])
    return time.monotonic() - clock


def _pictures(judging: Judging) -> int:
    """Different pictures among the queries, positives and candidates."""
    paths, fs = parquet_files(judging.candidates.data_uri)
    table = pads.dataset(paths, filesystem=fs).to_table(columns=["query_id", "candidate_ids", "positive_ids"])
    lists = [pc.list_flatten(table.column(name)) for name in ("candidate_ids", "positive_ids")]
    used = pa.chunked_array([one for column in (table.column(0), *lists) for one in column.chunks]).unique()
    items = open_lance(judging.run.artifact("items").data_uri).to_table(columns=["item_id", "image_id"])
    images = items.column("image_id").filter(pc.is_in(items.column("item_id"), value_set=used))
    return int(pc.count_distinct(images, mode="only_valid").as_py())


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


_NOTHING = Sample(0, 0, 0.0, Usage(), 0.0, None)
