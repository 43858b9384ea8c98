"""What the stages on Ray Data share: its settings, pools of actors, and going on after a kill.

A stage plans on the driver which ids are still to do and hands them to Ray Data as small blocks; actors fetch what the
ids stand for and do the work; Ray Data writes the table and, per file, a checkpoint of the ids in it.

Why blocks of ids and not a read of the table: in Ray 2.60 a Parquet read (its listing), a streaming repartition and the
filter of finished rows each ask for a whole CPU. On two CPUs whose actors hold one each the stage would wait for itself
for ever. Here only actors and writes ask for CPUs, and both leave room for each other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.fs as pafs
import ray.data
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.data.checkpoint import CheckpointConfig
from ray.exceptions import RayTaskError

from unime_ray.artifacts import Artifact, filesystem, remove
from unime_ray.config import Resources
from unime_ray.errors import UnimeError
from unime_ray.schemas import ID

TASK_CPUS = 0.05
"""What a write asks for: it fits beside the actors."""
ACTOR_SHARE = 0.9
"""Actors ask Ray for this share of their CPUs, so that writes run even where actors take every CPU there is."""
CALLS_PER_ACTOR = 2
"""One call fetches payload while the other one's model runs."""
PENDING = ".pending.parquet"
RETRY_ADVICE = "\nFailed to apply UDF transform after "
"""Where Ray Data begins what it appends to an error's message: advice on retries, which mend no error of ours."""

log = logging.getLogger(__name__)


@contextmanager
def stage_context(checkpoint: CheckpointConfig | None = None) -> Iterator[None]:
    """Ray Data's settings while a stage runs; errors of ours raised in a worker come out as themselves."""
    context = DataContext.get_current().copy()
    context.raise_original_map_exception = True
    context.checkpoint_config = checkpoint
    # It warns every half minute that a worker uses the memory that a Python process with pyarrow uses.
    context.issue_detectors_config.high_memory_detector_config.detection_time_interval_s = -1
    try:
        with DataContext.current(context):
            yield
    except RayTaskError as error:
        if not isinstance(error.cause, UnimeError):
            raise
        error.cause.args = (str(error.cause).partition(RETRY_ADVICE)[0],)
        raise error.cause from error


def blocks_of(table: pa.Table, rows: int) -> list[pa.Table]:
    """`table` cut into blocks of at most `rows` rows: the units of work, and of what a kill can undo."""
    return [table.slice(start, rows) for start in range(0, table.num_rows, rows)]


def map_actors(
    blocks: Sequence[pa.Table], actor: type, arguments: Mapping[str, Any], resources: Resources, rows: int
) -> Dataset:
    """The blocks through a pool of `actor(**arguments)`, `rows` rows a call, each call an Arrow table in and out."""
    _warn_if_too_large(resources)
    size = min(resources.num_actors, len(blocks))
    pool = ActorPoolStrategy(
        min_size=size,
        max_size=min(max(resources.max_actors or size, size), len(blocks)),
        max_concurrent_calls_per_actor=CALLS_PER_ACTOR,
        enable_true_multi_threading=True,
    )
    return ray.data.from_blocks(list(blocks)).map_batches(
        actor,
        batch_size=rows,
        batch_format="pyarrow",
        compute=pool,
        fn_constructor_kwargs=dict(arguments),
        num_cpus=resources.num_cpus * ACTOR_SHARE,
        num_gpus=resources.num_gpus or None,
    )


def map_tasks(blocks: Sequence[pa.Table], function: Callable[..., pa.Table], arguments: Mapping[str, Any]) -> Dataset:
    """The blocks through `function(block, **arguments)` in tasks: for work with nothing to load beforehand."""
    return ray.data.from_blocks(list(blocks)).map_batches(
        function, batch_size=None, batch_format="pyarrow", fn_kwargs=dict(arguments), num_cpus=1
    )


def write_rows(dataset: Dataset, artifact: Artifact, resources: Resources) -> None:
    """Write the rows into the artifact's Parquet folder, beside what is there, by at most a task per actor.

    Without that bound Ray would start a process for each of the many writes that fit into one CPU.
    """
    fs, path = filesystem(artifact.data_uri)
    writers = max(resources.num_actors, resources.max_actors or 1)
    dataset.write_parquet(path, filesystem=fs, ray_remote_args={"num_cpus": TASK_CPUS}, concurrency=writers)


def count_rows(artifact: Artifact) -> int:
    """Rows in the artifact's Parquet files, from their footers."""
    paths, fs = parquet_files(artifact.data_uri)
    return pads.dataset(paths, filesystem=fs, format="parquet").count_rows() if paths else 0


def parquet_files(uri: str) -> tuple[list[str], pafs.FileSystem]:
    """The Parquet files in the folder `uri`, sorted, as paths of the filesystem that comes with them."""
    fs, path = filesystem(uri)
    infos = fs.get_file_info(pafs.FileSelector(path, recursive=False, allow_not_found=True))
    return sorted(info.path for info in infos if info.path.endswith(".parquet")), fs


def use_threads(num_cpus: float) -> int:
    """Let torch use as many threads in this process as the actor has CPUs; returns how many."""
    import torch

    threads = max(1, int(num_cpus))
    torch.set_num_threads(threads)
    return threads


class Progress:
    """Which rows of an artifact are written, by Ray Data's own checkpoints: a file counts once its ids are committed.

    Ray Data writes the ids of a file as `<file>.pending.parquet`, then the file, then renames the pending one. A
    file without a committed checkpoint is what a killed driver left, or what a worker wrote that outlived it.
    """

    def __init__(self, artifact: Artifact, id_column: str) -> None:
        self.artifact, self.id_column = artifact, id_column
        self._uri = artifact.child("checkpoint")

    def config(self) -> CheckpointConfig:
        """The setting that makes Ray Data write checkpoints of this artifact."""
        fs, path = filesystem(self._uri)
        return CheckpointConfig(self.id_column, path, override_filesystem=fs, delete_checkpoint_on_success=False)

    def done(self) -> pa.Array:
        """Ids that are written; files that no checkpoint vouches for are removed first."""
        self._sweep()
        return self.written()

    def written(self) -> pa.Array:
        """Ids that checkpoints vouch for; nothing is changed."""
        paths, fs = parquet_files(self._uri)
        committed = [path for path in paths if not path.endswith(PENDING)]
        if not committed:
            return pa.array([], ID)
        return pads.dataset(committed, filesystem=fs, format="parquet").to_table().column(0).cast(ID).unique()

    def remaining(self, table: pa.Table) -> pa.Table:
        """The rows of `table` whose id is not written yet."""
        return table.filter(pc.invert(pc.is_in(table.column(self.id_column), value_set=self.done())))

    def settle(self) -> int:
        """After the work: remove what no checkpoint vouches for and count the rows that stay."""
        self._sweep()
        return count_rows(self.artifact)

    def forget(self, data_files: Sequence[str]) -> None:
        """Have these data files made again: their checkpoints go first, so that a kill here loses nothing."""
        names = {_write_name(path) for path in data_files}
        checkpoints, fs = parquet_files(self._uri)
        for path in checkpoints:
            if _stem(path) in names:
                fs.delete_file(path)
        self._sweep()

    def clear(self) -> None:
        """Remove the checkpoints; for an artifact that has its manifest."""
        remove(self._uri)

    def _sweep(self) -> None:
        checkpoints, checkpoint_fs = parquet_files(self._uri)
        committed = [path for path in checkpoints if not path.endswith(PENDING)]
        stems = {_stem(path) for path in committed}
        data, data_fs = parquet_files(self.artifact.data_uri)
        for path in data:
            if _write_name(path) not in stems:
                data_fs.delete_file(path)
        for path in checkpoints:
            if path.endswith(PENDING):
                checkpoint_fs.delete_file(path)


def _stem(path: str) -> str:
    return path.rsplit("/", 1)[-1].removesuffix(".parquet")


def _write_name(path: str) -> str:
    """What a data file shares with its checkpoint: Ray Data calls them `<name>-<part>` and `<name>`."""
    return _stem(path).rpartition("-")[0]


def _warn_if_too_large(resources: Resources) -> None:
    """Ray waits without a word for a node that an actor fits on; one line says so."""
    need = resources.num_cpus * ACTOR_SHARE
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= need and node.get("GPU", 0) >= resources.num_gpus for node in alive):
        log.warning(
            "no node has %g CPUs and %g GPUs yet: waiting for the cluster to add one (lower the stage's `resources` if "
            "it never will)",
            resources.num_cpus,
            resources.num_gpus,
        )
