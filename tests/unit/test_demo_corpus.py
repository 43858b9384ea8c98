"""The shipped demo corpus: nothing held out leaks into training, and what is unpacked is complete and repeatable."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from unime_ray.corpus.demo import (
    ADAPTATION_ARTIST,
    DEMO_DATA,
    PRETRAINING_ARTISTS,
    UNSEEN_ARTIST,
    materialize_demo,
)
from unime_ray.corpus.demo_rows import (
    DEV_ARTIST,
    DEV_FOLDS,
    KNOWN_FOLDS,
    PICTURE_QUERY,
    TESTS,
    Concept,
    family_of,
    load_corpus,
)
from unime_ray.errors import CorpusError

SETS = [(split, test) for split in ("dev", "test") for test in TESTS]
PAIR_KEYS = ["id", "query_text", "query_image", "pos_text", "pos_image", "dataset", "split"]


@pytest.fixture(scope="module")
def concepts() -> dict[str, dict]:
    return {row["hexcode"]: row for row in pq.read_table(DEMO_DATA / "concepts.parquet").to_pylist()}


@pytest.fixture(scope="module")
def pictures() -> list[dict]:
    return pq.read_table(DEMO_DATA / "pictures.parquet").to_pylist()


@pytest.fixture(scope="module")
def corpus_concepts() -> dict[str, Concept]:
    """Concepts with the dev folds, which the shipped table does not name."""
    return load_corpus(DEMO_DATA).concepts


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return materialize_demo(tmp_path_factory.mktemp("demo") / "corpus", num_queries=1500)


def read_rows(root: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (root / name).read_text(encoding="utf-8").splitlines()]


def row_images(rows: list[dict]) -> set[str]:
    return {row[key] for row in rows for key in ("query_image", "pos_image", "image") if row.get(key)}


def row_names(rows: list[dict]) -> set[str]:
    """The emoji names that rows mention, as a target or inside a query."""
    texts = {row[key] for row in rows for key in ("query_text", "pos_text", "text") if row.get(key)}
    return {text.removeprefix(PICTURE_QUERY.format("")) for text in texts}


def file_hashes(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# --- the shipped tables -----------------------------------------------------------------------------------------------


def test_the_corpus_is_as_large_as_promised_and_small_enough_to_ship(concepts, pictures):
    bases = [row for row in concepts.values() if row["skin_tone"] is None]
    assert len(bases) >= 1500
    assert len(concepts) - len(bases) == 600
    artists = {row["artist"] for row in pictures}
    assert artists == {ADAPTATION_ARTIST, UNSEEN_ARTIST, *PRETRAINING_ARTISTS}
    assert sum(path.stat().st_size for path in DEMO_DATA.iterdir()) <= 12 * 2**20


def test_every_picture_is_a_64_pixel_webp_on_an_opaque_ground(pictures):
    for row in pictures[::37]:
        with Image.open(io.BytesIO(row["image"])) as picture:
            assert (picture.format, picture.mode, picture.size) == ("WEBP", "RGB", (64, 64)), row["hexcode"]


def test_equal_bytes_are_one_emoji(pictures):
    emoji_of = defaultdict(set)
    for row in pictures:
        emoji_of[row["image"]].add(row["hexcode"])
    assert [codes for codes in emoji_of.values() if len(codes) > 1] == []


def test_keys_are_unique(concepts, pictures):
    assert len({row["name"] for row in concepts.values()}) == len(concepts)
    assert len({(row["artist"], row["hexcode"]) for row in pictures}) == len(pictures)
    assert {row["hexcode"] for row in pictures} == set(concepts)
    assert not any("FE0F" in code or code != code.upper() for code in concepts)


def test_whole_families_are_held_out_as_concepts(concepts):
    folds = defaultdict(set)
    for code, row in concepts.items():
        folds[family_of(code)].add(row["fold"] == "heldout_concept")
        assert row["base_hexcode"] in concepts
    assert all(len(seen) == 1 for seen in folds.values())
    base_folds = Counter(row["fold"] for row in concepts.values() if row["skin_tone"] is None)
    assert 0.06 <= base_folds["heldout_concept"] / base_folds.total() <= 0.10
    assert {row["group"] for row in concepts.values() if row["fold"] == "heldout_concept"} == {
        row["group"] for row in concepts.values()
    }


def test_the_parts_of_a_held_out_composition_are_trained_on(concepts):
    held_out = [row for row in concepts.values() if row["fold"] == "heldout_composition"]
    assert len(held_out) >= 80
    train_families = Counter(family_of(code) for code, row in concepts.items() if row["fold"] == "train")
    for row in held_out:
        assert train_families[family_of(row["hexcode"])] >= 2, row["name"]
        if row["skin_tone"]:
            assert concepts[row["base_hexcode"]]["fold"] == "train", row["name"]


def test_the_licence_file_names_every_artist_with_its_count(pictures):
    text = (DEMO_DATA / "LICENSES.md").read_text(encoding="utf-8")
    listed = {artist: int(count) for artist, count in re.findall(r"^\| `([\w-]+)` \| (\d+) \|", text, re.MULTILINE)}
    assert listed == Counter(row["artist"] for row in pictures)
    assert f"{len(pictures):,} emoji pictures" in text


# --- the unpacked corpus ----------------------------------------------------------------------------------------------


def test_training_files_hold_only_train_concepts_and_no_unseen_artist(root, corpus_concepts):
    rows = read_rows(root, "train.jsonl") + read_rows(root, "pool.jsonl")
    held_out_names = {concept.name for concept in corpus_concepts.values() if concept.fold != "train"}
    assert row_names(rows) & held_out_names == set()
    paths = [Path(path) for path in row_images(rows)]
    assert {corpus_concepts[path.stem].fold for path in paths} == {"train"}
    assert {path.parent.name for path in paths} == {ADAPTATION_ARTIST, *PRETRAINING_ARTISTS} - {DEV_ARTIST}


def test_no_dev_or_test_picture_lies_under_another_name_in_training(root):
    train = row_images(read_rows(root, "train.jsonl") + read_rows(root, "pool.jsonl"))
    train_bytes = {(root / path).read_bytes() for path in train}
    for split, test in SETS:
        if test == "queries":  # they ask about what was mined; the next test is theirs
            continue
        tested = row_images(read_rows(root, f"{split}_{test}.jsonl"))
        assert tested & train == set()
        assert [path for path in tested if (root / path).read_bytes() in train_bytes] == []


def asked_about(rows: list[dict]) -> set[str]:
    """The emoji of each query, by the code at the end of its id."""
    return {re.split("-(?:t2i|i2t)-", row["id"])[1] for row in rows}


def test_new_queries_ask_about_mined_pictures_that_no_training_query_asks_about(root):
    everything = materialize_demo(root.parent / "all")
    trained = asked_about(read_rows(everything, "train.jsonl"))
    assert trained > asked_about(read_rows(root, "train.jsonl"))
    mined = row_images(read_rows(root, "pool.jsonl"))
    for split, least in (("dev", 200), ("test", 400)):
        rows = read_rows(root, f"{split}_queries.jsonl")
        assert row_images(rows) <= mined
        assert len(asked_about(rows)) >= least
        assert asked_about(rows) & trained == set()


def test_dev_and_test_ask_about_different_pictures(root):
    asked = {split: row_images([r for t in TESTS for r in read_rows(root, f"{split}_{t}.jsonl")]) for split, _ in SETS}
    assert asked["dev"] & asked["test"] == set()


def test_the_dev_folds_are_train_emoji_of_the_right_size(concepts, corpus_concepts):
    folds = Counter(concept.fold for concept in corpus_concepts.values())
    assert {code for code, c in corpus_concepts.items() if c.fold in KNOWN_FOLDS} == {
        code for code, row in concepts.items() if row["fold"] == "train"
    }
    assert 120 <= folds["dev_concept"] <= 220
    assert 80 <= folds["dev_composition"] <= 100
    in_family = defaultdict(Counter)
    for code, concept in corpus_concepts.items():
        in_family[family_of(code)][concept.fold] += 1
    for family in in_family.values():
        assert not family["dev_concept"] or family["dev_concept"] == sum(family[fold] for fold in KNOWN_FOLDS)
        assert not family["dev_composition"] or (family["dev_composition"] == 1 and family["train"] >= 2)


def test_training_pairs_are_half_each_way_and_any_picture_of_the_pool_may_be_the_positive(root):
    rows = read_rows(root, "train.jsonl")
    assert all(list(row) == PAIR_KEYS and row["split"] == "train" for row in rows)
    assert Counter(row["dataset"] for row in rows) == {"emoji_t2i": 750, "emoji_i2t": 750}
    assert len({row["id"] for row in rows}) == 1500
    assert {Path(row["query_image"]).parent.name for row in rows if row["query_image"]} == {ADAPTATION_ARTIST}
    pooled = Counter(Path(row["image"]).parent.name for row in read_rows(root, "pool.jsonl") if row["image"])
    declared = Counter(Path(row["pos_image"]).parent.name for row in rows if row["pos_image"])
    # Every artist's pictures are about as often right as they are there: nothing is learnt from the hand alone.
    for artist, count in pooled.items():
        assert 0.4 < (declared[artist] / declared.total()) / (count / pooled.total()) < 1.6, artist


def test_the_mining_pool_holds_the_adaptation_artist_and_duplicates_by_others(root, corpus_concepts, pictures):
    rows = read_rows(root, "pool.jsonl")
    train = {code for code, concept in corpus_concepts.items() if concept.fold == "train"}
    drawn = {row["hexcode"] for row in pictures if row["artist"] == ADAPTATION_ARTIST} & train
    paths = [Path(row["image"]) for row in rows if row["image"]]
    assert {path.stem for path in paths if path.parent.name == ADAPTATION_ARTIST} == drawn
    copies = Counter(Counter(path.stem for path in paths)[code] for code in drawn)
    assert set(copies) == {1, 2, 3}
    assert 0.4 < copies[1] / len(drawn) < 0.6
    assert {row["text"] for row in rows if not row["image"]} == {corpus_concepts[code].name for code in train}


@pytest.mark.parametrize(("split", "test"), SETS)
def test_every_positive_of_a_test_is_in_its_pool_once(root, split, test):
    queries, pool = read_rows(root, f"{split}_{test}.jsonl"), read_rows(root, f"{split}_{test}_pool.jsonl")
    items = Counter((row["dataset"], row["text"], row["image"]) for row in pool)
    assert set(items.values()) == {1}
    assert all(list(row) == PAIR_KEYS and row["split"] == split for row in queries)
    assert [row for row in queries if (row["dataset"], row["pos_text"], row["pos_image"]) not in items] == []
    assert Counter(row["dataset"] for row in queries).keys() == {f"emoji_t2i_{test}", f"emoji_i2t_{test}"}


def test_a_test_of_held_out_emoji_asks_about_nothing_else(root, corpus_concepts):
    folds = {("test", "concepts"): {"heldout_concept"}, ("test", "compositions"): {"heldout_composition"}}
    folds |= {("dev", f"{fold.removeprefix('dev_')}s"): {fold} for fold in DEV_FOLDS}
    artists = {("test", "artist"): UNSEEN_ARTIST, ("dev", "artist"): DEV_ARTIST}
    for split, test in SETS:
        paths = [Path(path) for path in row_images(read_rows(root, f"{split}_{test}.jsonl"))]
        assert {path.parent.name for path in paths} == {artists.get((split, test), ADAPTATION_ARTIST)}
        assert {corpus_concepts[path.stem].fold for path in paths} <= folds.get((split, test), set(KNOWN_FOLDS))


def test_every_item_and_query_has_its_emoji_in_the_truth(root, concepts):
    truth = {
        (row["kind"], row["key"]): row["hexcode"] for row in pq.read_table(root / "truth_items.parquet").to_pylist()
    }
    assert pq.read_table(root / "truth_items.parquet").num_rows == len(truth)
    for path in root.glob("*.jsonl"):
        for row in read_rows(root, path.name):
            sides = [(row.get("query_image"), row.get("query_text")), (row.get("pos_image"), row.get("pos_text"))]
            sides = sides if "id" in row else [(row["image"], row["text"])]
            found = {truth["image", image] if image else truth["text", text] for image, text in sides}
            assert len(found) == 1, row
            assert all(image is None or (root / image).is_file() for image, _ in sides)


def test_relevance_is_graded_and_symmetric(root, concepts):
    code = {row["name"]: row["hexcode"] for row in concepts.values()}
    table = pq.read_table(root / "truth.parquet").to_pylist()
    relevance = {(row["hexcode_a"], row["hexcode_b"]): row["relevance"] for row in table}
    assert len(relevance) == len(table)
    assert all(relevance[b, a] == grade for (a, b), grade in relevance.items())
    assert all(relevance[c, c] == 1.0 for c in concepts)
    assert set(relevance.values()) == {1.0, 0.6, 0.3}
    assert relevance[code["woman running"], code["person running"]] == 0.6
    toned = next(row for row in concepts.values() if row["skin_tone"])
    assert relevance[toned["hexcode"], toned["base_hexcode"]] == 0.6
    assert relevance[code["new moon"], code["new moon face"]] == 0.3
    assert (code["owl"], code["bird"]) not in relevance
    assert (code["lemon"], code["rocket"]) not in relevance


# --- unpacking --------------------------------------------------------------------------------------------------------


def test_unpacking_again_writes_nothing(root):
    before = {path: path.stat().st_mtime_ns for path in root.iterdir()}
    assert materialize_demo(root, num_queries=1500) == root
    assert {path: path.stat().st_mtime_ns for path in root.iterdir()} == before


def test_the_same_arguments_give_the_same_files_and_the_seed_changes_only_training(root, tmp_path):
    before = file_hashes(root)
    other = materialize_demo(tmp_path / "other", num_queries=1500)
    assert file_hashes(other) == before
    after = file_hashes(materialize_demo(other, num_queries=1500, seed=1))
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {"train.jsonl", "demo_corpus.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CorpusError, match="not empty"):
        materialize_demo(tmp_path, num_queries=10)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("num_queries", [0, 1, 10**6])
def test_an_impossible_number_of_queries_is_refused(tmp_path, num_queries):
    with pytest.raises(CorpusError, match=r"2 to \d+ training pairs"):
        materialize_demo(tmp_path / "corpus", num_queries=num_queries)
    assert list(tmp_path.iterdir()) == []
