"""Embed: every item that mining needs as a unit vector, by a pool of actors that each hold the model.

Items are taken in the order of the Lance dataset, so that their payload lies together. One that cannot be embedded (a
picture that does not decode) leaves a line in `rejects/embed_<name>`; mining goes on without it. Needs a Ray cluster.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from unime_ray.artifacts import Artifact, Manifest, Run, StageResult, remove, run_stage
from unime_ray.config import EmbedConfig, RunConfig
from unime_ray.corpus.lance_io import open_lance
from unime_ray.corpus.payload import Item, PayloadStore
from unime_ray.errors import ArtifactError, ModelError
from unime_ray.ids import show
from unime_ray.schemas import ID, REJECTS, conform, embeddings_schema
from unime_ray.stages.engine import (
    Progress,
    blocks_of,
    map_actors,
    parquet_files,
    stage_context,
    use_threads,
    write_rows,
)

CODE_VERSION = 1
MINED_SPLIT = "train"
FIRST_REASONS = 10
NORM_TOLERANCE = 1e-2
UNKNOWN_ROW = -1
"""`rejects.row` of an item: several rows of the corpus may have named it."""

log = logging.getLogger(__name__)


class ItemEmbedder(Protocol):
    """What an actor asks of a model: see `models.embedder.Embedder`."""

    def embed_checked(self, items: list[Item]) -> tuple[np.ndarray, list[str | None]]:
        """Vectors (N, D) float32 of unit norm and, per item, None or why it has none."""
        ...


def load_embedder(config: EmbedConfig) -> ItemEmbedder:
    """The model of `config`, in this process.

    Raises:
        ModelError: there is no such checkpoint, it cannot embed, or vLLM is asked for and not installed.
    """
    use_threads(config.resources.num_cpus)
    if config.engine == "vllm":
        from unime_ray.models.embedder_vllm import VllmEmbedder

        return VllmEmbedder.load(config)
    from unime_ray.models.backbone import Backbone
    from unime_ray.models.embedder import Embedder

    backbone = Backbone.load(config.model, revision=config.revision, dtype=config.dtype, pixels=config.pixels)
    return Embedder(backbone, config.batch_tokens, config.dimensions)


def run_embed(
    run: Run,
    config: RunConfig,
    name: str = "base",
    model: str | None = None,
    item_ids: Iterable[bytes] | None = None,
    load: Callable[[EmbedConfig], ItemEmbedder] = load_embedder,
) -> Manifest:
    """Write `embeddings/<name>`: one row per item, D from the model.

    Args:
        model: checkpoint instead of `embed.model`.
        item_ids: the items to embed (default: queries, positives and pool of the split that is mined).
        load: how an actor gets its model.

    Raises:
        ArtifactError: ingest has not run, or an id is not in `items`.
        ModelError: the checkpoint cannot embed, or more items fail than `corpus.max_error_rate` allows.
    """
    from unime_ray.models.names import model_revision, resolve_model

    settings = config.embed if model is None else config.embed.model_copy(update={"model": model, "revision": None})
    revision = model_revision(resolve_model(settings.model), settings.revision)
    inputs = [run.artifact(table) for table in ("items", "qrels", "pools")]
    for artifact in inputs:
        artifact.require()
    wanted = pa.array(sorted(set(item_ids)), ID) if item_ids is not None else None
    extra = {"model": revision} | ({} if wanted is None else {"item_ids": _digest(wanted)})
    artifact = run.artifact("embeddings", name)
    build = _Build(run, settings, name, wanted, config.corpus.max_error_rate, load, revision)
    manifest = run_stage(
        artifact,
        stage="embed",
        code_version=CODE_VERSION,
        config=settings.model_dump(mode="json", include={"model", "engine", "dtype", "pixels", "half", "dimensions"}),
        inputs=inputs,
        extra_inputs=extra,
        build=build,
    )
    Progress(artifact, "item_id").clear()
    return manifest


class _Build:
    """One attempt at the artifact."""

    def __init__(
        self,
        run: Run,
        settings: EmbedConfig,
        name: str,
        wanted: pa.Array | None,
        max_error_rate: float,
        load: Callable[[EmbedConfig], ItemEmbedder],
        revision: str,
    ) -> None:
        self.run, self.settings, self.max_error_rate, self.load = run, settings, max_error_rate, load
        self.wanted, self.revision = wanted, revision
        self.artifact = run.artifact("embeddings", name)
        self.rejects = run.artifact("rejects", f"embed_{name}")

    def __call__(self) -> StageResult:
        wanted = mining_items(self.run) if self.wanted is None else self.wanted
        items = _located(self.run, wanted)
        progress = Progress(self.artifact, "item_id")
        todo = progress.remaining(items)
        # Items that failed are not among the finished: each attempt tries them again and tells of them anew.
        remove(self.rejects.uri)
        if todo.num_rows:
            self._embed(blocks_of(todo, self.settings.rows_per_batch), progress)
        rows = progress.settle()
        rejected = self._check(rows, items.num_rows)
        return StageResult(
            rows=rows,
            counts={"items": items.num_rows, "rejected": rejected},
            model=self.settings.model,
            revision=self.revision,
            resumed_rows=items.num_rows - todo.num_rows,
        )

    def _embed(self, blocks: list[pa.Table], progress: Progress) -> None:
        arguments = {
            "settings": self.settings,
            "store": PayloadStore(self.run.artifact("images").data_uri, self.run.artifact("items").data_uri),
            "rejects": self.rejects,
            "load": self.load,
        }
        with stage_context(progress.config()):
            embedded = map_actors(blocks, EmbedActor, arguments, self.settings.resources, self.settings.rows_per_batch)
            write_rows(embedded, self.artifact, self.settings.resources)

    def _check(self, rows: int, items: int) -> int:
        """How many items were rejected; raise if too many, or if an item is nowhere."""
        rejected = items - rows
        if not rejected:
            return 0
        reasons = self._reasons()
        if len(reasons) != rejected:
            raise ArtifactError(
                f"{self.artifact.uri}: {rows} rows and {len(reasons)} rejects for {items} items; remove the folder and "
                "run embed again"
            )
        manifest = Manifest(table="rejects", name=self.rejects.name, stage="embed", fingerprint="", rows=rejected)
        self.rejects.finish(manifest)
        if rejected > self.max_error_rate * items:
            first = "".join(f"\n  {reason}" for reason in reasons[:FIRST_REASONS])
            raise ModelError(
                f"{rejected} of {items} items cannot be embedded ({rejected / items:.1%}; corpus.max_error_rate is "
                f"{self.max_error_rate:.1%}); all reasons are in {self.rejects.data_uri}, the first:{first}"
            )
        log.warning("%d of %d items cannot be embedded; reasons in %s", rejected, items, self.rejects.data_uri)
        return rejected

    def _reasons(self) -> list[str]:
        paths, fs = parquet_files(self.rejects.data_uri)
        return pads.dataset(paths, filesystem=fs).to_table().column("reason").to_pylist() if paths else []


class EmbedActor:
    """Ray Data: (item_id, source) -> `embeddings` rows; the model is loaded with the first batch."""

    def __init__(
        self,
        settings: EmbedConfig,
        store: PayloadStore,
        rejects: Artifact,
        load: Callable[[EmbedConfig], ItemEmbedder],
    ) -> None:
        self._settings, self._store, self._rejects, self._load = settings, store, rejects, load
        self._turn = threading.Lock()
        self._model: ItemEmbedder | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        items = self._store.items(batch.column("item_id").to_pylist())
        with self._turn:  # payload of the next batch is fetched by another call meanwhile
            if self._model is None:
                self._model = self._load(self._settings)
            vectors_ND, errors = self._model.embed_checked(items)
        errors = _with_broken_vectors(vectors_ND, errors)
        self._reject(items, batch.column("source").to_pylist(), errors)
        good = [row for row, error in enumerate(errors) if error is None]
        schema = embeddings_schema(vectors_ND.shape[1], self._settings.half)
        flat = pa.array(vectors_ND[good].ravel().astype(schema.field("embedding").type.value_type.to_pandas_dtype()))
        vectors = pa.FixedSizeListArray.from_arrays(flat, vectors_ND.shape[1])
        ids = pa.array([items[row].item_id for row in good], ID)
        return conform(pa.table({"item_id": ids, "embedding": vectors}), schema, "embeddings")

    def _reject(self, items: list[Item], sources: list[str], errors: list[str | None]) -> None:
        """One file per batch with failures, named by the first: made again, it is the same file."""
        failed = [row for row, error in enumerate(errors) if error is not None]
        if not failed:
            return
        lines: list[dict[str, Any]] = [
            {
                "source": sources[row],
                "row": UNKNOWN_ROW,
                "stage": self._rejects.name,
                "reason": f"item {show(items[row].item_id)}: {errors[row]}",
            }
            for row in failed
        ]
        part = show(items[failed[0]].item_id)
        self._rejects.write(pa.Table.from_pylist(lines, REJECTS), REJECTS, part=part)


def mining_items(run: Run) -> pa.Array:
    """Ids of all queries, positives and pool items of the split that is mined."""
    qrels = run.artifact("qrels").read(["split", "query_id", "item_id"])
    pools = run.artifact("pools").read(["split", "item_id"])
    qrels, pools = (table.filter(pc.equal(table.column("split"), MINED_SPLIT)) for table in (qrels, pools))
    columns = (qrels.column("query_id"), qrels.column("item_id"), pools.column("item_id"))
    return pa.chunked_array([chunk for column in columns for chunk in column.chunks], ID).unique()


def _located(run: Run, wanted: pa.Array) -> pa.Table:
    """(item_id, source) of the wanted items in the order in which their payload lies."""
    dataset = open_lance(run.artifact("items").data_uri)
    batches = dataset.scanner(columns=["item_id", "source"]).to_batches()
    schema = pa.schema([("item_id", ID), ("source", pa.string())])
    kept = [pa.table(batch).filter(pc.is_in(batch.column("item_id"), value_set=wanted)) for batch in batches]
    table = pa.concat_tables([schema.empty_table(), *(part.cast(schema) for part in kept)]).combine_chunks()
    if table.num_rows < len(wanted):
        raise ArtifactError(
            f"{run.artifact('items').uri}: {len(wanted) - table.num_rows} of {len(wanted)} ids are not in `items`; run "
            "ingest again"
        )
    return table


def _with_broken_vectors(vectors_ND: np.ndarray, errors: list[str | None]) -> list[str | None]:
    """Errors, and one more for each vector that is not of unit norm (NaN included)."""
    norms_N = np.linalg.norm(vectors_ND, axis=1)
    broken_N = ~(np.abs(norms_N - 1) < NORM_TOLERANCE)
    return [
        "the model gave no finite vector" if error is None and broken else error
        for error, broken in zip(errors, broken_N, strict=True)
    ]


def _digest(ids: pa.Array) -> str:
    return hashlib.blake2b(b"".join(ids.to_pylist()), digest_size=12).hexdigest()
