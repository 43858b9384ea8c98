"""Which rows the demo corpus has: who drew what, which emoji are held out, pairs, pools and the truth table.

Everything here is a function of the two shipped tables (`data/demo/*.parquet`); `demo.py` writes it to files. Training
reads the pairs and the mining pool alone; the truth table scores judges and filters.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from unime_ray.errors import CorpusError

ADAPTATION_ARTIST = "openmoji"
"""The "user's own" pictures, which the bundled checkpoint has never seen: training pairs and two tests come from it."""
UNSEEN_ARTIST = "emojione"
"""In no training file. Its flat drawings (2016) are its own and their idiom is common. Noto and blob share drawings
with each other, fluent-flat and fluent-contrast with fluent-3d, so none of those would be unseen."""
PRETRAINING_ARTISTS = ("blob", "fluent-3d", "fluent-contrast", "fluent-flat", "fxemoji", "noto", "noto-mono", "twemoji")
"""What the bundled checkpoint was pretrained on, concepts of fold `train` only."""

NUM_DISTRACTORS = 600
NUM_ARTIST_QUERIES = 500
SAME_FAMILY, RELATED = 0.6, 0.3
PICTURE_TEXT = "Represent the given picture."
NAME_QUERY = "Name the emoji shown in the given picture."
PICTURE_QUERY = "Find an emoji picture that matches the given name: {}"

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Concept:
    """One emoji. `fold` is `train`, `heldout_concept` or `heldout_composition`."""

    hexcode: str
    name: str
    keywords: frozenset[str]
    subgroup: str
    skin_tone: str | None
    fold: str


@dataclass(frozen=True, slots=True)
class Corpus:
    concepts: dict[str, Concept]
    drawn: frozenset[tuple[str, str]]
    """(artist, hexcode) of every picture there is."""

    def by_artist(self, artist: str, *folds: str) -> list[Concept]:
        """The artist's concepts of these folds (all folds if none is given), in CLDR order."""
        drawn = (c for c in self.concepts.values() if (artist, c.hexcode) in self.drawn)
        return [concept for concept in drawn if not folds or concept.fold in folds]


def load_corpus(folder: Path) -> Corpus:
    rows = pq.read_table(folder / "concepts.parquet").to_pylist()
    concepts = {
        r["hexcode"]: Concept(
            r["hexcode"], r["name"], frozenset(r["keywords"]), r["subgroup"], r["skin_tone"], r["fold"]
        )
        for r in rows
    }
    drawn = pq.read_table(folder / "pictures.parquet", columns=["artist", "hexcode"]).to_pylist()
    return Corpus(concepts, frozenset((row["artist"], row["hexcode"]) for row in drawn))


def picture_path(artist: str, hexcode: str) -> str:
    return f"images/{artist}/{hexcode}.webp"


def family_of(hexcode: str) -> str:
    """The emoji without tone, gender and direction: "man cook", "woman cook" and "cook" are one family."""
    dropped = {"200D", "2640", "2642", "27A1", "1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
    parts = [part for part in hexcode.split("-") if part not in dropped]
    if len(parts) > 1 and parts[0] in {"1F468", "1F469", "1F9D1"}:
        parts[0] = "PERSON"
    return "-".join(parts)


# --- pairs and pools --------------------------------------------------------------------------------------------------


def sample(concepts: list[Concept], count: int, salt: str) -> list[Concept]:
    """`count` concepts in the order of a hash: the same on every machine and under every Python."""
    return sorted(concepts, key=lambda c: hashlib.sha256(f"{salt}:{c.hexcode}".encode()).digest())[:count]


def pair(concept: Concept, artist: str, direction: str, suffix: str, split: str) -> Row:
    """One query with its positive; direction `t2i` looks for the picture, `i2t` for the name."""
    picture = picture_path(artist, concept.hexcode)
    texts = (PICTURE_QUERY.format(concept.name), PICTURE_TEXT) if direction == "t2i" else (NAME_QUERY, concept.name)
    query_image, pos_image = (None, picture) if direction == "t2i" else (picture, None)
    return {
        "id": f"{split}{suffix}-{direction}-{concept.hexcode}",
        "query_text": texts[0],
        "query_image": query_image,
        "pos_text": texts[1],
        "pos_image": pos_image,
        "dataset": f"emoji_{direction}{suffix}",
        "split": split,
    }


def pool_items(pictures: Iterable[tuple[str, Concept]], names: Iterable[Concept], suffix: str, split: str) -> list[Row]:
    """Pictures to be found by text queries, names to be found by picture queries."""
    to_picture, to_name = ({"dataset": f"emoji_{direction}{suffix}", "split": split} for direction in ("t2i", "i2t"))
    rows: list[Row] = [{"text": PICTURE_TEXT, "image": picture_path(a, c.hexcode), **to_picture} for a, c in pictures]
    return rows + [{"text": concept.name, "image": None, **to_name} for concept in names]


def training_pairs(corpus: Corpus, num_queries: int | None, seed: int) -> list[Row]:
    concepts = corpus.by_artist(ADAPTATION_ARTIST, "train")
    wanted = 2 * len(concepts) if num_queries is None else num_queries
    if not 2 <= wanted <= 2 * len(concepts):
        raise CorpusError(f"num_queries {wanted}: the demo corpus has 2 to {2 * len(concepts)} training pairs")
    counts = {"t2i": wanted - wanted // 2, "i2t": wanted // 2}
    chosen = {direction: sample(concepts, count, f"{seed}:{direction}") for direction, count in counts.items()}
    rows = [pair(c, ADAPTATION_ARTIST, direction, "", "train") for direction in chosen for c in chosen[direction]]
    return sorted(rows, key=lambda row: hashlib.sha256(f"{seed}:{row['id']}".encode()).digest())


def mining_pool(corpus: Corpus) -> list[Row]:
    """Every trainable picture and name of the train fold.

    A training query names one picture its positive; the other artists' pictures of that emoji are natural false
    negatives, known to the truth table alone.
    """
    artists = (ADAPTATION_ARTIST, *PRETRAINING_ARTISTS)
    pictures = [(artist, concept) for artist in artists for concept in corpus.by_artist(artist, "train")]
    names = [concept for concept in corpus.concepts.values() if concept.fold == "train"]
    return pool_items(pictures, names, "", "train")


def evaluation_set(corpus: Corpus, test: str) -> tuple[list[Row], list[Row]]:
    """Queries in both directions and the pool of `concepts`, `compositions` or `artist`."""
    artist = UNSEEN_ARTIST if test == "artist" else ADAPTATION_ARTIST
    train = corpus.by_artist(artist, "train")
    if test == "artist":
        directions = {d: sample(train, NUM_ARTIST_QUERIES, f"artist:{d}") for d in ("t2i", "i2t")}
        pool = corpus.by_artist(artist)
    else:
        held_out = corpus.by_artist(artist, f"heldout_{test.removesuffix('s')}")
        directions = {"t2i": held_out, "i2t": held_out}
        pool = held_out + _distractors(train, held_out)
    rows = [pair(c, artist, direction, f"_{test}", "test") for direction in directions for c in directions[direction]]
    return rows, pool_items([(artist, concept) for concept in pool], pool, f"_{test}", "test")


def _distractors(train: list[Concept], held_out: list[Concept]) -> list[Concept]:
    """NUM_DISTRACTORS known emoji, first those that differ from a held-out one only in tone or gender."""
    families = {family_of(concept.hexcode) for concept in held_out}
    near = [concept for concept in train if family_of(concept.hexcode) in families]
    far = [concept for concept in train if family_of(concept.hexcode) not in families]
    near = sample(near, NUM_DISTRACTORS // 2, "near")
    return near + sample(far, NUM_DISTRACTORS - len(near), "far")


# --- truth ------------------------------------------------------------------------------------------------------------


def truth_table(corpus: Corpus) -> pa.Table:
    """(hexcode_a, hexcode_b, relevance), both orders; a pair that is absent has relevance 0."""
    relevance = {(code, code): 1.0 for code in corpus.concepts}
    families = defaultdict(list)
    for code in corpus.concepts:
        families[family_of(code)].append(code)
    for codes in families.values():
        relevance |= dict.fromkeys(permutations(codes, 2), SAME_FAMILY)
    for a, b in _related(corpus):
        relevance.setdefault((a, b), RELATED)
        relevance.setdefault((b, a), RELATED)
    pairs = sorted(relevance)
    columns = [[a for a, _ in pairs], [b for _, b in pairs], [relevance[ab] for ab in pairs]]
    return pa.table(columns, names=["hexcode_a", "hexcode_b", "relevance"])


def _related(corpus: Corpus) -> Iterator[tuple[str, str]]:
    """Base emoji of one subgroup that share at least two keywords and half of them.

    Keywords that more than two fifths of a subgroup carry ("animal" among mammals) tell nothing and are left out.
    """
    subgroups: dict[str, list[Concept]] = defaultdict(list)
    for concept in corpus.concepts.values():
        if concept.skin_tone is None:
            subgroups[concept.subgroup].append(concept)
    for members in subgroups.values():
        common = Counter(keyword for concept in members for keyword in concept.keywords)
        telling = {c: {k for k in c.keywords if common[k] <= max(3, 0.4 * len(members))} for c in members}
        for index, a in enumerate(members):
            for b in members[:index]:
                shared, either = telling[a] & telling[b], telling[a] | telling[b]
                if len(shared) >= 2 and 2 * len(shared) >= len(either):
                    yield a.hexcode, b.hexcode


def truth_items(corpus: Corpus, pictures: set[str]) -> pa.Table:
    """(kind, key, hexcode): which emoji a picture (by relative path) or a text (name or whole query) is about."""
    rows = [("image", path, Path(path).stem) for path in sorted(pictures)]
    for concept in corpus.concepts.values():
        rows += [("text", text, concept.hexcode) for text in (concept.name, PICTURE_QUERY.format(concept.name))]
    return pa.table([list(column) for column in zip(*rows, strict=True)], names=["kind", "key", "hexcode"])
