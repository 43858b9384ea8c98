"""Judge on Ray Data: one row per pair, errors kept and counted, resume by query."""

from __future__ import annotations

from pathlib import Path

import pytest
from mining_run import (
    Corpus,
    load_broken,
    load_fake_embedder,
    load_fake_judge,
    load_mended_judge,
    model_folder,
    settings,
    word_run,
)

from unime_ray.artifacts import Run
from unime_ray.config import JudgeConfig, RunConfig
from unime_ray.errors import ConfigError, ModelError
from unime_ray.schemas import JUDGEMENTS
from unime_ray.stages.embed import run_embed
from unime_ray.stages.judge import run_judge
from unime_ray.stages.judge_watch import Watch
from unime_ray.stages.retrieve import run_retrieve

pytestmark = pytest.mark.usefixtures("ray_cluster")


def retrieved(run: Run, tmp_path: Path, **judge: object) -> RunConfig:
    folder = model_folder(tmp_path / "model")
    section = {"model": folder, "queries_per_batch": 8, "resources": {"num_actors": 2}} | judge
    config = settings(run, embed={"model": folder}, retrieve={"top_k": 12}, judges={"tiny": section})
    run_embed(run, config, load=load_fake_embedder)
    run_retrieve(run, config)
    return config


def test_every_pair_once_with_its_positives(tmp_path: Path) -> None:
    run = word_run(tmp_path / "run")
    config = retrieved(run, tmp_path)
    manifest = run_judge(run, config, "tiny", load=load_fake_judge)
    table = run.artifact("judgements", "tiny").read()
    assert table.schema.remove_metadata() == JUDGEMENTS
    rows = table.to_pylist()
    candidates = run.artifact("candidates", "base").read().to_pylist()
    expected = {(row["query_id"], item, False) for row in candidates for item in row["candidate_ids"]}
    expected |= {(row["query_id"], item, True) for row in candidates for item in row["positive_ids"]}
    assert {(row["query_id"], row["candidate_id"], row["is_positive"]) for row in rows} == expected
    assert manifest.rows == len(rows) == 60 * 13
    counted = {"queries": 60, "pairs": 780, "errors": 0, "pairs_scored": 780}
    assert {name: manifest.counts[name] for name in counted} == counted
    assert manifest.counts["scoring_seconds"] > 0 and manifest.counts["pairs_per_second"] > 0
    assert all(0 <= row["score"] <= 1 and row["error"] is None for row in rows)
    assert all(row["logit_yes"] == 2.0 for row in rows if row["is_positive"])
    left = {path.name for path in Path(run.child("judgements", "tiny")).iterdir()}
    assert manifest.prompt_hash and left == {"data", "manifest.json", "started.json", "scorer.json"}
    assert run_judge(run, config, "tiny", load=lambda config: pytest.fail("loaded")) == manifest


def test_only_what_scores_depend_on_makes_a_new_artifact(tmp_path: Path) -> None:
    run = word_run(tmp_path / "run", 6, 20)
    config = retrieved(run, tmp_path)
    first = run_judge(run, config, "tiny", load=load_fake_judge)

    def changed(**judge: object) -> RunConfig:
        section = config.judges["tiny"].model_dump() | judge
        return config.model_copy(update={"judges": {"tiny": JudgeConfig.model_validate(section)}})

    faster = changed(queries_per_batch=2, batch_tokens=4096, resources={"num_actors": 1})
    assert run_judge(run, faster, "tiny", load=lambda config: pytest.fail("loaded")) == first
    other = run_judge(run, changed(repetition_penalty=1.05), "tiny", load=load_fake_judge)
    assert other.fingerprint != first.fingerprint and other.rows == first.rows


def run_with_unjudgeable(folder: Path, bad: int) -> Run:
    corpus = Corpus()
    answers = [corpus.item(f"a{number}") for number in range(20)]
    for number in range(20):
        corpus.pair(corpus.item(f"q{number}"), answers[number])
    corpus.pool(*answers)
    corpus.pool(*(corpus.item(f"unjudgeable {number}") for number in range(bad)))
    return corpus.save(folder)


def test_errors_stay_in_their_rows(tmp_path: Path) -> None:
    run = run_with_unjudgeable(tmp_path / "run", 1)
    manifest = run_judge(run, retrieved(run, tmp_path, max_error_rate=0.2), "tiny", load=load_fake_judge)
    failed = [row for row in run.artifact("judgements", "tiny").read().to_pylist() if row["error"] is not None]
    assert failed and manifest.counts["errors"] == len(failed)
    assert all(row["score"] is None and row["error"] == "the picture does not decode" for row in failed)


def test_too_many_errors_fail_with_reasons_and_are_judged_again(tmp_path: Path) -> None:
    run = run_with_unjudgeable(tmp_path / "run", 1)
    config = retrieved(run, tmp_path, max_error_rate=0.001)
    reason = (
        r"pairs could not be scored .*0\.1%\); the first reasons:\n  query [0-9a-f]{32}, candidate [0-9a-f]{32}: the"
    )
    with pytest.raises(ModelError, match=reason):
        run_judge(run, config, "tiny", load=load_fake_judge)
    assert run.artifact("judgements", "tiny").manifest() is None
    manifest = run_judge(run, config, "tiny", load=load_mended_judge)
    rows = run.artifact("judgements", "tiny").read().to_pylist()
    assert manifest.rows == len(rows) == len({(row["query_id"], row["candidate_id"]) for row in rows})
    assert manifest.counts["errors"] == 0


def test_an_actor_gives_up_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from unime_ray.stages import judge_actor as stage

    run = run_with_unjudgeable(tmp_path / "run", 15)
    config = retrieved(run, tmp_path)
    candidates = run.artifact("candidates", "base")
    actor = stage.JudgeActor(
        config.judges["tiny"],
        stage.PayloadStore(run.artifact("images").data_uri, run.artifact("items").data_uri),
        stage.CandidateRows(candidates.data_uri),
        load_fake_judge,
        Watch(str(tmp_path / "watch")),
    )
    batch = candidates.read(["query_id"]).slice(0, 8)
    actor(batch)  # 104 pairs are too few to judge the judge by
    monkeypatch.setattr(stage, "PAIRS_BEFORE_GIVING_UP", 200)
    with pytest.raises(ModelError, match="of 208 pairs could not be scored"):
        actor(batch)


def test_errors_of_a_worker_keep_their_class(tmp_path: Path) -> None:
    run = word_run(tmp_path / "run", 4, 8)
    config = retrieved(run, tmp_path)
    with pytest.raises(ModelError) as raised:
        run_judge(run, config, "tiny", load=load_broken)
    assert str(raised.value) == "model x: architecture Y is not supported"
    with pytest.raises(ConfigError, match="no judge 'other'; the config has tiny"):
        run_judge(run, config, "other")
    oracle = settings(run, judges={"oracle": {"engine": "oracle", "truth": str(tmp_path / "none")}})
    with pytest.raises(ConfigError, match=r"truth table .*none/truth.parquet is missing"):
        run_judge(run, oracle, "oracle")
