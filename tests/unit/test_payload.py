"""Random access by id: right rows, bounded memory, one clear line for an id that is not there."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest

from unime_ray.corpus.lance_io import commit_fragments, lance_location, open_lance, write_fragments
from unime_ray.corpus.payload import IdIndex, PayloadStore
from unime_ray.errors import ArtifactError
from unime_ray.ids import image_id, item_id
from unime_ray.schemas import ID, IMAGES, ITEMS

COUNT = 60


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(store arguments, item ids, pictures): every second of 60 items has a picture of 100 bytes."""
    folder = tmp_path_factory.mktemp("payload")
    pictures = [bytes([number]) * 100 for number in range(COUNT)]
    images = [image_id(data) if number % 2 else None for number, data in enumerate(pictures)]
    ids = [item_id(f"text {number}", image) for number, image in enumerate(images)]
    blank = [None] * COUNT
    texts = [f"text {number}" for number in range(COUNT)]
    items = pa.table([ids, texts, blank, texts, images, ["x.jsonl"] * COUNT], schema=ITEMS)
    side = [10] * COUNT
    pixels = pa.table([[image_id(data) for data in pictures], pictures, blank, side, side], schema=IMAGES)
    uris = str(folder / "images.lance"), str(folder / "items.lance")
    for uri, table, schema in zip(uris, (pixels, items), (IMAGES, ITEMS), strict=True):
        parts = [write_fragments(table.slice(at, 25).to_batches(), schema, uri) for at in range(0, COUNT, 25)]
        commit_fragments([fragment for part in parts for fragment in part], schema, uri)
    return uris, ids, pictures


def test_items_come_in_the_order_asked_and_may_repeat(written):
    uris, ids, pictures = written
    wanted = [ids[5], ids[58], ids[4], ids[5], ids[0]]
    found = PayloadStore(*uris).items(wanted)
    assert [item.item_id for item in found] == wanted
    assert [item.rendered for item in found] == ["text 5", "text 58", "text 4", "text 5", "text 0"]
    assert [item.image for item in found] == [pictures[5], None, None, pictures[5], None]
    assert PayloadStore(*uris).items([]) == []
    bare = PayloadStore("no-such-folder.lance", uris[1]).items(wanted, pictures=False)
    assert [item.image for item in bare] == [None] * 5
    assert [item.image_id for item in bare] == [item.image_id for item in found]


def test_parts_are_committed_in_order(written):
    uris, ids, _ = written
    assert open_lance(uris[1]).to_table(columns=["item_id"]).column(0).to_pylist() == ids


def test_the_cache_stays_within_its_bound(written):
    uris, ids, pictures = written
    store = PayloadStore(*uris, cache_bytes=550)
    for _ in range(2):
        assert [item.image for item in store.items(ids)] == [p if n % 2 else None for n, p in enumerate(pictures)]
        assert store._cached_bytes == 500 == sum(map(len, store._cache.values()))


def test_a_store_travels_as_its_addresses_and_serves_threads(written):
    uris, ids, pictures = written
    store = pickle.loads(pickle.dumps(PayloadStore(*uris, cache_bytes=1000)))  # noqa: S301 - our own bytes
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda one: store.items([one])[0].image, ids * 3))
    assert found == [p if n % 2 else None for n, p in enumerate(pictures)] * 3


def test_an_unknown_id_and_a_missing_dataset_are_named(written, tmp_path):
    uris, _, _ = written
    with pytest.raises(ArtifactError, match="items.lance: no row with id 0000"):
        PayloadStore(*uris).items([b"\0" * 16])
    with pytest.raises(ArtifactError, match="no readable Lance dataset; run ingest"):
        PayloadStore(uris[0], str(tmp_path / "gone.lance")).items([b"\0" * 16])


def test_the_index_tells_ids_with_equal_beginnings_apart():
    ids = [b"same8888" + bytes([number]) * 8 for number in range(20)] + [b"\xff" * 16, b"\0" * 16]
    index = IdIndex(pa.chunked_array([pa.array(ids[:7], ID), pa.array(ids[7:], ID)]))
    order = np.random.default_rng(0).permutation(len(ids))
    assert index.rows([ids[at] for at in order], "x") == order.tolist()
    for unknown in (b"same8888" + b"\x7f" * 8, b"\xff" * 15 + b"\xfe"):
        with pytest.raises(ArtifactError):
            index.rows([unknown], "x")


def test_lance_takes_the_same_uris_as_pyarrow():
    assert lance_location("/data/x.lance") == ("/data/x.lance", None)
    assert lance_location("s3://bucket/x") == ("s3://bucket/x", None)
    base, options = lance_location("s3://bucket/x?endpoint_override=localhost:9000&scheme=http&region=eu-1")
    assert base == "s3://bucket/x"
    assert options == {"aws_endpoint": "http://localhost:9000", "aws_region": "eu-1", "allow_http": "true"}
