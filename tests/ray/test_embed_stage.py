"""Embed on Ray Data: one row per mined item, rejects for the others, skip and resume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.dataset as pads
import pytest
from mining_run import (
    DIM,
    NOT_A_PICTURE,
    Corpus,
    direction,
    load_broken,
    load_fake_embedder,
    model_folder,
    rows_by_id,
    settings,
    word_run,
)

from unime_ray.artifacts import Run
from unime_ray.errors import ArtifactError, ModelError
from unime_ray.schemas import embeddings_schema
from unime_ray.stages.embed import run_embed

pytestmark = pytest.mark.usefixtures("ray_cluster")


def config(run: Run, tmp_path: Path, **embed: object):
    section = {"model": model_folder(tmp_path / "model"), "rows_per_batch": 16, "resources": {"num_actors": 2}} | embed
    return settings(run, embed=section, corpus={"max_error_rate": 0.1})


def test_every_mined_item_once(tmp_path: Path) -> None:
    run = word_run(tmp_path / "run")
    settled = config(run, tmp_path)
    manifest = run_embed(run, settled, load=load_fake_embedder)
    rows = rows_by_id(run, "embeddings", "base", ("item_id",))
    # 60 queries and 90 pool items; the item of the test split is not mined.
    assert manifest.rows == len(rows) == len({row["item_id"] for row in rows}) == 150
    assert manifest.model == settled.embed.model and manifest.revision
    assert run.artifact("embeddings", "base").read().schema.remove_metadata() == embeddings_schema(DIM)
    texts = {row["item_id"]: row["rendered"] for row in items(run)}
    for row in rows:
        assert np.allclose(row["embedding"], direction(texts[row["item_id"]]))
    assert not Path(run.child("embeddings", "base", "checkpoint")).exists()
    again = run_embed(run, settled, load=lambda config: pytest.fail("a finished stage loads no model"))
    assert again == manifest


def items(run: Run) -> list[dict]:
    import lance

    return lance.dataset(run.artifact("items").data_uri).to_table().to_pylist()


def test_half_precision_and_given_ids(tmp_path: Path) -> None:
    run = word_run(tmp_path / "run", 4, 6)
    chosen = [row["item_id"] for row in items(run)][:3]
    manifest = run_embed(run, config(run, tmp_path, half=True), "few", item_ids=chosen, load=load_fake_embedder)
    table = run.artifact("embeddings", "few").read()
    assert manifest.rows == 3 and set(table.column("item_id").to_pylist()) == set(chosen)
    assert table.schema.remove_metadata() == embeddings_schema(DIM, half=True)
    with pytest.raises(ArtifactError, match="1 of 1 ids are not in `items`"):
        run_embed(run, config(run, tmp_path), "none", item_ids=[b"x" * 16], load=load_fake_embedder)


def corpus_with_bad_pictures(count: int) -> Corpus:
    corpus = Corpus()
    answers = [corpus.item(f"a{number}") for number in range(30)]
    for number in range(10):
        corpus.pair(corpus.item(f"q{number}"), answers[number])
    corpus.pool(*answers)
    corpus.pool(*(corpus.item(f"bad {number}", NOT_A_PICTURE) for number in range(count)))
    return corpus


def test_items_that_fail_are_rejected_and_told_of(tmp_path: Path) -> None:
    run = corpus_with_bad_pictures(2).save(tmp_path / "run")
    manifest = run_embed(run, config(run, tmp_path), load=load_fake_embedder)
    assert manifest.rows == 40 and manifest.counts == {"items": 42, "rejected": 2}
    rejects = run.artifact("rejects", "embed_base").read().to_pylist()
    assert len(rejects) == 2 and {row["stage"] for row in rejects} == {"embed_base"}
    assert all("cannot identify image" in row["reason"] and row["source"] == "corpus.jsonl" for row in rejects)


def test_too_many_failures_stop_the_run_with_the_reasons(tmp_path: Path) -> None:
    run = corpus_with_bad_pictures(20).save(tmp_path / "run")
    with pytest.raises(ModelError, match=r"20 of 60 items cannot be embedded \(33.3%.*\n  item [0-9a-f]{32}: cannot"):
        run_embed(run, config(run, tmp_path), load=load_fake_embedder)
    assert run.artifact("embeddings", "base").manifest() is None
    # With a higher limit the same command finishes: what was embedded stays.
    patient = config(run, tmp_path).model_copy(update={"corpus": settings(run, corpus={"max_error_rate": 0.5}).corpus})
    manifest = run_embed(run, patient, load=load_fake_embedder)
    assert manifest.rows == 40 and manifest.counts["rejected"] == 20


def test_errors_of_a_worker_keep_their_class(tmp_path: Path) -> None:
    run = word_run(tmp_path / "run", 4, 6)
    with pytest.raises(ModelError) as error:
        run_embed(run, config(run, tmp_path), load=load_broken)
    assert str(error.value) == "model x: architecture Y is not supported"


def test_files_that_no_checkpoint_vouches_for_are_made_again(tmp_path: Path) -> None:
    run = word_run(tmp_path / "run")
    settled = config(run, tmp_path)
    run_embed(run, settled, load=load_fake_embedder)
    artifact = run.artifact("embeddings", "base")
    whole = rows_by_id(run, "embeddings", "base", ("item_id",))
    # As a kill between a file and its checkpoint leaves it: data, but no manifest and no committed ids.
    Path(artifact.child("manifest.json")).unlink()
    assert pads.dataset(artifact.data_uri).count_rows() == 150
    run_embed(run, settled, load=load_fake_embedder)
    assert rows_by_id(run, "embeddings", "base", ("item_id",)) == whole


def test_missing_ingest_is_named(tmp_path: Path) -> None:
    run = Run(str(tmp_path / "empty"))
    with pytest.raises(ArtifactError, match="'items' is missing"):
        run_embed(run, config(run, tmp_path), load=load_fake_embedder)
