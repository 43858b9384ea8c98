"""The pictures and concepts the tiny model learns from, and which of them make a batch.

Only training concepts (`fold == "train"`) by the pretraining artists are ever read for training. A batch is made of
small neighbourhoods of concepts that look or read alike, each concept drawn by two artists: in-batch negatives are
then hard, and the same emoji in another hand is always at stake.

Shapes: N pictures, C concepts, D width of an embedding.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from unime_ray.errors import CorpusError

TRAIN_FOLD = "train"
_COLOUR_WORDS = frozenset(
    ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white", "pink", "grey")
)


@dataclass(frozen=True)
class Pictures:
    """Decoded pictures and their concepts.

    pixels (N, 64, 64, 3) uint8; concept (N,) row in `names`; artist (N,); lists over concepts: names, keywords,
    subgroups, bases (hexcode of the emoji without skin tone), hexcodes; colour_bound (C,) where colour is meaning.
    """

    pixels: np.ndarray
    concept: np.ndarray
    artist: np.ndarray
    hexcodes: list[str]
    names: list[str]
    keywords: list[list[str]]
    subgroups: list[str]
    bases: list[str]
    colour_bound: np.ndarray

    def of_concept(self) -> list[np.ndarray]:
        """Picture numbers of each concept."""
        order = np.argsort(self.concept, kind="stable")
        bounds = np.searchsorted(self.concept[order], np.arange(len(self.names) + 1))
        return [order[bounds[c] : bounds[c + 1]] for c in range(len(self.names))]


def load_pictures(folder: str | Path, artists: Sequence[str], folds: Sequence[str] = (TRAIN_FOLD,)) -> Pictures:
    """Pictures of the named artists whose concept is in one of `folds`, decoded once into one array.

    Raises:
        CorpusError: the folder lacks a table, or no picture fits.
    """
    folder = Path(folder)
    for name in ("concepts.parquet", "pictures.parquet"):
        if not (folder / name).exists():
            raise CorpusError(f"{folder / name} is missing; build the demo pictures first (jobs/build_demo_corpus.py)")
    concepts = [row for row in pq.read_table(folder / "concepts.parquet").to_pylist() if row["fold"] in set(folds)]
    number = {row["hexcode"]: index for index, row in enumerate(concepts)}
    table = pq.read_table(folder / "pictures.parquet", filters=[("artist", "in", list(artists))])
    rows = [row for row in table.to_pylist() if row["hexcode"] in number]
    if not rows:
        raise CorpusError(f"{folder}: no picture by {', '.join(artists)} in the folds {', '.join(folds)}")
    return Pictures(
        pixels=np.stack([np.asarray(Image.open(io.BytesIO(row["image"])).convert("RGB")) for row in rows]),
        concept=np.array([number[row["hexcode"]] for row in rows]),
        artist=np.array([row["artist"] for row in rows]),
        hexcodes=[row["hexcode"] for row in concepts],
        names=[row["name"] for row in concepts],
        keywords=[list(row["keywords"] or []) for row in concepts],
        subgroups=[row["subgroup"] for row in concepts],
        bases=[row["base_hexcode"] for row in concepts],
        colour_bound=np.array([_colour_is_meaning(row) for row in concepts]),
    )


def _colour_is_meaning(concept: dict) -> bool:
    named = _COLOUR_WORDS & set(concept["name"].lower().replace(":", " ").split())
    return bool(concept["skin_tone"] or named or concept["group"] == "flags")


class Neighbours:
    """Which concepts are near which: by kind always, by the model's own embeddings as they become known.

    Holds one running text and one running picture embedding per concept (C, D); a batch overwrites its own rows.
    """

    def __init__(self, pictures: Pictures, width: int) -> None:
        count = len(pictures.names)
        self.text = np.zeros((count, width), np.float32)
        self.picture = np.zeros((count, width), np.float32)
        self.kin = [np.empty(0, np.int64)] * count
        subgroups, bases = np.array(pictures.subgroups), np.array(pictures.bases)
        for concept in range(count):
            near = (subgroups == subgroups[concept]) | (bases == bases[concept])
            near[concept] = False
            self.kin[concept] = np.flatnonzero(near)

    def update(self, concepts: np.ndarray, text: np.ndarray, picture: np.ndarray, momentum: float = 0.5) -> None:
        """Moves the rows of `concepts` towards their newest embeddings (len, D)."""
        self.text[concepts] = momentum * self.text[concepts] + (1 - momentum) * text
        self.picture[concepts] = momentum * self.picture[concepts] + (1 - momentum) * picture

    def nearest(self, concepts: np.ndarray, count: int) -> np.ndarray:
        """(len, count) other concepts, most alike first: text to picture, picture to text and picture to picture."""
        count = min(count, len(self.kin) - 1)
        alike = self.text[concepts] @ self.picture.T + self.picture[concepts] @ (self.text + self.picture).T
        alike[np.arange(len(concepts)), concepts] = -np.inf
        top = np.argpartition(-alike, count, axis=1)[:, :count]
        return np.take_along_axis(top, np.argsort(-np.take_along_axis(alike, top, 1), axis=1), axis=1)


def choose_concepts(
    neighbours: Neighbours, drawn: np.ndarray, num_concepts: int, cluster: int, hard: float, rng: np.random.Generator
) -> np.ndarray:
    """`num_concepts` different concepts, all of them in `drawn` (those with a picture), in neighbourhoods of `cluster`.

    Of a seed's companions a share `hard` comes from its 20 nearest by embedding, a quarter from its kin (same
    subgroup, or another skin tone of the same emoji), the rest from anywhere.
    """
    has_picture = np.zeros(len(neighbours.kin), bool)
    has_picture[drawn] = True
    seeds = rng.choice(drawn, num_concepts // cluster, replace=False)
    near = neighbours.nearest(seeds, 20) if hard > 0 else None
    chosen: dict[int, None] = dict.fromkeys(int(seed) for seed in seeds)
    for row, seed in enumerate(seeds):
        for _ in range(cluster - 1):
            draw = rng.random()
            if near is not None and draw < hard:
                pick = rng.choice(near[row])
            elif draw < hard + 0.25 and len(neighbours.kin[seed]):
                pick = rng.choice(neighbours.kin[seed])
            else:
                pick = rng.choice(drawn)
            if has_picture[pick]:
                chosen.setdefault(int(pick))
    while len(chosen) < num_concepts:
        chosen.setdefault(int(rng.choice(drawn)))
    return np.array(list(chosen)[:num_concepts])


def choose_pictures(concepts: np.ndarray, of_concept: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Two pictures of each concept, by two artists where there are two: (2 * len(concepts),), pairs adjacent."""
    pairs = [rng.choice(of_concept[c], 2, replace=len(of_concept[c]) < 2) for c in concepts]
    return np.concatenate(pairs)
