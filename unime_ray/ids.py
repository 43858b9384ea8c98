"""Ids are content hashes: BLAKE2b of 16 bytes, so equal content is one thing wherever it came from."""

from __future__ import annotations

import hashlib

ID_BYTES = 16


def image_id(data: bytes) -> bytes:
    """Id of a picture: the hash of its encoded bytes, as found (before any resizing)."""
    return hashlib.blake2b(data, digest_size=ID_BYTES, person=b"unime.image").digest()


def item_id(rendered: str, image: bytes | None) -> bytes:
    """Id of an item: the hash of the exact text a model gets and of its picture's id (16 bytes) or None."""
    hasher = hashlib.blake2b(digest_size=ID_BYTES, person=b"unime.item")
    hasher.update(image or b"\x00" * ID_BYTES)
    hasher.update(rendered.encode())
    return hasher.digest()


def show(identifier: bytes) -> str:
    """An id as people see it: 32 hex digits."""
    return identifier.hex()
