"""How well pictures' copies are found, and what else is taken for one: the demo's pictures and copies of them.

    python benchmarks/near_duplicates.py [NUMBER OF PICTURES]

Each picture is copied in three ways: half its size, JPEG of quality 40, WebP of quality 60 at one and a half times the
size. Prints the share of copies within the limits of their original, the pairs of different pictures within them (most
are the same motif by the same artist, such as two clock faces), and the seconds it takes.
"""

from __future__ import annotations

import io
import sys
import time

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from unime_ray.config import DuplicatesConfig
from unime_ray.corpus.demo import DEMO_DATA
from unime_ray.corpus.images import decode
from unime_ray.corpus.phash import COLORS, perceptual_hash
from unime_ray.grouping import near_hashes, spanning

COPIES = ("half the size", "JPEG 40", "WebP 60, 1.5 x")


def main(count: int) -> None:
    table = pq.read_table(DEMO_DATA / "pictures.parquet", columns=["image"])
    pictures = table.column(0).take(np.linspace(0, table.num_rows - 1, count).astype(int)).to_pylist()
    clock = time.perf_counter()
    hashes = [perceptual_hash(data) for data in pictures]
    seconds = time.perf_counter() - clock
    print(f"{count} pictures hashed in {seconds:.1f} s ({count / seconds:.0f}/s)")
    copies = [[perceptual_hash(data) for data in copies_of(picture)] for picture in pictures]
    words, colors = arrays(hashes)
    for max_hamming in (2, 4, 6, 8, 10):
        for max_color in (24, 255):
            found = [near(one, others, max_hamming, max_color) for one, others in zip(hashes, copies, strict=True)]
            shares = ", ".join(
                f"{name} {share:.1%}" for name, share in zip(COPIES, np.mean(found, axis=0), strict=True)
            )
            clock = time.perf_counter()
            pairs = {(min(a, b), max(a, b)) for a, b, _ in near_hashes(words, colors, max_hamming, max_color)}
            members = spanning((a, b, 0.0) for a, b in pairs)
            seconds = time.perf_counter() - clock
            print(
                f"bits {max_hamming:2d} color {max_color:3d}: {shares}; {len(pairs)} pairs of different pictures, "
                f"{len(members)} pictures in groups ({seconds:.1f} s)"
            )
    default = DuplicatesConfig()
    print(f"defaults: max_hamming {default.max_hamming}, max_color {default.max_color}")


def copies_of(data: bytes) -> list[bytes]:
    image = decode(data)
    width, height = image.size
    half, larger = image.resize((width // 2, height // 2)), image.resize((width * 3 // 2, height * 3 // 2))
    made = []
    for one, fmt, options in ((half, "PNG", {}), (image, "JPEG", {"quality": 40}), (larger, "WEBP", {"quality": 60})):
        buffer = io.BytesIO()
        one.save(buffer, fmt, **options)
        made.append(buffer.getvalue())
    return made


def arrays(hashes: list[tuple[int, bytes]]) -> tuple[np.ndarray, np.ndarray]:
    words = np.array([word for word, _ in hashes], np.uint64)
    return words, np.frombuffer(b"".join(colors for _, colors in hashes), np.uint8).reshape(-1, COLORS)


def near(one: tuple[int, bytes], others: list[tuple[int, bytes]], max_hamming: int, max_color: int) -> list[bool]:
    words, colors = arrays([one, *others])
    colors = colors.astype(int)
    distances = np.bitwise_count(words[1:] ^ words[0])
    return list((distances <= max_hamming) & (np.abs(colors[1:] - colors[0]).max(axis=1) <= max_color))


if __name__ == "__main__":
    Image.init()
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
