"""The truth table of a corpus whose true relevance is known: what oracles and measurements read, never training.

truth_items.parquet   kind ('image' | 'text'), key, hexcode : which concept a picture file or an exact text shows
truth.parquet         hexcode_a, hexcode_b, relevance       : graded relevance of two different concepts
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from unime_ray.artifacts import Run, filesystem, join
from unime_ray.corpus.files import read_picture
from unime_ray.corpus.lance_io import open_lance
from unime_ray.errors import CorpusError, RejectedRow
from unime_ray.ids import image_id

MAX_BYTES = 2**30
RELEVANT = 0.999
"""A pair at least so relevant is relevant: the same concept, not a relative of it."""
TRUTH_FILES = ("truth.parquet", "truth_items.parquet")


@dataclass(frozen=True)
class Truth:
    """Concepts by picture and by text, and how relevant two concepts are to each other, in [0, 1]."""

    by_image: Mapping[bytes, str]
    by_text: Mapping[str, str]
    pairs: Mapping[tuple[str, str], float]

    @classmethod
    def load(cls, folder: str) -> Truth:
        """Read the two tables; picture keys are files under `folder`, known by the hash of their bytes.

        Raises:
            CorpusError: a table or a picture is missing, or a table lacks a column.
        """
        items = _read(folder, "truth_items.parquet", ("kind", "key", "hexcode"))
        pairs = _read(folder, "truth.parquet", ("hexcode_a", "hexcode_b", "relevance"))
        by_image = {_picture_id(folder, key): code for kind, key, code in items if kind == "image"}
        by_text = {key.strip(): code for kind, key, code in items if kind == "text"}
        graded = {(a, b): float(value) for a, b, value in pairs}
        return cls(by_image, by_text, {(b, a): value for (a, b), value in graded.items()} | graded)

    def concept(self, text: str | None, image: bytes | None) -> str | None:
        """The concept of an item by its picture's id if it has one, else by its exact text; None if unknown."""
        if image is not None:
            return self.by_image.get(image)
        return None if text is None else self.by_text.get(text.strip())

    def relevance(self, concept_a: str | None, concept_b: str | None) -> float:
        """1.0 for the same concept, the graded value for related ones, 0.0 otherwise (unknown ones included)."""
        if concept_a is None or concept_b is None:
            return 0.0
        return 1.0 if concept_a == concept_b else self.pairs.get((concept_a, concept_b), 0.0)


def concepts_of(run: Run, truth: Truth) -> dict[bytes, str]:
    """The concept of each of the run's items that the truth table knows, by item id."""
    table = open_lance(run.artifact("items").data_uri).to_table(columns=["item_id", "text", "image_id"])
    columns = (table[name].to_pylist() for name in ("item_id", "text", "image_id"))
    found = ((item, truth.concept(text, image)) for item, text, image in zip(*columns, strict=True))
    return {item: concept for item, concept in found if concept is not None}


def _read(folder: str, name: str, columns: tuple[str, ...]) -> list[tuple]:
    uri = join(folder, name)
    fs, path = filesystem(uri)
    try:
        table = pq.read_table(path, filesystem=fs, columns=list(columns))
        return list(zip(*(table.column(column).to_pylist() for column in columns), strict=True))
    except (OSError, KeyError, pa.ArrowException) as error:
        raise CorpusError(f"{uri}: not a truth table with columns {', '.join(columns)}: {error}") from error


def _picture_id(folder: str, key: str) -> bytes:
    try:
        return image_id(read_picture(join(folder, key), MAX_BYTES))
    except RejectedRow as error:
        raise CorpusError(f"{join(folder, 'truth_items.parquet')}: {error.reason}") from error
