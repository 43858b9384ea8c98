"""The stage `duplicates` and what retrieve makes of it: no near-duplicate is mined, no training item is held out."""

from __future__ import annotations

import io

import mining_run
import numpy as np
import pytest
from PIL import Image

from unime_ray.artifacts import Run
from unime_ray.errors import ArtifactError, ConfigError
from unime_ray.stages.duplicates import run_duplicates
from unime_ray.stages.embed import run_embed
from unime_ray.stages.retrieve import run_retrieve

pytest.importorskip("imagehash")
pytestmark = pytest.mark.usefixtures("ray_cluster")


def scene(seed: int, quality: int | None = None, size: int = 160) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((160, 160), Image.Resampling.BICUBIC).resize((size, size))
    buffer = io.BytesIO()
    image.save(buffer, "PNG") if quality is None else image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@pytest.fixture
def made(tmp_path) -> tuple[Run, dict[str, bytes], dict]:
    """Texts search pictures: picture 0 has two copies in the pool, picture 1 one in the test split."""
    corpus = mining_run.Corpus()
    ids = {f"p{n}": corpus.item(None, scene(n)) for n in range(8)}
    ids |= {f"q{n}": corpus.item(f"q{n}") for n in range(4)}
    ids["small"] = corpus.item(None, scene(0, size=90))
    ids["jpeg"] = corpus.item(None, scene(0, quality=40), instruction="Look.")
    ids["asked"] = corpus.item("what is it?", scene(0, quality=41))  # with a text it is another item
    ids["held"] = corpus.item(None, scene(1, quality=50))
    for n in range(4):
        corpus.pair(ids[f"q{n}"], ids[f"p{n}"])
    corpus.pair(corpus.item("q3"), ids["held"], split="test")
    corpus.pool(*(ids[name] for name in ids if name not in ("held", "q0", "q1", "q2", "q3")))
    corpus.pool(ids["held"], split="test")
    run = corpus.save(tmp_path / "run")
    embed = {"model": mining_run.model_folder(tmp_path / "model")}
    run_embed(run, mining_run.settings(run, embed=embed), load=mining_run.load_fake_embedder)
    return run, ids, {"embed": embed, "retrieve": {"top_k": 20}}


def candidates(run: Run) -> dict[bytes, set[bytes]]:
    return {row["query_id"]: set(row["candidate_ids"]) for row in mining_run.rows_by_id(run, "candidates", "base", ())}


def test_copies_are_no_candidates_and_leaks_are_dropped_or_counted(made):
    run, ids, sections = made
    run_retrieve(run, mining_run.settings(run, **sections))
    assert {ids["small"], ids["jpeg"]} < candidates(run)[ids["q0"]]
    config = mining_run.settings(run, **sections, duplicates={"methods": ["phash"]})
    with pytest.raises(ArtifactError, match="'duplicates' is missing"):
        run_retrieve(run, config)
    counts = run_duplicates(run, config).counts
    assert counts == {
        "images": 12,
        "images_unreadable": 0,
        "phash_groups": 2,
        "phash_members": 6,
        "phash_largest": 4,
        "leaked_items": 1,
    }
    counts = run_retrieve(run, config).counts
    found = candidates(run)
    assert found[ids["q0"]] == {ids[name] for name in ("p1", "p2", "p3", "p4", "p5", "p6", "p7", "asked")}
    assert ids["small"] in found[ids["q2"]] and ids["p1"] in found[ids["q2"]] and "pairs_leaked" not in counts
    dropping = mining_run.settings(run, **sections, duplicates={"methods": ["phash"], "leak": "drop"})
    assert run_duplicates(run, dropping).fingerprint == run.artifact("duplicates").require().fingerprint
    counts = run_retrieve(run, dropping).counts
    found = candidates(run)
    assert counts["pairs_leaked"] == 1 and counts["pool_leaked"] == 1 and counts["queries_without_vectors"] == 0
    assert ids["q1"] not in found and all(ids["p1"] not in listed for listed in found.values())


class Flat(mining_run.FakeEmbedder):
    """Every picture has one direction, and so has every text: like is near like only."""

    def embed_checked(self, items: list) -> tuple[np.ndarray, list[str | None]]:
        vectors = np.zeros((len(items), mining_run.DIM), np.float32)
        vectors[:, 0] = 1.0
        for row, item in enumerate(items):
            if item.rendered in ("q0", "q1"):
                vectors[row] = mining_run.direction(item.rendered)
        return vectors, [None] * len(items)


def test_near_embeddings_of_one_kind_are_a_group(tmp_path):
    corpus = mining_run.Corpus()
    pictures = [corpus.item(None, scene(n)) for n in range(3)]
    texts = [corpus.item(f"q{n}") for n in range(4)]
    held = corpus.item(None, scene(9))
    corpus.pair(texts[0], pictures[0])
    corpus.pair(texts[1], held, split="test")
    corpus.pool(*pictures, *texts)
    run = corpus.save(tmp_path / "run")
    embed = {"model": mining_run.model_folder(tmp_path / "model")}
    config = mining_run.settings(run, embed=embed, duplicates={"methods": ["embedding"], "rows_per_task": 2})
    with pytest.raises(ArtifactError, match="embeddings/base"):
        run_duplicates(run, config)
    run_embed(run, config, load=lambda _: Flat())
    counts = run_duplicates(run, config, load=lambda _: Flat()).counts
    rows = run.artifact("duplicates").read().to_pylist()
    groups: dict[bytes, set[bytes]] = {}
    for row in rows:
        groups.setdefault(row["group_id"], set()).add(row["item_id"])
    assert sorted(map(sorted, groups.values())) == sorted([sorted([*pictures, held]), sorted(texts[2:])])
    assert counts["embedding_largest"] == 4 and counts["leaked_items"] == 3
    assert {row["method"] for row in rows} == {"embedding"} and all(row["distance"] < 1e-6 for row in rows)


def test_without_methods_there_is_nothing_to_do(tmp_path):
    run = mining_run.word_run(tmp_path / "run", 3, 4)
    with pytest.raises(ConfigError, match="duplicates.methods is empty"):
        run_duplicates(run, mining_run.settings(run))
