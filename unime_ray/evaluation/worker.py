"""The Ray actors that hold a model for measuring, and how work is handed out to them.

Actors start when the first chunk of work needs them and keep one model at a time; a run that has nothing new to
measure starts none. There are as many as `embed.resources` allows, of the size it names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayTaskError
from ray.util import ActorPool

from unime_ray.artifacts import Run, local_folder
from unime_ray.config import Resources
from unime_ray.errors import UnimeError
from unime_ray.evaluation.arms import Checkpoint
from unime_ray.evaluation.progress import Progress

ITEMS_PER_CHUNK = 256
GROUPS_PER_CHUNK = 64

Group = tuple[bytes, list[bytes]]
"""A query and the candidates to put in order."""

Load = Callable[[str, Checkpoint], Any]


def load_model(kind: str, checkpoint: Checkpoint) -> Any:
    """The `embedder` or `reranker` that a checkpoint holds.

    Raises:
        ModelError: there is no such checkpoint, or it cannot do this.
    """
    from unime_ray.models.backbone import Backbone
    from unime_ray.models.embedder import Embedder
    from unime_ray.models.reranker import Reranker

    folder = local_folder(checkpoint.model)
    backbone = Backbone.load(folder, revision=checkpoint.revision, dtype=checkpoint.dtype, pixels=checkpoint.pixels)
    if kind == "embedder":
        return Embedder(backbone, checkpoint.batch_tokens, checkpoint.dimensions)
    return Reranker(backbone, checkpoint.batch_tokens)


class Worker:
    """Embeds and reranks items of one run by id."""

    def __init__(self, root: str, load: Load = load_model) -> None:
        from unime_ray.corpus.payload import PayloadStore

        run = Run(root)
        self.store = PayloadStore(run.artifact("images").data_uri, run.artifact("items").data_uri)
        self.load = load
        self.loaded: tuple[tuple[str, Checkpoint], Any] | None = None

    def embed(self, checkpoint: Checkpoint, ids: list[bytes]) -> np.ndarray:
        """Unit vectors (N, D) float32; one of NaN where an item cannot be embedded."""
        vectors_ND, errors = self._model("embedder", checkpoint).embed_checked(self.store.items(ids))
        vectors_ND[[row for row, error in enumerate(errors) if error is not None]] = np.nan
        return vectors_ND

    def rerank(self, checkpoint: Checkpoint, mode: str, groups: list[Group]) -> list[list[int]]:
        """For each group the order of its candidates, best first."""
        ids = [identifier for query, candidates in groups for identifier in (query, *candidates)]
        items = iter(self.store.items(ids))
        payload = [(next(items), [next(items) for _ in candidates]) for _, candidates in groups]
        return self._model("reranker", checkpoint).rerank_groups(payload, mode)

    def _model(self, kind: str, checkpoint: Checkpoint) -> Any:
        if self.loaded is None or self.loaded[0] != (kind, checkpoint):
            self.loaded = None  # the old model's memory is free before the new one takes its own
            self.loaded = ((kind, checkpoint), self.load(kind, checkpoint))
        return self.loaded[1]


class Workers:
    """The actors of one evaluation, started on first use."""

    def __init__(self, run: Run, resources: Resources, load: Load = load_model) -> None:
        self.run, self.resources, self.load = run, resources, load
        self._pool: ActorPool | None = None
        self._actors: list[Any] = []

    def embed(self, name: str, checkpoint: Checkpoint, ids: Sequence[bytes]) -> dict[bytes, np.ndarray]:
        """Vector by id; each id is embedded once."""
        chunks = _chunks(list(ids), ITEMS_PER_CHUNK)
        vectors: dict[bytes, np.ndarray] = {}
        with Progress(f"embed {name}", len(ids), "items") as progress:
            results = self._map(lambda actor, chunk: actor.embed.remote(checkpoint, chunk), chunks)
            for chunk, block in zip(chunks, results, strict=True):
                vectors.update(zip(chunk, np.asarray(block, dtype=np.float32), strict=True))
                progress.advance(len(chunk))
        return vectors

    def rerank(self, name: str, checkpoint: Checkpoint, mode: str, groups: Sequence[Group]) -> list[list[int]]:
        """Order of each group's candidates."""
        chunks = _chunks(list(groups), GROUPS_PER_CHUNK)
        orders: list[list[int]] = []
        with Progress(f"rerank {name}", len(groups), "queries") as progress:
            for block in self._map(lambda actor, chunk: actor.rerank.remote(checkpoint, mode, chunk), chunks):
                orders += [[int(place) for place in order] for order in block]
                progress.advance(len(block))
        return orders

    def _map(self, call: Any, chunks: list[list[Any]]) -> Iterator[Any]:
        if not chunks:
            return
        if self._pool is None:
            self._pool = ActorPool(self._start())
        try:
            yield from self._pool.map(call, chunks)
        except RayTaskError as error:
            if isinstance(error.cause, UnimeError):
                raise error.cause from None
            raise

    def _start(self) -> list[Any]:
        wanted = self.resources
        count = max(wanted.max_actors or 0, wanted.num_actors)
        options = {"num_cpus": wanted.num_cpus, "num_gpus": wanted.num_gpus, "max_restarts": 2, "max_task_retries": 2}
        actor = ray.remote(Worker).options(**options)
        self._actors = [actor.remote(self.run.root, self.load) for _ in range(count)]
        return self._actors

    def close(self) -> None:
        """Give the actors' resources back."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors, self._pool = [], None


def _chunks(values: list[Any], size: int) -> list[list[Any]]:
    return [values[start : start + size] for start in range(0, len(values), size)]
