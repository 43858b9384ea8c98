"""Perceptual hashes of pictures: near for a picture and its copy in another size or encoding.

The hash (the `imagehash` library's pHash, of the low frequencies of the grey picture) knows no color, so a thumbnail of
4x4 pixels goes with it: a red and a blue square have the same hash.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from unime_ray.config import ImagePolicy
from unime_ray.corpus.images import DEFAULT_POLICY, decode

HASHED_PIXELS = 256 * 256
SIDE = 4
COLORS = 3 * SIDE * SIDE


def perceptual_hash(data: bytes, policy: ImagePolicy = DEFAULT_POLICY) -> tuple[int, bytes]:
    """(pHash of 64 bits, RGB thumbnail of 4x4 pixels as 48 bytes) of an encoded picture.

    Raises:
        RejectedRow: the picture does not decode.
    """
    import imagehash

    image = decode(data, policy, HASHED_PIXELS)
    bits = imagehash.phash(image, hash_size=8).hash
    thumbnail = image.resize((SIDE, SIDE), Image.Resampling.BOX)
    return int.from_bytes(np.packbits(bits).tobytes(), "big"), thumbnail.tobytes()
