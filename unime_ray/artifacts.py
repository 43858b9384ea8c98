"""A run is a folder, local or `s3://`; each stage leaves artifacts in it.

    RUN/config.yaml
    RUN/<table>[/<name>]/data/*.parquet     (images, items: data.lance)
    RUN/<table>[/<name>]/manifest.json      written last: an artifact without one is not there
    RUN/<table>[/<name>]/started.json       fingerprint of the work under way, so that a killed stage goes on

A stage's *fingerprint* hashes its own config, its code version and its inputs' fingerprints. A stage whose
fingerprint is already there is skipped; one that was interrupted under the same fingerprint keeps what it wrote;
under another fingerprint the folder is cleared first.
"""

from __future__ import annotations

import atexit
import datetime
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from unime_ray.errors import ArtifactError
from unime_ray.schemas import SCHEMA_VERSION, conform

LANCE_TABLES = ("images", "items")
MANIFEST, STARTED = "manifest.json", "started.json"


class Manifest(BaseModel):
    """What made an artifact and what it holds. `seconds` is wall time of the stage, `rows` counts its table."""

    model_config = ConfigDict(extra="allow")

    table: str
    name: str | None = None
    stage: str
    fingerprint: str
    schema_version: int = SCHEMA_VERSION
    rows: int = 0
    seconds: float = 0.0
    rows_per_second: float = 0.0
    config: dict[str, Any] = {}
    inputs: dict[str, str] = {}
    counts: dict[str, Any] = {}
    model: str | None = None
    revision: str | None = None
    prompt_hash: str | None = None
    git_commit: str | None = None
    created_at: str = ""


@dataclass
class StageResult:
    """What a stage's build function hands back for the manifest."""

    rows: int
    counts: dict[str, Any] = field(default_factory=dict)
    model: str | None = None
    revision: str | None = None
    prompt_hash: str | None = None
    resumed_rows: int = 0
    """Rows that an interrupted attempt had already written; the rate counts only the others."""


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The pyarrow filesystem of `uri` (local path or `s3://...`) and the path inside it."""
    if "://" in uri:
        return pafs.FileSystem.from_uri(uri)
    return pafs.LocalFileSystem(), os.path.abspath(uri)


def join(root: str, *parts: str) -> str:
    """Join under a local path or a URI. A URI's query (`?endpoint_override=...`) stays at the end."""
    base, mark, query = root.partition("?") if "://" in root else (root, "", "")
    return "/".join([base.rstrip("/"), *parts]) + mark + query


@dataclass(frozen=True)
class Artifact:
    """One artifact of a run: where it lies, whether it is there, and reading it."""

    root: str
    table: str
    name: str | None = None

    @property
    def key(self) -> str:
        """`table` or `table/name`: how manifests and messages name the artifact."""
        return self.table if self.name is None else f"{self.table}/{self.name}"

    @property
    def uri(self) -> str:
        return join(self.root, *self.key.split("/"))

    @property
    def data_uri(self) -> str:
        """The Parquet folder, or the Lance dataset for `images` and `items`."""
        return join(self.uri, "data.lance" if self.table in LANCE_TABLES else "data")

    def child(self, *parts: str) -> str:
        """A path inside the artifact's folder."""
        return join(self.uri, *parts)

    def manifest(self) -> Manifest | None:
        """The manifest, or None if the artifact is not there (or not finished)."""
        text = read_text(self.child(MANIFEST))
        return None if text is None else Manifest.model_validate_json(text)

    def require(self) -> Manifest:
        """The manifest.

        Raises:
            ArtifactError: the artifact is not there; the message names the stage to run.
        """
        found = self.manifest()
        if found is None:
            raise ArtifactError(
                f"{self.uri}: artifact {self.key!r} is missing or unfinished; run the stage that makes it"
            )
        return found

    def begin(self, fingerprint: str, before_clearing: Callable[[], None] | None = None) -> None:
        """Make ready to write under `fingerprint`; clears what another fingerprint left, after `before_clearing`."""
        started = read_text(self.child(STARTED))
        same = started is not None and json.loads(started).get("fingerprint") == fingerprint
        if not same:
            if before_clearing is not None:
                before_clearing()
            remove(self.uri)
        else:
            remove(self.child(MANIFEST))
        write_text(self.child(STARTED), json.dumps({"fingerprint": fingerprint}))

    def finish(self, manifest: Manifest) -> None:
        """Write the manifest: from here on the artifact is there."""
        write_text(self.child(MANIFEST), manifest.model_dump_json(indent=2) + "\n")

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The whole Parquet table in memory. For large tables stream with Ray Data from `data_uri`."""
        self.require()
        fs, path = filesystem(self.data_uri)
        return pads.dataset(path, filesystem=fs, format="parquet").to_table(columns=list(columns) if columns else None)

    def write(self, table: pa.Table, schema: pa.Schema, part: str = "part-0") -> None:
        """Write one Parquet file of the artifact, conformed to `schema`; replaces the part of that name."""
        fs, path = filesystem(self.data_uri)
        fs.create_dir(path, recursive=True)
        pq.write_table(conform(table, schema, self.key), f"{path}/{part}.parquet", filesystem=fs)


@dataclass(frozen=True)
class Run:
    """A run folder. A local root is made absolute, since workers have other working directories."""

    root: str

    def __post_init__(self) -> None:
        if "://" not in self.root:
            object.__setattr__(self, "root", str(Path(self.root).expanduser().resolve()))

    def artifact(self, table: str, name: str | None = None) -> Artifact:
        return Artifact(self.root, table, name)

    def child(self, *parts: str) -> str:
        return join(self.root, *parts)

    def check_writable(self) -> None:
        """Raise ArtifactError unless a file can be written into the run folder (creating it)."""
        probe = self.child(".write-probe")
        try:
            write_text(probe, "ok")
            remove(probe)
        except OSError as error:
            raise ArtifactError(
                f"run folder {self.root!r} cannot be written: {error}; choose another `run:`"
            ) from error

    def artifacts(self) -> list[Artifact]:
        """Every artifact of the run that has a manifest, by key."""
        fs, path = filesystem(self.root)
        if fs.get_file_info(path).type != pafs.FileType.Directory:
            return []
        infos = fs.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
        found = []
        for info in infos:
            if info.base_name == MANIFEST:
                parts = info.path[len(path) :].strip("/").split("/")[:-1]
                if 1 <= len(parts) <= 2:
                    found.append(Artifact(self.root, parts[0], parts[1] if len(parts) == 2 else None))
        return sorted(found, key=lambda artifact: artifact.key)


def fingerprint(stage: str, code_version: int, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """24 hex digits that change with the stage's config, its code version or any input's fingerprint."""
    text = json.dumps(
        [stage, code_version, SCHEMA_VERSION, config, sorted(inputs.items())], sort_keys=True, default=str
    )
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def run_stage(
    artifact: Artifact,
    *,
    stage: str,
    code_version: int,
    config: Mapping[str, Any],
    inputs: Sequence[Artifact] = (),
    extra_inputs: Mapping[str, str] | None = None,
    build: Callable[[], StageResult],
    before_clearing: Callable[[], None] | None = None,
) -> Manifest:
    """Run `build` unless `artifact` is already there under the same fingerprint; return its manifest.

    `inputs` must be finished artifacts. `extra_inputs` adds fingerprints of things that are no artifact, such as the
    corpus' content or a checkpoint's revision. `before_clearing` may save something of what another fingerprint left.

    Raises:
        ArtifactError: an input is missing.
    """
    prints = {item.key: item.require().fingerprint for item in inputs} | dict(extra_inputs or {})
    mark = fingerprint(stage, code_version, config, prints)
    done = artifact.manifest()
    if done is not None and done.fingerprint == mark:
        return done
    artifact.begin(mark, before_clearing)
    clock = time.monotonic()
    result = build()
    seconds = time.monotonic() - clock
    fresh = max(result.rows - result.resumed_rows, 0)
    manifest = Manifest(
        table=artifact.table,
        name=artifact.name,
        stage=stage,
        fingerprint=mark,
        rows=result.rows,
        seconds=round(seconds, 3),
        rows_per_second=round(fresh / seconds, 3) if seconds else 0.0,
        config=json.loads(json.dumps(dict(config), default=str)),
        inputs=prints,
        counts=result.counts,
        model=result.model,
        revision=result.revision,
        prompt_hash=result.prompt_hash,
        git_commit=git_commit(),
        created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    artifact.finish(manifest)
    return manifest


def read_text(uri: str) -> str | None:
    """The text of a small file, or None if there is none."""
    fs, path = filesystem(uri)
    if fs.get_file_info(path).type != pafs.FileType.File:
        return None
    with fs.open_input_stream(path) as stream:
        return stream.read().decode()


def write_text(uri: str, text: str) -> None:
    """Write a small file whole: on a local disk through a rename, so that no reader sees half of it."""
    fs, path = filesystem(uri)
    fs.create_dir(path.rsplit("/", 1)[0], recursive=True)
    local = isinstance(fs, pafs.LocalFileSystem)
    target = f"{path}.{os.getpid()}.tmp" if local else path
    with fs.open_output_stream(target) as stream:
        stream.write(text.encode())
    if local:
        os.replace(target, path)


def remove(uri: str) -> None:
    """Remove a file or a folder with all that is in it; nothing happens if there is none."""
    fs, path = filesystem(uri)
    kind = fs.get_file_info(path).type
    if kind == pafs.FileType.Directory:
        fs.delete_dir(path)
    elif kind == pafs.FileType.File:
        fs.delete_file(path)


def local_folder(uri: str, without: tuple[str, ...] = ()) -> str:
    """`uri` itself if it is no address (a local path, a model's name), else a folder of this machine with its files.

    What was copied stays for as long as the process. Libraries that load models read no buckets.

    Args:
        without: endings of files that are not copied, such as `.safetensors`.
    """
    if "://" not in uri:
        return uri
    fs, path = filesystem(uri)
    if isinstance(fs, pafs.LocalFileSystem):
        return path
    target = tempfile.mkdtemp(prefix="unime-ray-model-")
    atexit.register(shutil.rmtree, target, ignore_errors=True)
    for info in fs.get_file_info(pafs.FileSelector(path, recursive=True)):
        if info.type == pafs.FileType.File and not info.path.endswith(without):
            copy = Path(target) / os.path.relpath(info.path, path)
            copy.parent.mkdir(parents=True, exist_ok=True)
            pafs.copy_files(info.path, str(copy), source_filesystem=fs, destination_filesystem=pafs.LocalFileSystem())
    return target


def git_commit() -> str | None:
    """The commit the package's checkout stands at, or None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
