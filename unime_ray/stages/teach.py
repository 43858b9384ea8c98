"""Teach: texts with the vectors of a sentence embedder, for UniME V1's first stage (`loss: text_distill`).

The vectors are made here, once, by a pool of actors, or taken from a Parquet file of the user's. Needs a Ray cluster.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unime_ray.artifacts import Artifact, Manifest, Run, StageResult, remove, run_stage
from unime_ray.config import Resources, RunConfig
from unime_ray.config_teacher import TeacherConfig
from unime_ray.corpus.lance_io import open_lance
from unime_ray.corpus.text_vectors import TEXTS, distinct_texts, text_signatures
from unime_ray.errors import ConfigError, CorpusError, ModelError
from unime_ray.models.teacher import Teacher, teacher_folder
from unime_ray.schemas import conform, teacher_schema
from unime_ray.stages.embed import mining_items
from unime_ray.stages.engine import blocks_of, count_rows, map_actors, stage_context, use_threads, write_rows

CODE_VERSION = 1
SPEED = ("rows_per_batch", "num_actors", "num_cpus", "num_gpus")
"""Settings that change how fast vectors are made, but not which."""


class SentenceEncoder(Protocol):
    """What an actor asks of a teacher: see `models.teacher.Teacher`."""

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors (N, T) float32 of unit norm."""
        ...


def run_teach(
    run: Run, config: RunConfig, name: str, load: Callable[[TeacherConfig], SentenceEncoder] = Teacher
) -> Manifest:
    """Write `teacher/<name>`: one row per distinct text, vectors of unit norm.

    Args:
        load: how an actor gets its model.

    Raises:
        ConfigError: no teacher of that name. ArtifactError: ingest has not run. ModelError: the model cannot be had.
        CorpusError: the Parquet file lacks a column, or a row of it cannot be used; the message names file and row.
    """
    if name not in config.teachers:
        raise ConfigError(
            f"teachers: nothing is called {name!r}; the config has {', '.join(config.teachers) or 'none'}"
        )
    settings, artifact = config.teachers[name], run.artifact("teacher", name)
    own = settings.path is None
    extra = text_signatures(settings)
    if settings.engine == "sentence_transformers":
        extra["model"] = _revision(settings)

    def build() -> StageResult:
        remove(artifact.data_uri)  # an attempt that was killed: vectors of texts are quick, so it starts over
        if settings.engine == "parquet":
            rows = _import(settings, artifact)
        else:
            rows = _encode(own_texts(run) if own else file_texts(settings), settings, artifact, load)
        model = settings.model if settings.engine == "sentence_transformers" else None
        return StageResult(rows=rows, model=model, revision=extra.get("model"))

    return run_stage(
        artifact,
        stage="teach",
        code_version=CODE_VERSION,
        config=settings.model_dump(mode="json", exclude=set(SPEED)),
        inputs=[run.artifact(table) for table in ("items", "qrels", "pools")] if own else [],
        extra_inputs=extra,
        build=build,
    )


def _revision(settings: TeacherConfig) -> str:
    from unime_ray.models.names import model_revision

    return model_revision(teacher_folder(settings.model), settings.revision)


def own_texts(run: Run) -> pa.Table:
    """(text_id, text) of the mined items without a picture."""
    batches = (
        open_lance(run.artifact("items").data_uri).scanner(columns=["item_id", "rendered", "image_id"]).to_batches()
    )
    wanted, kept = mining_items(run), [TEXTS.empty_table()]
    for batch in batches:
        plain = pc.and_(pc.is_null(batch.column("image_id")), pc.is_in(batch.column("item_id"), value_set=wanted))
        rows = pa.table(batch).filter(plain)
        kept.append(pa.table([rows.column("item_id"), rows.column("rendered")], schema=TEXTS))
    return pa.concat_tables(kept).combine_chunks()


def file_texts(settings: TeacherConfig) -> pa.Table:
    """(text_id, text) of the texts in `settings.path`, each once.

    Raises:
        CorpusError: see `run_teach`.
    """
    parts = [rows for rows, _ in distinct_texts(settings, [settings.text_column])]
    return pa.concat_tables([TEXTS.empty_table(), *parts]).combine_chunks()


def _encode(
    texts: pa.Table, settings: TeacherConfig, artifact: Artifact, load: Callable[[TeacherConfig], SentenceEncoder]
) -> int:
    if not texts.num_rows:
        raise CorpusError(f"{artifact.key}: no texts to embed; name a Parquet file with teachers.{artifact.name}.path")
    resources = Resources(num_actors=settings.num_actors, num_cpus=settings.num_cpus, num_gpus=settings.num_gpus)
    blocks = blocks_of(texts, settings.rows_per_batch)
    with stage_context():
        made = map_actors(blocks, TeachActor, {"settings": settings, "load": load}, resources, settings.rows_per_batch)
        write_rows(made, artifact, resources)
    return count_rows(artifact)


class TeachActor:
    """Ray Data: (text_id, text) -> `teacher` rows; the model is loaded with the first batch."""

    def __init__(self, settings: TeacherConfig, load: Callable[[TeacherConfig], SentenceEncoder]) -> None:
        self._settings, self._load, self._turn = settings, load, threading.Lock()
        self._model: SentenceEncoder | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        with self._turn:
            if self._model is None:
                use_threads(self._settings.num_cpus)
                self._model = self._load(self._settings)
            vectors_NT = self._model.encode(batch.column("text").to_pylist())
        if not np.isfinite(vectors_NT).all():
            raise ModelError(f"teacher {self._settings.model}: a vector is not finite; choose another model")
        return _rows(batch.select(["text_id", "text"]), vectors_NT)


def _import(settings: TeacherConfig, artifact: Artifact) -> int:
    """Copy texts and vectors from the user's file, batch by batch."""
    rows, width = 0, None
    for number, (texts, vectors_NT) in enumerate(
        distinct_texts(settings, [settings.text_column, settings.vector_column])
    ):
        width = width or vectors_NT.shape[1]
        if vectors_NT.shape[1] != width:
            raise CorpusError(
                f"{settings.path}: vectors of {width} and of {vectors_NT.shape[1]} numbers; use one model"
            )
        table = _rows(texts, vectors_NT)
        artifact.write(table, table.schema, part=f"part-{number:05d}")
        rows += table.num_rows
    if not rows:
        raise CorpusError(f"{settings.path}: no rows; a teacher needs texts with vectors")
    return rows


def _rows(texts: pa.Table, vectors_NT: np.ndarray) -> pa.Table:
    flat = pa.array(vectors_NT.ravel(), pa.float32())
    vectors = pa.FixedSizeListArray.from_arrays(flat, vectors_NT.shape[1])
    return conform(texts.append_column("vector", vectors), teacher_schema(vectors_NT.shape[1]), "teacher")
