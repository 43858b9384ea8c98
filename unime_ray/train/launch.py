"""Starting a training on Ray Train and seeing it through: workers, checkpoints, restarts, progress, errors.

Ray Train restarts the workers `max_failures` times from the last checkpoint. When the driver itself was killed, the
same command starts Ray Train under the same name and storage, where it finds that checkpoint again.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import pyarrow.fs as pafs
import ray
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from unime_ray.artifacts import Artifact, Manifest, Run, StageResult, filesystem, join, read_text, remove, run_stage
from unime_ray.config import IMPORTED, PixelBudget, TrainConfig, nearest
from unime_ray.errors import ArtifactError, ConfigError, TrainingError, UnimeError
from unime_ray.models.names import model_revision, resolve_model
from unime_ray.train.data import BatchOrder, Examples, prepare_examples
from unime_ray.train.job import StopOnOwnErrors, TrainingJob, check_trackers
from unime_ray.train.log import LOG, read_log
from unime_ray.train.text_data import open_rows, prepare_texts

CODE_VERSION = 1
CHECKPOINTS = "checkpoints"
SNAPSHOT = "checkpoint_manager_snapshot.json"
NOT_LEARNING = (
    "num_workers", "resize_check_seconds", "cpus_per_worker", "use_gpu", "strategy", "feature_cache_mb",
    "checkpoint_every", "max_failures", "log_every", "tracker", "wandb_project", "wandb_mode",
)  # fmt: skip
"""Settings that change how fast or how safely a model is trained, but not which: no reason to train it again."""
Section = TypeVar("Section", bound=TrainConfig)

log = logging.getLogger(__name__)


def section_of(sections: Mapping[str, Section], name: str, kind: str) -> Section:
    """The section of that name.

    Raises:
        ConfigError: there is none; the nearest name is given.
    """
    if name not in sections:
        raise ConfigError(f"{kind}: nothing is called {name!r}{nearest(name, sections)}")
    return sections[name]


def run_training(
    run: Run,
    section: TrainConfig,
    *,
    table: Artifact,
    judge: str | None,
    kind: str,
    name: str,
    model: str,
    pixels: PixelBudget,
    num_negatives: int,
    worker: Callable[[dict[str, Any]], dict[str, Any]],
    start: Artifact | None = None,
) -> Manifest:
    """Train `section` on the rows of `table`; the stage is skipped if this very model is there.

    Args:
        table: hard negatives, those of `judge`, or texts with a teacher's vectors. start: a trained model to start
            from instead of the checkpoint `model`. kind: the artifact's table, `embedder` or `reranker`.
            num_negatives: each row must have at least these. worker: the function each worker runs, given a
            `TrainingJob` as a dict.

    Raises:
        ArtifactError, ModelError, TrainingError: see the callers.
    """
    artifact = run.artifact(kind, name)
    if judge == IMPORTED and table.manifest() is None:
        raise ArtifactError(
            f"{table.uri}: no source of the corpus brings hard negatives with scores (format unime_json, or columns "
            "negatives, negative_scores and positive_score), or ingest has not run"
        )
    if start is None:
        path = resolve_model(model)
        revision = model_revision(path, section.revision)
    else:
        path, model, revision = start.child("model"), start.key, start.require().fingerprint
    learning = section.model_dump(mode="json", exclude=set(NOT_LEARNING)) | {"model": model, "judge": judge}

    def build() -> StageResult:
        examples_uri = _checked_rows(table, section, num_negatives)
        job = TrainingJob(
            section=section.model_dump(mode="json"),
            model=path,
            revision=section.revision if start is None else None,
            pixels=pixels,
            examples_uri=examples_uri,
            images_uri=run.artifact("images").data_uri,
            items_uri=run.artifact("items").data_uri,
            artifact_uri=artifact.uri,
            identity={"model": revision, "config": json.dumps(learning, sort_keys=True), "data": examples_uri},
        )
        counts = fit(job, section, worker, artifact, f"train {kind} {name}")
        remove(artifact.child(CHECKPOINTS))
        return StageResult(rows=counts["training_rows"], counts=counts, model=model, revision=revision)

    return run_stage(
        artifact,
        stage=f"train_{kind}",
        code_version=CODE_VERSION,
        config=learning | {"pixels": pixels.model_dump()},
        inputs=[table],
        extra_inputs={"model": revision},
        build=build,
    )


def _checked_rows(table: Artifact, section: TrainConfig, num_negatives: int) -> str:
    """Prepare the training rows and refuse what cannot be trained on, before any worker starts."""
    check_trackers(section.tracker)
    uri = prepare_texts(table) if table.table == "teacher" else prepare_examples(table)
    examples = open_rows(uri)
    if isinstance(examples, Examples):
        examples.require_negatives(num_negatives)
    BatchOrder(len(examples), section.batch_queries, section.seed).rank_rows(0, 0, section.most_workers)
    return uri


def fit(
    job: TrainingJob,
    section: TrainConfig,
    worker: Callable[[dict[str, Any]], dict[str, Any]],
    artifact: Artifact,
    title: str,
) -> dict[str, Any]:
    """Run the workers to the end and return rank 0's counts. Ctrl-C ends the wait at once; Ray ends the workers.

    Raises:
        UnimeError: what a worker raised on purpose, as it was. TrainingError: workers failed too often.
    """
    # How often the controller looks at its workers: also how soon it sees that they are done.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    trainer = _trainer(job, section, worker, artifact)
    outcome: dict[str, Any] = {}

    def run_trainer() -> None:
        try:
            outcome["result"] = trainer.fit()
        except (TrainingFailedError, ray.exceptions.RayError) as error:
            outcome["error"] = error

    # Not in the main thread: there Ray Train would install a SIGINT handler, and leave it behind.
    thread = threading.Thread(target=run_trainer, name="ray-train", daemon=True)
    thread.start()
    with _Progress(join(job.artifact_uri, LOG), section.steps, title) as progress:
        while thread.is_alive():
            thread.join(timeout=0.5)
            progress.update()
    if "error" in outcome:
        raise _own_error(outcome["error"]) from outcome["error"]
    if "result" not in outcome:
        raise TrainingError(f"{title}: Ray Train ended without a result; see its log above")
    return dict(outcome["result"].return_value)


class _Trainer(TorchTrainer):
    """Ray's trainer, less an actor that asks the dashboard each second whether the controller lives, where there is
    no dashboard to ask (it would fill the terminal with warnings). A local cluster ends with its driver anyway."""

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]
        return [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]


def _trainer(
    job: TrainingJob, section: TrainConfig, worker: Callable[[dict[str, Any]], dict[str, Any]], artifact: Artifact
) -> TorchTrainer:
    fs, path = filesystem(artifact.uri)
    _drop_unusable_snapshot(artifact)
    alone = not ray._private.worker.get_dashboard_url()
    check_room(section, ray.cluster_resources(), can_grow=not alone)
    if alone:
        # Nobody reclaims the nodes of a local cluster; spare it the process that watches for that.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    scaling: Any = {
        "num_workers": section.num_workers,
        "use_gpu": section.use_gpu,
        "resources_per_worker": {"CPU": section.cpus_per_worker} | ({"GPU": 1.0} if section.use_gpu else {}),
        "elastic_resize_monitor_interval_s": section.resize_check_seconds,
    }
    trainer: Any = _Trainer if alone else TorchTrainer  # Any: type checkers see the classes of Train V1
    options: Any = {
        "storage_path": path,
        "storage_filesystem": fs,
        "callbacks": [StopOnOwnErrors()],
        "logging_config": LoggingConfig(log_level="ERROR"),
    }
    return trainer(
        worker,
        train_loop_config=job.model_dump(mode="json"),
        scaling_config=ScalingConfig(**scaling),
        run_config=RayRunConfig(
            name=CHECKPOINTS,
            failure_config=FailureConfig(max_failures=section.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            **options,
        ),
    )


def check_room(section: TrainConfig, cluster: Mapping[str, float], can_grow: bool) -> None:
    """Ray Train waits without end for workers that have no room. On a cluster that cannot grow that is an error, on
    another one a warning.

    Args:
        cluster: all its resources, `CPU` and `GPU` among them, whether they are free or not.

    Raises:
        ConfigError: the fewest workers asked for do not fit.
    """
    least = section.least_workers
    needed = {"CPU": least * section.cpus_per_worker} | ({"GPU": float(least)} if section.use_gpu else {})
    for name, amount in needed.items():
        if amount > cluster.get(name, 0.0):
            found = f"{least} training workers need {amount:g} {name}s, the cluster has {cluster.get(name, 0.0):g}"
            if not can_grow:
                raise ConfigError(f"{found}; lower num_workers or cpus_per_worker, or set use_gpu: false")
            log.warning("%s: waiting until it grows", found)


def _drop_unusable_snapshot(artifact: Artifact) -> None:
    """Ray Train writes its list of checkpoints in place: a kill in that moment, or another Ray version, leaves one it
    cannot read, and a run folder that was copied in part one whose checkpoints are not there. Training then starts
    over, which costs time but not correctness."""
    folder = artifact.child(CHECKPOINTS)
    text = read_text(join(folder, SNAPSHOT))
    if text is not None and not _is_usable(text, folder):
        remove(folder)


def _is_usable(snapshot: str, folder: str) -> bool:
    try:
        found = json.loads(snapshot)
    except json.JSONDecodeError:
        return False
    if found.get("ray_version") != ray.__version__:
        return False
    fs, path = filesystem(folder)
    names = [result["checkpoint_dir_name"] for result in found["checkpoint_results"]]
    infos = fs.get_file_info([f"{path}/{name}" for name in names])
    return all(info.type == pafs.FileType.Directory for info in infos)


def _own_error(error: Exception) -> UnimeError:
    """The error a user should see for one of Ray Train's."""
    causes: list[Any] = [error]
    if isinstance(error, ControllerError):
        causes.append(error.controller_failure)
    for cause in list(causes):
        if isinstance(cause, WorkerGroupError):
            causes += [cause.worker_failures[rank] for rank in sorted(cause.worker_failures)]
        if isinstance(cause, ControllerError):
            causes.append(cause.controller_failure)
    for cause in causes:
        if isinstance(cause, UnimeError):
            return cause
    last = causes[-1]
    text = str(last).strip().splitlines()
    return TrainingError(f"training workers failed for good: {type(last).__name__}: {text[-1] if text else ''}")


def progress_numbers(recent: list[dict[str, Any]]) -> str:
    """What the progress line says of the last few lines of the log."""
    last = recent[-1]
    queries, tokens = (
        sum(line[name] for line in recent) / len(recent) for name in ("queries_per_second", "tokens_per_second")
    )
    memory = last.get("memory_mb", 0) / 1024
    return f"loss {last['loss']:.4f}  {queries:.1f} queries/s  {tokens:.0f} tokens/s  {memory:.1f} GB"


class _Progress:
    """A progress line with loss, queries/s and time left, read from the log that rank 0 writes."""

    def __init__(self, log_uri: str, steps: int, title: str) -> None:
        self._uri = log_uri
        self._interval = 5.0 if "://" in log_uri else 0.5
        self._next = 0.0
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps")]
        columns += [TextColumn("{task.fields[numbers]}"), TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn()]
        self._bar = Progress(*columns, console=Console(stderr=True), refresh_per_second=2)
        self._task = self._bar.add_task(title, total=steps, numbers="starting workers")

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.update(force=True)
        self._bar.stop()

    def update(self, force: bool = False) -> None:
        if not force and time.monotonic() < self._next:
            return
        self._next = time.monotonic() + self._interval
        recent = read_log(self._uri)[-10:]
        if recent:
            numbers = progress_numbers(recent)
            self._bar.update(self._task, completed=recent[-1]["step"], numbers=numbers)
