"""Judging only what is new: other candidates, a cache shared by runs, actors and engines that die, poisoned pairs."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
from mining_run import (
    load_counting_judge,
    load_dying_judge,
    load_fake_embedder,
    load_fake_judge,
    load_none,
    model_folder,
    rows_by_id,
    settings,
    word_run,
)

from unime_ray.artifacts import Run
from unime_ray.config import JudgeConfig, RunConfig
from unime_ray.corpus.payload import PayloadStore
from unime_ray.errors import ModelError
from unime_ray.models.judge import Usage, Verdict
from unime_ray.schemas import JUDGEMENTS
from unime_ray.stages.embed import run_embed
from unime_ray.stages.engine import Progress
from unime_ray.stages.judge import Judging, _retry_failed, run_judge, work_counts
from unime_ray.stages.judge_estimate import Estimate, Sample, estimate_judge
from unime_ray.stages.judge_known import KnownScores, keep_judged, kept_uri
from unime_ray.stages.judge_watch import MAX_DEATHS, MAX_LOADING_DEATHS, POISON, Watch
from unime_ray.stages.retrieve import run_retrieve

KEYS = ("query_id", "candidate_id", "is_positive")


@dataclass
class Mined:
    """A run with the top 5 of each of 20 queries, judged whole in `judged`, and the same queries' top 9."""

    folder: Path
    model: str

    def run(self, to: Path, judged: bool = False) -> Run:
        """A copy to judge in."""
        shutil.copytree(self.folder / "run", to)
        if not judged:
            shutil.rmtree(to / "judgements")
        return Run(str(to))

    def widen(self, run: Run) -> None:
        """Give `run` the top 9."""
        shutil.rmtree(run.artifact("candidates", "base").uri)
        shutil.copytree(self.folder / "wide", run.artifact("candidates", "base").uri)

    def config(self, run: Run, top_k: int = 5, **judge: Any) -> RunConfig:
        section = {"model": self.model, "queries_per_batch": 5, "resources": {"num_actors": 2}} | judge
        return settings(run, embed={"model": self.model}, retrieve={"top_k": top_k}, judges={"tiny": section})


@pytest.fixture(scope="module")
def mined(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Mined:
    folder = tmp_path_factory.mktemp("mined")
    found, run = Mined(folder, model_folder(folder / "model")), word_run(folder / "run", 20, 40)
    run_embed(run, found.config(run), load=load_fake_embedder)
    run_retrieve(run, found.config(run, 9))
    shutil.copytree(run.artifact("candidates", "base").uri, folder / "wide")
    run_retrieve(run, found.config(run))
    run_judge(run, found.config(run), "tiny", load=load_counting_judge)
    return found


def rows(run: Run) -> list[dict]:
    return rows_by_id(run, "judgements", "tiny", KEYS)


def test_more_candidates_judge_only_new_pairs_and_a_cache_serves_other_runs(mined: Mined, tmp_path: Path) -> None:
    run, cache = mined.run(tmp_path / "run", judged=True), str(tmp_path / "cache")
    before = {(row["query_id"], row["candidate_id"]): row for row in rows(run)}
    mined.widen(run)
    manifest = run_judge(run, mined.config(run, 9, cache=cache), "tiny", load=load_fake_judge)
    counts, found = manifest.counts, rows(run)
    assert (counts["pairs"], counts["pairs_reused"], counts["pairs_scored"]) == (200, 120, 80)
    assert (counts["cache_hits"], counts["cache_misses"], counts["cache_added"]) == (0, 80, 200)
    assert not Path(run.child("judged_before", "tiny")).exists()
    assert all(row == before.get((row["query_id"], row["candidate_id"]), row) for row in found) and len(before) == 120
    other = mined.run(tmp_path / "other")
    mined.widen(other)
    counts = run_judge(other, mined.config(other, 9, cache=cache), "tiny", load=load_none).counts
    assert rows(other) == found and "pairs_scored" not in counts
    assert (counts["cache_hits"], counts["cache_misses"], counts["cache_added"]) == (200, 0, 0)
    table = pads.dataset(cache, partitioning="hive", exclude_invalid_files=True).to_table()
    assert table.num_rows == 200 and table.column("prompt_hash").unique().to_pylist() == [manifest.prompt_hash]
    unlike = mined.config(other, 9, cache=cache, dtype="bfloat16")  # another scorer: nothing of it is known
    counts = run_judge(other, unlike, "tiny", load=load_fake_judge).counts
    assert (counts["cache_hits"], counts["cache_misses"], counts["cache_added"]) == (0, 200, 200)


@pytest.mark.parametrize("how", ["process", "engine", "loading"])
def test_an_actor_or_engine_that_dies_is_replaced_and_the_rows_are_the_same(
    mined: Mined, tmp_path: Path, how: str
) -> None:
    run, flag = mined.run(tmp_path / "run"), tmp_path / "died"
    load = partial(load_dying_judge, flag=str(flag), how=how)
    manifest = run_judge(run, mined.config(run), "tiny", load=load)
    assert flag.exists() and manifest.counts["errors"] == 0
    assert rows(run) == rows(Run(str(mined.folder / "run"))) and manifest.rows == 120


def test_a_pair_that_crashes_the_engine_twice_is_its_own_error(mined: Mined, tmp_path: Path) -> None:
    run = mined.run(tmp_path / "run")
    met = Counter(
        item for row in run.artifact("candidates", "base").read().to_pylist() for item in row["candidate_ids"]
    )
    poison = min(met, key=lambda item: (met[item], item))
    (item,) = PayloadStore(run.artifact("images").data_uri, run.artifact("items").data_uri).items([poison])
    flag = tmp_path / "died"
    flag.touch()
    load = partial(load_dying_judge, flag=str(flag), poison=item.rendered)
    manifest = run_judge(run, mined.config(run, max_error_rate=0.5), "tiny", load=load)
    found, whole = rows(run), rows(Run(str(mined.folder / "run")))
    failed = [row for row in found if row["error"] is not None]
    # The text may also be the positive of the one query that asks for it.
    assert {row["candidate_id"] for row in failed} == {poison} and {row["error"] for row in failed} == {POISON}
    assert manifest.counts["errors"] == len(failed) >= met[poison] == 1
    kept = [(a, b) for a, b in zip(found, whole, strict=True) if a["error"] is None]
    assert len(kept) == 120 - len(failed) and all(a == b for a, b in kept)


def test_the_estimate_counts_what_is_left_and_writes_nothing(mined: Mined, tmp_path: Path) -> None:
    run = mined.run(tmp_path / "run", judged=True)
    before = sorted(str(path) for path in Path(run.root).rglob("*"))
    done = estimate_judge(run, mined.config(run), "tiny", load=load_none)
    assert (done.pairs, done.pairs_left, done.seconds) == (120, 0, 0.0) and "0 to judge" in done.render()
    mined.widen(run)
    wider = estimate_judge(run, mined.config(run, 9), "tiny", load=load_counting_judge)
    assert (wider.pairs, wider.pairs_left) == (200, 80)
    fresh = mined.run(tmp_path / "fresh")
    found = estimate_judge(fresh, mined.config(fresh), "tiny", load=load_counting_judge, sample_pairs=30)
    assert (found.queries, found.pairs, found.queries_left, found.pairs_left) == (20, 120, 20, 120)
    assert (found.tokens, found.tokens_computed, found.actors) == (1200, 240, 2)
    assert found.sample.queries == 4 and found.sample.pairs == 24  # five queries, one of which warms up
    assert found.seconds == pytest.approx(found.sample.seconds * 5 / 2)
    assert "1,200 if every pair ran whole, 240 with shared prefixes (80% saved)" in found.render()
    left = {str(path).replace(str(tmp_path / "run"), "") for path in Path(run.root).rglob("*")}
    assert {path for path in left if "candidates" not in path} == {
        path.replace(str(tmp_path / "run"), "") for path in before if "candidates" not in path
    }


def test_pictures_are_counted_once_an_actor() -> None:
    usage = Usage(pairs=100, prompt_tokens=1000, computed_tokens=500, pictures=100, pictures_encoded=50)
    sample = Sample(2, 100, 1.0, usage, seconds=3.0, warm_seconds=1.0)
    # 1,000 pairs on two actors: 5 s of language model each, and 40 ms for each of 300 pictures (or of 500 met).
    assert Estimate("j", 20, 1000, 20, 1000, 300, 2, sample).seconds == pytest.approx(5.0 + 0.04 * 300)
    assert Estimate("j", 20, 1000, 20, 1000, 900, 2, sample).seconds == pytest.approx(5.0 + 0.04 * 500)
    few = Sample(2, 100, 1.0, Usage(100, 1000, 500, 100, 1), seconds=3.0, warm_seconds=1.0)
    assert Estimate("j", 20, 1000, 20, 1000, 300, 2, few).seconds == pytest.approx(15.0)


def group(query: str, *candidates: str) -> tuple[Any, list[Any]]:
    return SimpleNamespace(item_id=query.encode()), [SimpleNamespace(item_id=name.encode()) for name in candidates]


def names(parts: list[list[tuple[Any, list[Any]]]]) -> list[list[tuple[bytes, list[bytes]]]]:
    return [[(query.item_id, [one.item_id for one in items]) for query, items in part] for part in parts]


def test_what_died_is_narrowed_down_to_the_pair(tmp_path: Path) -> None:
    """Each `Watch` is a process; those that do not leave died."""
    uri, groups = str(tmp_path / "watch"), [group("p", "1"), group("q", "1", "2"), group("r", "1")]
    ids = [query.item_id for query, _ in groups]
    calm = Watch(uri)
    calm.enter(groups)
    calm.leave()
    assert names(list(calm.evidence(ids).parts(groups))) == names([groups])
    Watch(uri).enter([group("p", "1"), group("q", "1", "2")])
    evidence = Watch(uri).evidence(ids)
    assert names(list(evidence.parts(groups))) == names([[groups[2]], [groups[0]], [groups[1]]])
    Watch(uri).enter([groups[1]])
    parts = names(list(Watch(uri).evidence(ids).parts(groups)))
    assert parts == names([[groups[2]], [groups[0]], [group("q", "1")], [group("q", "2")]])
    for _ in range(2):
        assert not Watch(uri).evidence(ids).gives_up((b"q", b"2"))
        Watch(uri).enter([group("q", "2")])
    evidence = Watch(uri).evidence(ids)
    assert evidence.gives_up((b"q", b"2")) and not evidence.gives_up((b"q", b"1"))
    assert names(list(evidence.parts(groups)))[-1] == names([[group("q", "1")]])[0]
    assert names(list(Watch(uri).evidence([b"r"]).parts([groups[2]]))) == names([[groups[2]]])


def test_a_judge_that_always_dies_ends_the_job(tmp_path: Path) -> None:
    loading, scoring = str(tmp_path / "loading"), str(tmp_path / "scoring")
    for _ in range(MAX_LOADING_DEATHS):
        Watch(loading).evidence([b"q"]).check()
        Watch(loading).enter([group("q", "1")], loading=True)
    with pytest.raises(ModelError, match="3 processes died while they loaded the judge"):
        Watch(loading).evidence([b"q"]).check()
    for number in range(MAX_DEATHS):
        Watch(scoring).enter([group("q", str(number))])
    with pytest.raises(ModelError, match=f"died {MAX_DEATHS} times"):
        Watch(scoring).evidence([b"q"]).check()


def test_an_attempt_that_told_its_reason_leaves_no_suspicion(tmp_path: Path) -> None:
    """Else a cause that was mended would stop the job, or fail its pairs, for ever."""
    uri, groups = str(tmp_path / "watch"), [group("q", "1")]
    with Watch(uri).attempt():
        assert Path(uri).is_dir()
    for _ in range(2):
        Watch(uri).enter(groups)
    for _ in range(MAX_LOADING_DEATHS):
        Watch(uri).enter(groups, loading=True)
    with pytest.raises(ModelError, match="while they loaded"), Watch(uri).attempt():
        with Watch(uri).attempt():  # as after a driver's death
            found = Watch(uri).evidence([b"q"])
            assert found.loading == 0 and found.gives_up((b"q", b"1"))
        for _ in range(MAX_LOADING_DEATHS):
            Watch(uri).enter(groups, loading=True)
        Watch(uri).evidence([b"q"]).check()
    with Watch(uri).attempt():
        found = Watch(uri).evidence([b"q"])
        assert (found.loading, found.deaths, found.gives_up((b"q", b"1"))) == (0, 0, False)


def test_counters_of_all_processes_add_up(tmp_path: Path) -> None:
    uri = str(tmp_path / "watch")
    done = {"pairs_scored": 10, "scoring_seconds": 2.0, "prompt_tokens": 100, "computed_tokens": 20}
    for _ in range(2):
        Watch(uri).save(done | {"pictures": 5, "pictures_encoded": 1, "cache_hits": 3})
    counts = work_counts(Watch(uri).totals())
    assert counts["pairs_scored"] == 20 and counts["cache_hits"] == 6 and counts["pairs_per_second"] == 5.0
    assert (counts["tokens"], counts["tokens_computed"], counts["tokens_saved"]) == (200, 40, 160)
    assert counts["tokens_per_second"] == 10.0
    assert counts["prefix_hit_rate"] == pytest.approx(0.8) and counts["picture_hit_rate"] == pytest.approx(0.8)


def test_actors_load_the_commit_that_the_scores_are_filed_under(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    for engine, revision, loaded in (
        ("vllm", "ab" * 20, "ab" * 20),
        ("vllm", "ab" * 16, "main"),  # a folder's content hash is no revision
        ("openai", "ab" * 20, "main"),
    ):
        server = {"server": {"base_url": "http://x/v1"}} if engine == "openai" else {}
        settings = JudgeConfig.model_validate({"engine": engine, "model": "owner/name", "revision": "main"} | server)
        assert Judging(run, "j", settings, revision, "hash").arguments(load_none)["settings"].revision == loaded


def test_scores_beside_a_failed_pair_are_not_made_again(tmp_path: Path) -> None:
    judging = Judging(Run(str(tmp_path)), "tiny", JudgeConfig(), "revision", "hash")
    queries, items = [bytes([n]) * 16 for n in (1, 2)], [bytes([n]) * 16 for n in (7, 8)]
    checkpoints = Path(judging.artifact.child("checkpoint"))
    for folder in (checkpoints, Path(judging.artifact.data_uri)):
        folder.mkdir(parents=True)
    for name, query, errors in (("a", queries[0], [None, "broken"]), ("b", queries[1], [None, None])):
        verdicts = [Verdict.failed(error) if error else Verdict.of(1.0, 0.0) for error in errors]
        lines = [
            {"query_id": query, "candidate_id": item, "is_positive": False, **asdict(verdict)}
            for item, verdict in zip(items, verdicts, strict=True)
        ]
        table = pa.Table.from_pylist(lines, JUDGEMENTS)
        pq.write_table(table, f"{judging.artifact.data_uri}/{name}-0.parquet")
        pq.write_table(table.select(["query_id"]).slice(0, 1), checkpoints / f"{name}.parquet")
    progress = Progress(judging.artifact, "query_id")
    _retry_failed(judging, progress)
    assert progress.written().to_pylist() == [queries[1]] and progress.settle() == 2
    known = KnownScores(kept_uri(judging.run, "tiny", judging.scorer))
    assert known.verdicts(queries) == {(queries[0], items[0]): Verdict(1.0, 0.0, pytest.approx(0.731, abs=1e-3))}


def test_only_what_this_scorer_judged_is_kept(tmp_path: Path) -> None:
    run = Run(str(tmp_path / "run"))
    artifact = run.artifact("judgements", "tiny")
    keep_judged(run, artifact, "mine")  # nothing there
    Path(artifact.data_uri).mkdir(parents=True)
    (Path(artifact.data_uri) / "a-0.parquet").write_bytes(b"whatever")
    Path(artifact.child("scorer.json")).write_text(json.dumps({"scorer": "mine"}))
    Path(artifact.child("manifest.json")).write_text('{"table": "judgements", "stage": "judge", "fingerprint": "x"}')
    keep_judged(run, artifact, "another")
    assert not Path(run.child("judged_before")).exists()
    keep_judged(run, artifact, "mine")
    assert (Path(run.child("judged_before", "tiny", "mine")) / "a-0.parquet").read_bytes() == b"whatever"
