"""COCO captions: the annotation JSON with `images` (id, file_name) and `annotations` (image_id, caption).

Pictures lie under `image_root`. A row is a picture, counted as `images` lists them; an annotation that names no such
picture is refused under a number after the last.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from unime_ray.corpus.captions import Captioned, CaptionReader, read_object, stamp
from unime_ray.errors import CorpusError


def load(file: str) -> Sequence[Captioned]:
    """Every picture of the file with its captions, in the order of `images`.

    Raises:
        CorpusError: no JSON, not COCO's layout, or annotations without captions (boxes, key points).
    """
    return _load(file, stamp(file))


READER = CaptionReader(load)


@functools.lru_cache(maxsize=2)
def _load(file: str, _stamp: tuple[int, int]) -> Sequence[Captioned]:
    content = read_object(file, "an annotation file holds one, with `images`")
    images, annotations = (_objects(content, key, file) for key in ("images", "annotations"))
    if annotations and not any("caption" in one for one in annotations):
        raise CorpusError(f"{file}: no annotation has a `caption`; COCO's captions are in captions_*.json")
    captions: dict[Any, list[Any]] = {image["id"]: [] for image in images if _has_id(image)}
    strays = []
    for place, one in enumerate(annotations, 1):
        where = one.get("image_id")
        if isinstance(where, (int, str)) and where in captions:
            captions[where].append(one.get("caption"))
        else:
            reason = f"annotation {place} names image {where!r}, which is not in `images`"
            strays.append(Captioned("", (), str(place), problem=reason))
    return [_captioned(image, captions) for image in images] + strays


def _has_id(image: dict[str, Any]) -> bool:
    return isinstance(image.get("id"), (int, str))


def _captioned(image: dict[str, Any], captions: dict[Any, list[Any]]) -> Captioned:
    name, key = image.get("file_name"), image.get("id")
    if not _has_id(image):
        return Captioned("", (), str(name), problem=f"image {str(name)[:80]!r} has no `id` that is a number or a text")
    problem = None if isinstance(name, str) and name else f"image {key!r} has no `file_name`"
    return Captioned(str(name), captions[key], str(key), problem=problem)


def _objects(content: dict[str, Any], key: str, file: str) -> list[dict[str, Any]]:
    found = content.get(key)
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise CorpusError(f"{file}: no list of objects {key!r}; COCO's layout has `images` and `annotations`")
    return found
