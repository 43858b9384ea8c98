"""A checkpoint's folder as a local path: libraries that load models read no buckets."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.fs as pafs

from unime_ray.artifacts import filesystem


@contextmanager
def local_copy(uri: str, weights: bool = False) -> Iterator[str]:
    """The path of a local folder; a remote one's files are copied to a temporary folder that goes at the end.

    Args:
        weights: copy `.safetensors` files too; without them only the small files come.
    """
    fs, path = filesystem(uri)
    if isinstance(fs, pafs.LocalFileSystem):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="unime-ray-model-") as folder:
        for info in fs.get_file_info(pafs.FileSelector(path)):
            if info.type == pafs.FileType.File and (weights or not info.base_name.endswith(".safetensors")):
                target = str(Path(folder) / info.base_name)
                pafs.copy_files(info.path, target, source_filesystem=fs, destination_filesystem=pafs.LocalFileSystem())
        yield folder
