"""What a model name stands for: `tiny` and `tiny-judge` come with the package, others are folders or hub ids."""

from __future__ import annotations

import hashlib
import os
from importlib import resources
from pathlib import Path

import pyarrow.fs as pafs

from unime_ray.artifacts import filesystem
from unime_ray.errors import ModelError

PACKAGED = {"tiny": "tiny", "tiny-judge": "tiny_judge"}
"""Names of the packaged checkpoints and their folders in `data/`."""
CHUNK_BYTES = 1 << 20
HASHED_SUFFIXES = (".json", ".jinja", ".safetensors", ".txt", ".model")


def resolve_model(name: str) -> str:
    """Where the checkpoint `name` is: the packaged folder of `tiny` or `tiny-judge`, an existing one, or a hub id.

    Raises:
        ModelError: `name` looks like a path and no such folder exists, or the folder holds no `config.json`.
    """
    if name in PACKAGED:
        return _checked(Path(str(resources.files("unime_ray"))) / "data" / PACKAGED[name])
    path = Path(name).expanduser()
    if path.is_dir():
        return _checked(path)
    if _looks_like_path(name):
        raise ModelError(
            f"no model folder {name}: give `tiny`, `tiny-judge`, a folder with config.json, or a hub id like owner/name"
        )
    return name


def model_revision(path: str, revision: str | None = None) -> str:
    """What exactly was run: 32 hex digits of the content hash of a folder's files, or a hub checkpoint's commit.

    `path` is what `resolve_model` gave, or the address of a folder in a bucket, which is read through. Copying a folder
    or touching its files does not change its revision.

    Raises:
        ModelError: a hub checkpoint cannot be reached to resolve its commit.
    """
    if "://" in path or Path(path).is_dir():
        return _folder_hash(path)
    from transformers import AutoConfig

    try:
        commit = getattr(AutoConfig.from_pretrained(path, revision=revision), "_commit_hash", None)
    except (OSError, ValueError) as error:
        raise ModelError(f"model {path}: not a local folder and not found on the hub ({_first_line(error)})") from error
    return str(commit or revision or "main")


def _checked(folder: Path) -> str:
    if not (folder / "config.json").is_file():
        raise ModelError(f"model folder {folder} has no config.json: it is no saved checkpoint")
    return str(folder)


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "~", os.sep)) or name.count("/") != 1 or "\\" in name


def _folder_hash(folder: str) -> str:
    hasher = hashlib.blake2b(digest_size=16, person=b"unime.model")
    fs, path = filesystem(folder)
    for info in sorted(fs.get_file_info(pafs.FileSelector(path)), key=lambda info: info.base_name):
        if info.type != pafs.FileType.File or Path(info.base_name).suffix not in HASHED_SUFFIXES:
            continue
        hasher.update(f"{info.base_name}\x00{info.size}\x00".encode())
        with fs.open_input_file(info.path) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                hasher.update(chunk)
    return hasher.hexdigest()


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
