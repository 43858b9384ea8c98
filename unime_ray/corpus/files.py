"""Finding, opening and recognising the files of a corpus, on a local disk or behind any URI that pyarrow knows."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import json
import os
import stat
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.fs as pafs

from unime_ray.artifacts import filesystem, join
from unime_ray.config import CorpusConfig, Source
from unime_ray.errors import CorpusError, RejectedRow

SUFFIXES = {
    "parquet": (".parquet", ".pq"),
    "jsonl": (".jsonl", ".ndjson"),
    "csv": (".csv", ".tsv"),
    "unime_json": (".json",),
    "webdataset": (".tar",),
    "mmeb_train": (".parquet", ".pq", ".jsonl", ".ndjson"),
    "mmeb_eval": (".parquet", ".pq", ".jsonl", ".ndjson"),
    "hf_dataset": (".arrow",),
    "coco": (".json",),
    "flickr30k": (".json", ".token", ".csv"),
}
COMPRESSED = (".gz", ".bz2", ".zst", ".xz", ".zip", ".tar", ".tgz")
WHOLE_HASH_BYTES = 256 * 2**20
SAMPLE_BYTES, NUM_SAMPLES = 2**20, 64


def is_remote(path: str) -> bool:
    """Whether `path` is a URI of something other than the local disk."""
    return "://" in path and not path.startswith("file://")


def absolute_sources(corpus: CorpusConfig) -> CorpusConfig:
    """The corpus with local paths made absolute, since workers have other working directories."""

    def fixed(path: str | None) -> str | None:
        return path if path is None or is_remote(path) else os.path.abspath(os.path.expanduser(path))

    sources = (s.model_copy(update={"path": fixed(s.path), "image_root": fixed(s.image_root)}) for s in corpus.sources)
    return corpus.model_copy(update={"sources": tuple(sources)})


def corpus_root(corpus: CorpusConfig) -> str | None:
    """The folder that all local sources of a corpus with absolute paths lie under; None without any."""
    local = [_fixed_part(source.path) for source in corpus.sources if not is_remote(source.path)]
    return os.path.commonpath(local) if local else None


def _fixed_part(path: str) -> str:
    """The folder of a file, or the path up to its first wildcard."""
    path = path.removeprefix("file://")
    if "*" in path:
        return os.path.dirname(path[: path.index("*")])
    return path if os.path.isdir(path) else os.path.dirname(path)


def shown_name(file: str, root: str | None) -> str:
    """How `items` and `rejects` name a source file: under the corpus' root, or by its URI as it was given."""
    if root is None or is_remote(file):
        return file
    return os.path.relpath(file.removeprefix("file://"), root)


def source_files(source: Source) -> list[str]:
    """The files of a source, sorted: the one named, those a glob matches, or all of its format under a folder.

    Raises:
        CorpusError: there are none, or one is compressed.
    """
    found = _expand(source)
    if not found:
        suffixes = ", ".join(SUFFIXES[source.format])
        raise CorpusError(f"{source.path}: no files ({suffixes}) there; check corpus.sources.path")
    for file in found:
        try:
            file.encode()
        except UnicodeEncodeError as error:
            raise CorpusError(f"{file!r}: the file's name is not valid UTF-8; rename it") from error
        name = file.partition("?")[0].lower()
        if name.endswith(COMPRESSED) and not name.endswith(SUFFIXES[source.format]):
            raise CorpusError(f"{file}: compressed files cannot be read in parts; unpack it first")
    return found


def _expand(source: Source) -> list[str]:
    if "*" in source.path:
        return _match(source.path)
    fs, path = filesystem(source.path)
    kind = fs.get_file_info(path).type
    if kind == pafs.FileType.File:
        return [source.path]
    if kind == pafs.FileType.NotFound:
        raise CorpusError(f"{source.path}: no such file or folder; check corpus.sources.path")
    selector = pafs.FileSelector(path, recursive=True)
    inside = [info.path for info in fs.get_file_info(selector) if info.type == pafs.FileType.File]
    relative = [found[len(path) :].strip("/") for found in inside if found.lower().endswith(SUFFIXES[source.format])]
    visible = [name for name in relative if not any(part.startswith((".", "_")) for part in name.split("/"))]
    return sorted(join(source.path, name) for name in visible)


def _match(pattern: str) -> list[str]:
    if not is_remote(pattern):
        return sorted(
            path for path in glob.glob(pattern.removeprefix("file://"), recursive=True) if os.path.isfile(path)
        )
    base, mark, query = pattern.partition("?")
    folder = base[: base.index("*")].rpartition("/")[0]
    fs, root = filesystem(folder + mark + query)
    inside = fs.get_file_info(pafs.FileSelector(root, recursive=True, allow_not_found=True))
    names = [join(folder, info.path[len(root) :].strip("/")) for info in inside if info.type == pafs.FileType.File]
    return sorted(name + mark + query for name in names if fnmatch.fnmatchcase(name, base))


def stem(file: str) -> str:
    """The file's name without folder and suffix: the default name of its dataset."""
    return Path(file.partition("?")[0]).stem


def folder_of(file: str) -> str:
    """The folder a file lies in, as a path or URI."""
    base, mark, query = file.partition("?") if is_remote(file) else (file, "", "")
    return (base.rpartition("/")[0] or ("/" if base.startswith("/") else ".")) + mark + query


def open_file(file: str) -> pa.NativeFile:
    """Open for reading anywhere in it.

    Raises:
        CorpusError: it is not there or cannot be read.
    """
    fs, path = filesystem(file)
    try:
        return fs.open_input_file(path)
    except OSError as error:
        raise CorpusError(f"{file}: cannot be read: {' '.join(str(error).split())}") from error


def check_unicode(text: str, what: str) -> None:
    """Raise RejectedRow if `text`, which `what` names, holds half a surrogate pair (JSON can write one)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RejectedRow(f"{what} holds half a surrogate pair at character {error.start}") from error


def resolve_picture(value: str, root: str) -> str:
    """The path or URI of a picture that a row names, relative names starting at `root`.

    Which store is asked, and where it is (a URI's query, such as `?endpoint_override=...`), is the config's to say and
    no row's: a URI takes over the query of a `root` of its kind.

    Raises:
        RejectedRow: a web address (pictures are never fetched from the web), a URI with a query of its own, or a name
            that is no Unicode.
    """
    check_unicode(value, "picture's name")
    if value.lower().startswith(("http://", "https://", "data:")):
        raise RejectedRow(f"picture is a web address ({value[:80]}); download it and give its path")
    if not is_remote(value):
        if value.startswith(("/", "file://")):
            return value.removeprefix("file://")
        # A name is a name: in a URI, `?` and `%` would be read as more.
        return join(root, quote(value.removeprefix("./")) if is_remote(root) else value.removeprefix("./"))
    base, mark, query = value.partition("?")
    same_kind = is_remote(root) and root.partition("://")[0] == base.partition("://")[0]
    allowed = root.partition("?")[2] if same_kind else ""
    if mark and query != allowed:
        raise RejectedRow(f"picture's address has settings of its own ({value[:80]}); set them in `image_root`")
    return f"{base}?{allowed}" if allowed else base


def read_picture(path: str, max_bytes: int) -> bytes:
    """A picture's bytes.

    Raises:
        RejectedRow: there is no such file, it is none, it is larger than `max_bytes`, or it cannot be read.
    """
    try:
        if is_remote(path):
            return _read_remote(path, max_bytes)
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever, a device may never end
            raise RejectedRow(f"picture is no file: {path}")
        _check_size(found.st_size, path, max_bytes)
        with open(path, "rb") as stream:
            data = stream.read(max_bytes + 1)  # sizes are not always told: /proc says 0
        _check_size(len(data), path, max_bytes)
        return data
    except FileNotFoundError as error:
        raise RejectedRow(f"picture not found: {path}") from error
    except (OSError, ValueError, pa.ArrowException) as error:
        raise RejectedRow(f"picture cannot be read: {path} ({' '.join(str(error).split())})") from error


def _read_remote(path: str, max_bytes: int) -> bytes:
    fs, inside = filesystem(path)
    with fs.open_input_file(inside) as stream:
        _check_size(stream.size(), path, max_bytes)
        return stream.read()


def _check_size(size: int, path: str, max_bytes: int) -> None:
    if size > max_bytes:
        raise RejectedRow(f"picture has {size} bytes; corpus.image.max_source_bytes is {max_bytes}: {path}")


def picture_stamp(path: str) -> tuple[int, int]:
    """(bytes, modification time in ns) of a local picture, (-1, -1) if there is none: changes when the file does."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return -1, -1
    return found.st_size, found.st_mtime_ns


def file_signature(file: str) -> str:
    """24 hex digits that change with a source file's content.

    Up to 256 MB every byte is hashed. Of a larger file: its size, its modification time and 64 samples of 1 MB spread
    over it, so that a corpus of terabytes does not have to be read to learn that nothing changed.
    """
    fs, path = filesystem(file)
    info = fs.get_file_info(path)
    hasher = hashlib.blake2b(digest_size=12)
    with open_file(file) as stream:
        size = stream.size()
        if size <= WHOLE_HASH_BYTES:
            while chunk := stream.read(2**22):
                hasher.update(chunk)
        else:
            hasher.update(json.dumps([size, str(info.mtime_ns)]).encode())
            for sample in range(NUM_SAMPLES):
                stream.seek((size - SAMPLE_BYTES) * sample // (NUM_SAMPLES - 1))
                hasher.update(stream.read(SAMPLE_BYTES))
    return hasher.hexdigest()
