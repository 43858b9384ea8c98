"""TensorBoard and Weights & Biases beside `log.jsonl`, by name (`tracker: [tensorboard, wandb]`), from rank 0 alone.

Files go to `trackers/` of the model's folder. Object stores cannot append, so there they are written on this machine
and copied at every checkpoint and at the end. A resumed run goes on in the same place, from its checkpoint's step.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker

from unime_ray.artifacts import filesystem, join
from unime_ray.config import TrainConfig
from unime_ray.train.job import check_trackers

FOLDER = "trackers"
UNTRACKED = ("step", "epoch")


class Trackers:
    """Whoever is told the figures of a step. A context manager, so that a failed run's files are complete too.

    Args:
        artifact_uri: the model's folder. start: steps that are done; figures of later ones are taken back.
    """

    def __init__(self, artifact_uri: str, config: TrainConfig, start: int) -> None:
        check_trackers(config.tracker)
        fs, path = filesystem(join(artifact_uri, FOLDER))
        self._target = (fs, path)
        self._local = isinstance(fs, pafs.LocalFileSystem)
        self.folder = Path(path if self._local else tempfile.mkdtemp(prefix="unime-ray-trackers-"))
        self._trackers = [_start(name, self.folder, artifact_uri, config, start) for name in config.tracker]

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        for tracker in self._trackers:
            tracker.finish()
            if isinstance(tracker, WandBTracker):
                _wait_for_wandb()
        self.sync()
        if not self._local:
            shutil.rmtree(self.folder)

    def log(self, line: dict[str, Any]) -> None:
        """The figures of one line of `log.jsonl`, under its step."""
        figures = {f"train/{name}": value for name, value in line.items() if name not in UNTRACKED}
        for tracker in self._trackers:
            tracker.log(figures, step=line["step"])

    def sync(self) -> None:
        """Copy what there is to the run's storage, if that is not this machine's disk."""
        if self._trackers and not self._local:
            fs, path = self._target
            fs.create_dir(path, recursive=True)
            pafs.copy_files(str(self.folder), path, source_filesystem=pafs.LocalFileSystem(), destination_filesystem=fs)


def _wait_for_wandb() -> None:
    """Its service writes the run's file, and is not done when `finish` returns: what was copied then would be empty."""
    import wandb

    wandb.teardown()


def _start(name: str, folder: Path, artifact_uri: str, config: TrainConfig, start: int) -> GeneralTracker:
    folder.mkdir(parents=True, exist_ok=True)
    settings = config.model_dump(mode="json")
    if name == "tensorboard":
        board = TensorBoardTracker("tensorboard", folder, purge_step=start + 1, flush_secs=30)
        board.start()
        board.writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in settings.items()))
        return board
    # A resumed run is the same run there: its id follows from where it is kept. Offline there is nobody to ask.
    identity = hashlib.blake2b(artifact_uri.encode(), digest_size=6).hexdigest()
    online: dict[str, Any] = {"id": identity, "resume": "allow"} if config.wandb_mode == "online" else {}
    wandb = WandBTracker(
        config.wandb_project,
        name="/".join(artifact_uri.rstrip("/").split("/")[-3:]),
        dir=str(folder),
        mode=config.wandb_mode,
        config=settings,
        **online,
    )
    wandb.start()
    return wandb
