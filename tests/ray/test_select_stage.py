"""Select on Ray Data: the tables joined, one row per (query, positive), branches counted."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from mining_run import settings

from unime_ray.artifacts import Manifest, Run
from unime_ray.calibration import Calibration, fit_calibration
from unime_ray.config import SelectConfig
from unime_ray.errors import ArtifactError, ConfigError
from unime_ray.schemas import CANDIDATES, HARD_NEGATIVES, JUDGEMENTS
from unime_ray.selection import query_rng, select_negatives
from unime_ray.stages.select import run_select, select_query

pytestmark = pytest.mark.usefixtures("ray_cluster")

NUM_QUERIES = 30


def tables(seed: int) -> tuple[list[dict], list[dict]]:
    """Random candidates (20 a query, two positives) and judgements, in the shape that retrieve and judge leave them."""
    rng = random.Random(seed)
    candidates, judgements = [], []
    for _ in range(NUM_QUERIES):
        query = rng.randbytes(16)
        items = sorted(((rng.uniform(-1, 1), rng.randbytes(16)) for _ in range(20)), reverse=True)
        positives = sorted(rng.randbytes(16) for _ in range(2))
        candidates.append(
            {
                "query_id": query,
                "candidate_ids": [item for _, item in items],
                "similarities": [similarity for similarity, _ in items],
                "positive_ids": positives,
                "positive_similarities": [0.9, 0.1],
            }
        )
        for item in [*positives, *(item for _, item in items)]:
            score = None if rng.random() < 0.1 else rng.random()
            row = {"query_id": query, "candidate_id": item, "is_positive": item in positives, "score": score}
            row |= {"logit_yes": None, "logit_no": None, "error": "no picture" if score is None else None}
            judgements.append(row)
    return candidates, judgements


def saved(folder: Path, candidates: list[dict], judgements: list[dict], files: int = 3) -> Run:
    run = Run(str(folder))
    kept, judged = run.artifact("candidates", "base"), run.artifact("judgements", "tiny")
    half = len(candidates) // 2
    for part, rows in enumerate((candidates[half:], candidates[:half])):
        kept.write(pa.Table.from_pylist(rows, CANDIDATES), CANDIDATES, part=f"part-{part}")
    queries = list(dict.fromkeys(row["query_id"] for row in judgements))
    for part in range(files):
        mine = set(queries[part::files])
        rows = [row for row in judgements if row["query_id"] in mine]
        judged.write(pa.Table.from_pylist(rows, JUDGEMENTS), JUDGEMENTS, part=f"part-{part}")
    for artifact in (kept, judged):
        artifact.finish(Manifest(table=artifact.table, name=artifact.name, stage="test", fingerprint="1"))
    return run


def read(run: Run) -> dict[tuple[bytes, bytes], dict]:
    table = run.artifact("hard_negatives", "tiny").read()
    assert table.schema.remove_metadata() == HARD_NEGATIVES
    rows = table.to_pylist()
    found = {(row["query_id"], row["positive_id"]): row for row in rows}
    assert len(found) == len(rows)
    return found


@pytest.mark.parametrize("fallback", ["skip", "published"])
def test_the_rule_is_applied_to_every_query_and_positive(tmp_path: Path, fallback: str) -> None:
    candidates, judgements = tables(1)
    run = saved(tmp_path / "run", candidates, judgements)
    config = settings(run, judges={"tiny": {}}, select={"delta": "positive", "fallback": fallback, "beta": 0.05})
    manifest = run_select(run, config, "tiny")
    found = read(run)
    scores = {(row["query_id"], row["candidate_id"]): row["score"] for row in judgements}
    expected = unscored = 0
    for row in candidates:
        query = row["query_id"]
        for positive, similarity in zip(row["positive_ids"], row["positive_similarities"], strict=True):
            if scores[query, positive] is None:
                unscored += 1
                assert (query, positive) not in found
                continue
            chosen = select_negatives(
                row["candidate_ids"],
                row["similarities"],
                [scores[query, item] for item in row["candidate_ids"]],
                scores[query, positive],
                similarity,
                config.select,
                query_rng(0, query + positive),
            )
            if not chosen.ids:
                assert (query, positive) not in found
                continue
            expected += 1
            got = found[query, positive]
            assert got["negative_ids"] == chosen.ids and got["negative_reasons"] == chosen.reasons
            assert got["negative_scores"] == pytest.approx(chosen.scores, abs=1e-6)
            assert got["positive_score"] == pytest.approx(scores[query, positive], abs=1e-6)
    assert manifest.rows == len(found) == expected
    counts = manifest.counts
    assert counts["positives_unscored"] == unscored > 0
    assert counts["candidates"] == 20 * (2 * NUM_QUERIES - unscored)
    with_rows = counts["queries_full"] + counts["queries_filled"] + counts.get("queries_fallback", 0)
    assert with_rows == expected and with_rows + counts.get("queries_skipped", 0) == 2 * NUM_QUERIES - unscored


def test_the_cut_into_files_does_not_matter(tmp_path: Path) -> None:
    candidates, judgements = tables(2)
    results = []
    for files in (1, 5):
        run = saved(tmp_path / str(files), candidates, judgements, files)
        config = settings(run, judges={"tiny": {}}, select={"fallback": "published", "beta": 2.0})
        assert run_select(run, config, "tiny").counts["queries_fallback"] > 0
        results.append(read(run))
    assert results[0] == results[1]


def test_no_query_left_is_an_empty_table_and_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = saved(tmp_path / "run", *tables(3))
    config = settings(run, judges={"tiny": {}}, select={"beta": 2.0})
    manifest = run_select(run, config, "tiny")
    assert manifest.rows == 0 and read(run) == {}
    assert "have no candidate that is a hard negative" in caplog.text


def test_pairs_that_were_not_judged_are_told(tmp_path: Path) -> None:
    candidates, judgements = tables(4)
    run = saved(tmp_path / "run", candidates, judgements[:-1])
    with pytest.raises(ArtifactError, match="21 judgements for 22 pairs"):
        run_select(run, settings(run, judges={"tiny": {}}), "tiny")


@pytest.mark.parametrize("use", ["both", "selection", "targets"])
def test_calibrated_scores_stand_where_they_are_asked_for(use: str) -> None:
    candidates, judgements = tables(5)
    calibration, settings = Calibration("platt", 0.5, -1.0, use=use), SelectConfig(beta=0.2, num_negatives=3)
    checked = 0
    for row in candidates:
        mine = [one for one in judgements if one["query_id"] == row["query_id"]]
        raw = {one["candidate_id"]: one["score"] for one in mine}
        mapped = {item: calibration.one(score) for item, score in raw.items()}
        seen, written = (raw if use == "targets" else mapped), (raw if use == "selection" else mapped)
        for line in select_query(row, mine, settings, Counter(), calibration):
            positive = line["positive_id"]
            similarity = row["positive_similarities"][row["positive_ids"].index(positive)]
            scores = [seen[item] for item in row["candidate_ids"]]
            rng = query_rng(0, row["query_id"] + positive)
            chosen = select_negatives(
                row["candidate_ids"], row["similarities"], scores, seen[positive], similarity, settings, rng
            )
            assert line["negative_ids"] == chosen.ids and line["positive_score"] == written[positive]
            assert line["negative_scores"] == [written[item] for item in chosen.ids]
            checked += 1
    assert checked > 20


def test_a_labelled_table_calibrates(tmp_path: Path) -> None:
    candidates, judgements = tables(6)
    run = saved(tmp_path / "run", candidates, judgements)
    kept = [row for row in judgements if row["score"] is not None][:200]
    lines = [f"{row['query_id'].hex()},{row['candidate_id'].hex()},{int(row['score'] > 0.4)}" for row in kept]
    labels = tmp_path / "labels.csv"
    labels.write_text("\n".join(["query_id,candidate_id,relevant", *lines]))
    judge = {"calibration": "isotonic", "calibration_labels": str(labels)}
    manifest = run_select(run, settings(run, judges={"tiny": judge}), "tiny")
    scores = [row["score"] for row in kept]
    expected = fit_calibration("isotonic", scores, [score > 0.4 for score in scores])
    stored = Calibration.from_json(Path(run.artifact("hard_negatives", "tiny").child("calibration.json")).read_text())
    assert stored.pairs == manifest.counts["calibration_pairs"] == 200
    assert stored.apply([0.1, 0.39, 0.5]) == pytest.approx(expected.apply([0.1, 0.39, 0.5]), abs=1e-5)
    raw = {(row["query_id"], row["candidate_id"]): row["score"] for row in judgements}
    for (query, _), row in read(run).items():
        wanted = stored.apply([raw[query, item] for item in row["negative_ids"]])
        assert row["negative_scores"] == pytest.approx(wanted, abs=1e-6)
    assert run_select(run, settings(run, judges={"tiny": judge}), "tiny") == manifest
    labels.write_text("\n".join(["query_id,candidate_id,relevant", *lines[:-1]]))
    assert run_select(run, settings(run, judges={"tiny": judge}), "tiny").fingerprint != manifest.fingerprint
    labels.write_text("query_id,candidate_id\n00,11\n")
    with pytest.raises(ConfigError, match="not a table of query_id, candidate_id, relevant"):
        run_select(run, settings(run, judges={"tiny": judge}), "tiny")
    unlabelled = {"calibration": "platt", "calibration_labels": str(tmp_path / "none.csv")}
    with pytest.raises(ConfigError, match="no such file: .*none.csv"):
        run_select(run, settings(run, judges={"tiny": unlabelled}), "tiny")
