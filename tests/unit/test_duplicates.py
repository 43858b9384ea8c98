"""Near-duplicates: copies of a picture in another size or encoding are found, others are not; groups are exact."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from unime_ray.corpus.phash import COLORS, perceptual_hash
from unime_ray.grouping import near_hashes, near_vectors, spanning


def scene(seed: int, size: int = 240) -> Image.Image:
    """A smooth random picture."""
    noise = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, fmt: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def groups_of(pictures: list[bytes], max_hamming: int = 6, max_color: int = 24) -> dict[int, int]:
    """First member by member."""
    pytest.importorskip("imagehash")
    found = [perceptual_hash(data) for data in pictures]
    colors = np.frombuffer(b"".join(colors for _, colors in found), np.uint8).reshape(-1, COLORS)
    pairs = near_hashes(np.array([phash for phash, _ in found], np.uint64), colors, max_hamming, max_color)
    return {thing: first for thing, first, _ in spanning(pairs)}


def test_resized_and_reencoded_copies_are_one_group():
    pictures = []
    for seed in range(8):
        image = scene(seed)
        copies = [encoded(image), encoded(image, "JPEG", quality=30), encoded(image.resize((97, 90)))]
        pictures += [*copies, encoded(image.resize((480, 480)), "WEBP", quality=60)]
    assert groups_of(pictures) == {number: number - number % 4 for number in range(32)}


def test_the_same_shape_in_another_color_is_another_picture():
    red, blue = (encoded(Image.new("RGB", (64, 64), color)) for color in ("red", "blue"))
    assert groups_of([red, blue, red]) == {0: 0, 2: 0}
    assert groups_of([red, blue, red], max_color=255) == {0: 0, 1: 0, 2: 0}


@pytest.mark.parametrize("max_hamming", [0, 3, 6, 16])
def test_banding_finds_every_pair(max_hamming):
    rng = np.random.default_rng(max_hamming)
    hashes = rng.integers(0, 2**63, 40, dtype=np.uint64)
    flips = [sum(1 << int(bit) for bit in rng.choice(64, int(rng.integers(0, 20)), replace=False)) for _ in hashes]
    hashes = np.concatenate([hashes, hashes ^ np.array(flips, np.uint64)])
    none = np.zeros((len(hashes), COLORS), np.uint8)
    found = {(min(a, b), max(a, b)): d for a, b, d in near_hashes(hashes, none, max_hamming, 0)}
    distances = np.bitwise_count(hashes[:, None] ^ hashes[None])
    expected = {(a, b): distances[a, b] for a in range(80) for b in range(a + 1, 80) if distances[a, b] <= max_hamming}
    assert found == expected and len(expected) > 0


def test_near_vectors_whatever_the_blocks(monkeypatch):
    monkeypatch.setattr("unime_ray.grouping.COLUMNS", 7)
    rng = np.random.default_rng(0)
    base = rng.normal(size=(20, 8))
    vectors = np.concatenate([base, base + rng.normal(size=base.shape) * 0.05]).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = [pair for start in range(0, 40, 9) for pair in near_vectors(vectors, start, min(start + 9, 40), 0.98)]
    cosines = vectors @ vectors.T
    assert {(a, b) for a, b, _ in pairs} == {tuple(p) for p in np.argwhere(np.triu(cosines >= 0.98, 1)).tolist()}
    assert all(abs(1 - cosines[a, b] - d) < 1e-5 for a, b, d in pairs)


def test_groups_are_transitive_and_keep_the_nearest_distance():
    assert spanning([(5, 3, 0.2), (3, 9, 0.1), (1, 2, 0.4), (5, 3, 0.3)]) == [
        (1, 1, 0.4),
        (2, 1, 0.4),
        (3, 3, 0.1),
        (5, 3, 0.2),
        (9, 3, 0.1),
    ]
    assert spanning(spanning([(4, 1, 0.0), (7, 4, 1.0)])) == [(1, 1, 0.0), (4, 1, 0.0), (7, 1, 1.0)]
