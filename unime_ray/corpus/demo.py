"""The shipped demo corpus, unpacked as a user's own corpus would lie: pictures, JSONL files and a truth table.

Emoji pictures by ten artists with their CLDR names; `demo_rows.py` says which rows there are and why. Nothing after
this module knows that the corpus is a demo.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import pyarrow.parquet as pq

import unime_ray
from unime_ray.corpus.demo_rows import (
    ADAPTATION_ARTIST,
    PRETRAINING_ARTISTS,
    TESTS,
    UNSEEN_ARTIST,
    evaluation_set,
    load_corpus,
    mining_pool,
    picture_path,
    training_pairs,
    truth_items,
    truth_table,
)
from unime_ray.errors import CorpusError

__all__ = ["ADAPTATION_ARTIST", "DEMO_DATA", "PRETRAINING_ARTISTS", "UNSEEN_ARTIST", "content_hash", "materialize_demo"]

DEMO_DATA = Path(unime_ray.__file__).parent / "data" / "demo"

LAYOUT_VERSION = 3
MARKER = "demo_corpus.json"


def materialize_demo(root: str | Path, *, num_queries: int | None = None, seed: int = 0) -> Path:
    """Unpack the demo corpus into the folder `root` and return it.

    It writes `images/<artist>/<hexcode>.webp`, `train.jsonl` (query and positive), `pool.jsonl` (what is mined),
    `{dev,test}_{queries,concepts,compositions,artist}.jsonl`, each with its `..._pool.jsonl`, and `truth.parquet` with
    `truth_items.parquet`. A folder that already holds the same content is left alone; otherwise the whole folder is
    built beside `root` and renamed, so that `root` is never half done.

    Args:
        num_queries: training pairs, half of them text to image (None: two for each of the artist's train concepts that
            no test keeps for itself).
        seed: draws those pairs. Tests and pools do not depend on it.

    Raises:
        CorpusError: `root` holds something else, or `num_queries` is not between 2 and what there is.
    """
    root = Path(root).absolute()
    content = content_hash(num_queries, seed)
    if _holds(root, content):
        return root
    if root.exists() and not (root / MARKER).is_file() and (not root.is_dir() or any(root.iterdir())):
        raise CorpusError(f"{root}: is not empty and not a demo corpus; give another folder or empty it")
    root.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        _write_corpus(building, content, num_queries, seed)
        _put_in_place(building, root, content)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return root


def content_hash(num_queries: int | None, seed: int) -> str:
    """Changes with the shipped tables, the layout and the arguments."""
    hasher = hashlib.sha256(f"{LAYOUT_VERSION} {num_queries} {seed}".encode())
    for name in ("concepts.parquet", "pictures.parquet"):
        hasher.update((DEMO_DATA / name).read_bytes())
    return hasher.hexdigest()


def _holds(root: Path, content: str) -> bool:
    try:
        return json.loads((root / MARKER).read_text())["content"] == content
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _put_in_place(building: Path, root: Path, content: str) -> None:
    """Rename the finished folder to `root`; of two processes that build the same, the second keeps the first's."""
    building.chmod(0o755)  # mkdtemp gives 0700, but Ray workers of other users may read the corpus
    old = building.with_name(building.name + ".old")
    if _holds(root, content):
        return
    if root.exists():
        os.replace(root, old)
    try:
        os.replace(building, root)
    except OSError as error:
        if not _holds(root, content):
            raise CorpusError(f"{root}: cannot put the demo corpus there: {error}") from error
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _write_corpus(folder: Path, content: str, num_queries: int | None, seed: int) -> None:
    corpus = load_corpus(DEMO_DATA)
    files = {"train.jsonl": training_pairs(corpus, num_queries, seed), "pool.jsonl": mining_pool(corpus)}
    for split in ("dev", "test"):
        for test in TESTS:
            files[f"{split}_{test}.jsonl"], files[f"{split}_{test}_pool.jsonl"] = evaluation_set(corpus, test, split)
    for name, rows in files.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text("".join(lines), encoding="utf-8")
    keys = ("query_image", "pos_image", "image")
    used = {row[key] for rows in files.values() for row in rows for key in keys if row.get(key)}
    _write_pictures(folder, used)
    pq.write_table(truth_table(corpus), folder / "truth.parquet")
    pq.write_table(truth_items(corpus, used), folder / "truth_items.parquet")
    shutil.copyfile(DEMO_DATA / "LICENSES.md", folder / "LICENSES.md")
    counts = {name: len(rows) for name, rows in files.items()} | {"images": len(used)}
    marker = {"content": content, "num_queries": num_queries, "seed": seed, "counts": counts}
    (folder / MARKER).write_text(json.dumps(marker, indent=1) + "\n")


def _write_pictures(folder: Path, used: set[str]) -> None:
    for artist in (ADAPTATION_ARTIST, UNSEEN_ARTIST, *PRETRAINING_ARTISTS):
        (folder / "images" / artist).mkdir(parents=True)
    for batch in pq.ParquetFile(DEMO_DATA / "pictures.parquet").iter_batches(columns=["artist", "hexcode", "image"]):
        for row in batch.to_pylist():
            path = picture_path(row["artist"], row["hexcode"])
            if path in used:
                (folder / path).write_bytes(row["image"])
