"""What of a run may be retrieved, and its vectors under the served embedder.

Vectors come from the run's own `embeddings` where the same revision made them; the rest is embedded once by the serving
encoder and kept in RUN/serve/vectors/<revision>.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from unime_ray.artifacts import Run, filesystem
from unime_ray.corpus.lance_io import open_lance
from unime_ray.ids import show
from unime_ray.schemas import embeddings_schema
from unime_ray.serve.catalog import WHOLE, Ref, Rows, Shard


def pool_rows(run: Run, shard: Shard = WHOLE) -> Rows:
    """Every item of the run's pools that `shard` holds, once, with the groups (dataset, split) it is in."""
    pools = run.artifact("pools").read()
    members: dict[bytes, list[tuple[str, str]]] = {}
    for row in pools.to_pylist():
        members.setdefault(row["item_id"], []).append((row["dataset"], row["split"]))
    images = _image_ids(run)
    rows = Rows()
    for identifier in sorted(each for each in members if shard.holds(show(each))):
        dataset, split = members[identifier][0]
        for group in dict.fromkeys(members[identifier]):
            rows.groups.setdefault(group, []).append(len(rows.refs))
        rows.refs.append(Ref(show(identifier), identifier, images.get(identifier), None, dataset, split))
    return rows


def known_vectors(run: Run, revision: str, shard: Shard = WHOLE) -> dict[bytes, np.ndarray]:
    """float32 vectors that `revision` made of what `shard` holds, by item id."""
    uris = [artifact.data_uri for artifact in run.artifacts() if artifact.table == "embeddings"]
    manifests = [artifact.require() for artifact in run.artifacts() if artifact.table == "embeddings"]
    sources = [uri for uri, manifest in zip(uris, manifests, strict=True) if manifest.revision == revision]
    found: dict[bytes, np.ndarray] = {}
    for uri in [*sources, _folder(run, revision)]:
        fs, path = filesystem(uri)
        if fs.get_file_info(path).type != pafs.FileType.Directory:
            continue
        # Named one by one: a part being written beside them (`*.tmp`) is no Parquet file yet.
        listing = fs.get_file_info(pafs.FileSelector(path, recursive=True))
        files = [info.path for info in listing if info.path.endswith(".parquet")]
        for batch in pads.dataset(files, filesystem=fs, format="parquet").to_batches() if files else []:
            column = batch.column("embedding")
            flat = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
            vectors = flat.reshape(batch.num_rows, -1)
            pairs = zip(batch.column("item_id").to_pylist(), vectors, strict=True)
            found |= {identifier: vector for identifier, vector in pairs if shard.holds(show(identifier))}
    return found


def save_vectors(run: Run, revision: str, ids: Sequence[bytes], vectors_ND: np.ndarray) -> None:
    """Keep vectors for the next start; the part is named by its first id, so that writing it again replaces it."""
    fs, path = filesystem(_folder(run, revision))
    fs.create_dir(path, recursive=True)
    schema = embeddings_schema(vectors_ND.shape[1])
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors_ND.ravel(), pa.float32()), vectors_ND.shape[1])
    table = pa.table([pa.array(ids, pa.binary(16)), column], schema=schema)
    target = f"{path}/{show(ids[0])}.parquet"
    pq.write_table(table, f"{target}.tmp", filesystem=fs)
    fs.move(f"{target}.tmp", target)


def _folder(run: Run, revision: str) -> str:
    return run.child("serve", "vectors", revision)


def _image_ids(run: Run) -> dict[bytes, bytes | None]:
    table = open_lance(run.artifact("items").data_uri).to_table(columns=["item_id", "image_id"])
    return dict(zip(table.column(0).to_pylist(), table.column(1).to_pylist(), strict=True))
