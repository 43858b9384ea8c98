"""Training rows of the distillation: texts with their teacher's vectors, by number, from one memory-mapped file."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from unime_ray.artifacts import Artifact
from unime_ray.train.data import ROWS_PER_CHUNK, Examples, RowFile, prepare_rows

COLUMNS = ("text_id", "text", "vector")


@dataclass(frozen=True, slots=True)
class TextExample:
    """A text and its teacher's vector (T,) float32 of unit norm."""

    row: int
    query_id: bytes
    """The text's id; errors name it as they name a query."""
    text: str
    vector_T: np.ndarray


def prepare_texts(table: Artifact) -> str:
    """Write a `teacher` artifact as one Arrow IPC file sorted by id, once; return the file's URI.

    Raises:
        ArtifactError: the artifact is not there.
    """
    return prepare_rows(table, COLUMNS, ("text_id",), "texts")


class TextExamples(RowFile):
    """The rows of a prepared teacher table, by number."""

    def __getitem__(self, row: int) -> TextExample:
        chunk, place = self.chunk_of(row), row % ROWS_PER_CHUNK
        identifier, text = (chunk.column(name)[place].as_py() for name in ("text_id", "text"))
        return TextExample(row, identifier, text, chunk.column("vector")[place].values.to_numpy())


def open_rows(uri: str) -> RowFile:
    """What a prepared file holds: hard negatives, or texts with vectors."""
    return TextExamples(uri) if "vector" in RowFile(uri).columns else Examples(uri)
