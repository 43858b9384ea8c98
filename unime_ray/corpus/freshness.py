"""Whether the corpus is still what the last ingest read: kept in `RUN/.ingest`, beside no artifact.

Noticed: any change of the corpus' config, of a source file's content (sampled above 256 MB, see `file_signature`), of
the set of files a folder or glob gives, and of size or time of a local picture file that was looked at, missing ones
included. Not noticed: a picture behind a URI that changes while its name and the files that name it do not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from unime_ray.artifacts import Manifest, Run, filesystem, join, read_text, write_text
from unime_ray.config import CorpusConfig
from unime_ray.corpus.files import file_signature, picture_stamp, source_files
from unime_ray.schemas import SCHEMA_VERSION

STATE, PATHS = "state.json", "paths.parquet"


def signature(corpus: CorpusConfig, code_version: int) -> str:
    """24 hex digits that change with the config or with the content of a source file.

    Raises:
        CorpusError: a source is missing or unreadable.
    """
    config = corpus.model_dump(mode="json", exclude={"max_error_rate", "rows_per_task"})
    files = [(file, file_signature(file)) for source in corpus.sources for file in source_files(source)]
    text = json.dumps([code_version, SCHEMA_VERSION, config, files])
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def unchanged(run: Run, folder: str, mark: str) -> bool:
    """Whether the last ingest finished under the signature `mark`, its tables are there and no picture has changed."""
    text = read_text(join(folder, STATE))
    if text is None:
        return False
    state = json.loads(text)
    if state["signature"] != mark:
        return False
    for key, fingerprint in state["fingerprints"].items():
        manifest = run.artifact(*key.split("/")).manifest()
        if manifest is None or manifest.fingerprint != fingerprint:
            return False
    return _same_pictures(join(folder, PATHS))


def remember(folder: str, mark: str, manifests: Mapping[str, Manifest], paths: pa.Table) -> None:
    """Note what was read, once every table is written."""
    fs, path = filesystem(join(folder, PATHS))
    pq.write_table(paths, path, filesystem=fs)
    fingerprints = {key: manifest.fingerprint for key, manifest in manifests.items()}
    write_text(join(folder, STATE), json.dumps({"signature": mark, "fingerprints": fingerprints}, indent=2))


def _same_pictures(uri: str) -> bool:
    fs, path = filesystem(uri)
    if fs.get_file_info(path).type != pafs.FileType.File:
        return False
    columns = [column.to_pylist() for column in pq.read_table(path, filesystem=fs).columns]
    return all(picture_stamp(picture) == (size, mtime) for picture, size, mtime in zip(*columns, strict=True))
