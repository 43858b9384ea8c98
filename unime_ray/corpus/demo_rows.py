"""Which rows the demo corpus has: who drew what, which emoji are held out, pairs, pools and the truth table.

Everything here is a function of the two shipped tables (`data/demo/*.parquet`); `demo.py` writes it to files. Training
reads the pairs and the mining pool alone; the truth table scores judges and filters.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
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
DEV_ARTIST = "twemoji"
"""Left out of the mining pool too: the dev test of a style that adaptation does not see. (The checkpoint knows it.)"""
POOL_ARTISTS = tuple(artist for artist in PRETRAINING_ARTISTS if artist != DEV_ARTIST)
"""Whose pictures lie as duplicates beside the adaptation artist's in the mining pool."""

TRAIN_FOLD = "train"
DEV_FOLDS = ("dev_concept", "dev_composition")
"""Train emoji that adaptation must not see, so that settings are chosen on them and not on the tests."""
KNOWN_FOLDS = (TRAIN_FOLD, *DEV_FOLDS)
"""All that the bundled checkpoint may have been pretrained on."""
TESTS = ("queries", "concepts", "compositions", "artist")
"""New queries about pictures that were mined; emoji never seen; unseen combinations; another artist. The first three
are the adaptation artist's: what adapting is for. The last says what it costs elsewhere."""

NUM_DISTRACTORS = 600
NUM_ARTIST_QUERIES = 500
NUM_DEV_ARTIST = 300
NUM_DEV_COMPOSITIONS = 100
DEV_SHARE = 0.08
DEV_QUERIES_SHARE, TEST_QUERIES_SHARE = 0.12, 0.24
"""Shares of the train fold that lie in the mining pool, but that only dev or test asks about, in either direction."""
DUPLICATED_SHARE = 0.5
"""Share of the pool's emoji that another artist's picture (or two) shows as well."""
SAME_FAMILY, RELATED = 0.6, 0.3
PICTURE_TEXT = "Represent the given picture."
NAME_QUERY = "Name the emoji shown in the given picture."
PICTURE_QUERY = "Find an emoji picture that matches the given name: {}"

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Concept:
    """One emoji. `fold` is `train`, `dev_concept`, `dev_composition`, `heldout_concept` or `heldout_composition`."""

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
    return Corpus(with_dev_folds(concepts), frozenset((row["artist"], row["hexcode"]) for row in drawn))


def with_dev_folds(concepts: dict[str, Concept]) -> dict[str, Concept]:
    """Move whole families of the train fold to `dev_concept`, and one member of others to `dev_composition`.

    A family gives a composition only if two of it stay in train, so that its parts are trained on.
    """
    families: dict[str, list[Concept]] = defaultdict(list)
    for concept in concepts.values():
        if concept.fold == TRAIN_FOLD:
            families[family_of(concept.hexcode)].append(concept)
    whole = {family for family in families if share_of(f"dev:{family}") < DEV_SHARE}
    large = [members for family, members in families.items() if family not in whole and len(members) >= 3]
    single = [sample([c for c in members if c.hexcode != family_of(c.hexcode)], 1, "dev")[0] for members in large]
    moved = {c.hexcode: "dev_concept" for family in whole for c in families[family]}
    moved |= {c.hexcode: "dev_composition" for c in sample(single, NUM_DEV_COMPOSITIONS, "dev")}
    return {code: replace(c, fold=moved.get(code, c.fold)) for code, c in concepts.items()}


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


def share_of(key: str) -> float:
    """A number in [0, 1) that depends on `key` alone: the same on every machine and under every Python."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


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
    """Pairs of the train fold, half each way. Picture queries are the adaptation artist's; what a text query declares
    its positive is one of the pool's pictures of that emoji, any of them."""
    concepts = [c for c in corpus.by_artist(ADAPTATION_ARTIST, TRAIN_FOLD) if asked_in(c) == "train"]
    wanted = 2 * len(concepts) if num_queries is None else num_queries
    if not 2 <= wanted <= 2 * len(concepts):
        raise CorpusError(f"num_queries {wanted}: the demo corpus has 2 to {2 * len(concepts)} training pairs")
    counts = {"t2i": wanted - wanted // 2, "i2t": wanted // 2}
    chosen = {direction: sample(concepts, count, f"{seed}:{direction}") for direction, count in counts.items()}
    rows = [pair(c, ADAPTATION_ARTIST, "i2t", "", "train") for c in chosen["i2t"]]
    rows += [pair(c, declared_artist(corpus, c), "t2i", "", "train") for c in chosen["t2i"]]
    return sorted(rows, key=lambda row: hashlib.sha256(f"{seed}:{row['id']}".encode()).digest())


def asked_in(concept: Concept) -> str:
    """The split that asks about an emoji of the train fold: `train`, or `dev` or `test` alone."""
    share = share_of(f"asked:{concept.hexcode}")
    if share < DEV_QUERIES_SHARE:
        return "dev"
    return "test" if share < DEV_QUERIES_SHARE + TEST_QUERIES_SHARE else "train"


def artists_in_pool(corpus: Corpus, concept: Concept) -> list[str]:
    """Who drew the pool's pictures of an emoji: the adaptation artist, and for half of the emoji one or two others."""
    chance = share_of(f"duplicate:{concept.hexcode}") / DUPLICATED_SHARE
    wanted = 0 if chance >= 1 else 1 if chance >= 0.5 else 2
    others = [artist for artist in POOL_ARTISTS if (artist, concept.hexcode) in corpus.drawn]
    others.sort(key=lambda artist: share_of(f"duplicate:{artist}:{concept.hexcode}"))
    own = [ADAPTATION_ARTIST] if (ADAPTATION_ARTIST, concept.hexcode) in corpus.drawn else []
    return own + others[:wanted]


def declared_artist(corpus: Corpus, concept: Concept) -> str:
    """Whose picture a text query declares its positive. Were it always the adaptation artist's while negatives are
    everyone's, a loss over hard negatives would learn the artist's hand instead of the emoji."""
    artists = artists_in_pool(corpus, concept)
    return artists[int(share_of(f"declared:{concept.hexcode}") * len(artists))]


def mining_pool(corpus: Corpus) -> list[Row]:
    """The adaptation artist's pictures of the train fold with other artists' duplicates of some, and the names.

    A training query names one picture its positive; the others of that emoji are natural false negatives, known to
    the truth table alone.
    """
    names = [concept for concept in corpus.concepts.values() if concept.fold == TRAIN_FOLD]
    pictures = [(artist, concept) for concept in names for artist in artists_in_pool(corpus, concept)]
    return pool_items(pictures, names, "", "train")


def evaluation_set(corpus: Corpus, test: str, split: str) -> tuple[list[Row], list[Row]]:
    """Queries in both directions and the pool of one of `TESTS`; split `test` or `dev`."""
    if test == "artist":
        directions, artist, pool = _artist_set(corpus, split)
    elif test == "queries":
        artist, pool = ADAPTATION_ARTIST, corpus.by_artist(ADAPTATION_ARTIST, TRAIN_FOLD)
        asked = [concept for concept in pool if asked_in(concept) == split]
        directions = {"t2i": asked, "i2t": asked}
    else:
        artist = ADAPTATION_ARTIST
        fold = f"{'heldout' if split == 'test' else split}_{test.removesuffix('s')}"
        held_out = corpus.by_artist(artist, fold)
        directions = {"t2i": held_out, "i2t": held_out}
        known = corpus.by_artist(artist, *(KNOWN_FOLDS if split == "test" else (TRAIN_FOLD,)))
        pool = held_out + _distractors(known, held_out)
    rows = [pair(c, artist, direction, f"_{test}", split) for direction in directions for c in directions[direction]]
    return rows, pool_items([(artist, concept) for concept in pool], pool, f"_{test}", split)


def _artist_set(corpus: Corpus, split: str) -> tuple[dict[str, list[Concept]], str, list[Concept]]:
    """Queries by direction, artist and pool of the test of an artist that adaptation does not see."""
    artist, count = (UNSEEN_ARTIST, NUM_ARTIST_QUERIES) if split == "test" else (DEV_ARTIST, NUM_DEV_ARTIST)
    known = corpus.by_artist(artist, *KNOWN_FOLDS)
    salt = "artist" if split == "test" else "dev artist"
    directions = {direction: sample(known, count, f"{salt}:{direction}") for direction in ("t2i", "i2t")}
    if split == "test":
        return directions, artist, corpus.by_artist(artist)
    asked = {concept.hexcode: concept for chosen in directions.values() for concept in chosen}
    pool = asked | {concept.hexcode: concept for concept in sample(known, NUM_DISTRACTORS, "dev artist")}
    return directions, artist, list(pool.values())


def _distractors(known: list[Concept], held_out: list[Concept]) -> list[Concept]:
    """NUM_DISTRACTORS known emoji, first those that differ from a held-out one only in tone or gender."""
    families = {family_of(concept.hexcode) for concept in held_out}
    near = [concept for concept in known if family_of(concept.hexcode) in families]
    far = [concept for concept in known if family_of(concept.hexcode) not in families]
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
