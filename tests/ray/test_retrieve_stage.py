"""Retrieve on Ray Data: exact top-k without positives, their duplicates and the query itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mining_run import NOT_A_PICTURE, Corpus, direction, load_fake_embedder, model_folder, settings, word_run

from unime_ray.artifacts import Manifest, Run
from unime_ray.errors import ArtifactError
from unime_ray.schemas import CANDIDATES
from unime_ray.stages.embed import run_embed
from unime_ray.stages.retrieve import run_retrieve

pytestmark = pytest.mark.usefixtures("ray_cluster")


def mined(run: Run, tmp_path: Path, **retrieve: object) -> tuple[Manifest, dict[bytes, dict]]:
    config = settings(
        run,
        embed={"model": model_folder(tmp_path / "model")},
        retrieve={"top_k": 10, "queries_per_batch": 16} | retrieve,
        corpus={"max_error_rate": 0.5},
    )
    run_embed(run, config, load=load_fake_embedder)
    manifest = run_retrieve(run, config)
    table = run.artifact("candidates", "base").read()
    assert table.schema.remove_metadata() == CANDIDATES
    return manifest, {row["query_id"]: row for row in table.to_pylist()}


def test_top_k_is_exact_and_ordered(tmp_path: Path) -> None:
    corpus = Corpus()
    texts = [f"a{number}" for number in range(90)]
    answers = {corpus.item(text): text for text in texts}
    queries = {corpus.item(f"q{number}"): number for number in range(40)}
    for query, number in queries.items():
        corpus.pair(query, list(answers)[number])
    corpus.pool(*answers)
    manifest, rows = mined(corpus.save(tmp_path / "run"), tmp_path)
    assert manifest.rows == 40 and manifest.counts["pool"] == 90 and manifest.counts["duplicates_excluded"] == 0
    for query, number in queries.items():
        similarity = {item: float(direction(text) @ direction(f"q{number}")) for item, text in answers.items()}
        positive = list(answers)[number]
        expected = sorted(set(answers) - {positive}, key=lambda item: -similarity[item])[:10]
        row = rows[query]
        assert row["candidate_ids"] == expected
        assert np.allclose(row["similarities"], [similarity[item] for item in expected], atol=1e-6)
        assert row["positive_ids"] == [positive]
        assert row["positive_similarities"] == pytest.approx([similarity[positive]], abs=1e-6)


def test_positives_duplicates_and_the_query_itself_are_left_out(tmp_path: Path) -> None:
    picture, other = b"picture one", b"picture two"
    corpus = Corpus()
    query = corpus.item("a cat", instruction="Find a picture.")
    positive = corpus.item(None, picture, instruction="Represent the picture.")
    second = corpus.item("the second positive")
    unembedded = corpus.item("bad", NOT_A_PICTURE)
    for item in (positive, second, unembedded):
        corpus.pair(query, item)
    irrelevant = corpus.item("told to be irrelevant")
    corpus.pair(query, irrelevant, relevance=0.0)
    same_picture = corpus.item(None, picture, instruction="Another instruction.")
    same_text_as_query = corpus.item("a cat")
    same_text_as_second = corpus.item("the second positive", instruction="Answer.")
    picture_with_text = corpus.item("with a caption", picture)
    another_picture = corpus.item(None, other)
    held_out = corpus.item("held out")
    corpus.pool(positive, second, unembedded, irrelevant, same_picture, same_text_as_query, same_text_as_second)
    corpus.pool(picture_with_text, another_picture, query)
    corpus.pool(held_out, split="test")
    corpus.pair(corpus.item("a test query"), held_out, split="test")
    manifest, rows = mined(corpus.save(tmp_path / "run"), tmp_path)
    assert set(rows) == {query}
    assert set(rows[query]["candidate_ids"]) == {irrelevant, picture_with_text, another_picture}
    assert rows[query]["positive_ids"] == sorted([positive, second])
    counts = manifest.counts
    assert counts["positives_without_vectors"] == 1 and counts["queries"] == 1
    # The twin of the query and the twins of both positives.
    assert counts["duplicates_excluded"] == 3


def test_queries_without_a_vector_are_counted(tmp_path: Path) -> None:
    corpus = Corpus()
    answers = [corpus.item(f"a{number}") for number in range(5)]
    corpus.pair(corpus.item("q"), answers[0])
    corpus.pair(corpus.item("broken", NOT_A_PICTURE), answers[1])
    corpus.pool(*answers)
    manifest, rows = mined(corpus.save(tmp_path / "run"), tmp_path)
    assert len(rows) == 1 and manifest.counts["queries_without_vectors"] == 1


def test_a_killed_attempt_starts_over_without_doubles(tmp_path: Path) -> None:
    run = word_run(tmp_path / "run")
    manifest, rows = mined(run, tmp_path)
    Path(run.artifact("candidates", "base").child("manifest.json")).unlink()
    again, rows_again = mined(run, tmp_path)
    assert again.rows == 60 and rows_again == rows and manifest.fingerprint == again.fingerprint


def test_nothing_to_mine_is_one_clear_line(tmp_path: Path) -> None:
    corpus = Corpus()
    held_out = corpus.item("held out")
    corpus.pair(corpus.item("q"), held_out, split="test")
    corpus.pool(held_out, split="test")
    corpus.pool(corpus.item("in the pool"))
    with pytest.raises(ArtifactError, match="nothing to mine: 0 queries and 1 pool items of split 'train'"):
        mined(corpus.save(tmp_path / "run"), tmp_path)


def test_a_query_may_be_kept_to_the_pools_of_its_own_datasets(tmp_path: Path) -> None:
    corpus = Corpus()
    names, pictures = [corpus.item(f"n{i}") for i in range(6)], [corpus.item(f"p{i}") for i in range(6)]
    to_name, to_picture, to_both = corpus.item("x"), corpus.item("y"), corpus.item("z")
    corpus.pair(to_name, names[0], dataset="names")
    corpus.pair(to_picture, pictures[0], dataset="pictures")
    corpus.pair(to_both, names[1], dataset="names")
    corpus.pair(to_both, pictures[1], dataset="pictures")
    corpus.pool(*names, dataset="names")
    corpus.pool(*pictures, dataset="pictures")
    _, rows = mined(corpus.save(tmp_path / "run"), tmp_path, scope="dataset")
    assert set(rows[to_name]["candidate_ids"]) == set(names[1:])
    assert set(rows[to_picture]["candidate_ids"]) == set(pictures[1:])
    both = {*names, *pictures} - {names[1], pictures[1]}
    assert len(rows[to_both]["candidate_ids"]) == 10
    assert set(rows[to_both]["candidate_ids"]) == both
