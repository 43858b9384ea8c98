"""Pictures that come with a request: base64 or a data URL, checked by the image policy. No address is ever fetched."""

from __future__ import annotations

import base64
import binascii
import io
import re

from unime_ray.config import ImagePolicy
from unime_ray.config_serve import LimitsConfig
from unime_ray.corpus.images import check_image, decode, extension
from unime_ray.errors import RejectedRow
from unime_ray.serve.errors import ApiError, invalid

DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.+-]+=[^;,]*)*)(;base64)?,", re.IGNORECASE)
ADDRESS = re.compile(r"(https?|ftp|file|s3|gs|blob):", re.IGNORECASE)
WEB_TYPES = {"png": "image/png", "jpg": "image/jpeg", "gif": "image/gif", "webp": "image/webp"}
THUMBNAIL_QUALITY = 82
WEBP_SIDE = 16383
"""Pixels; WebP knows no longer side."""


def picture_bytes(value: str, param: str, limits: LimitsConfig) -> bytes:
    """The encoded picture in `value` (base64 or `data:image/...;base64,...`), whole and decodable.

    Raises:
        ApiError: 422 or 413 naming `param`: an address, not base64, not a picture, too many bytes or pixels.
    """
    data = _from_text(value, param, limits)
    check_picture(data, param, limits)
    return data


def check_picture(data: bytes, param: str, limits: LimitsConfig) -> None:
    """Raise ApiError unless `data` is a picture within the limits that decodes to its last byte."""
    if len(data) > limits.max_image_bytes:
        raise _too_large(param, limits)
    policy = ImagePolicy(max_source_bytes=limits.max_image_bytes, max_source_pixels=limits.max_image_pixels)
    try:
        check_image(data, policy)
    except RejectedRow as error:
        reason = error.reason.replace("corpus.image.max_source_pixels", "the limit")
        raise invalid(param, reason, "invalid_image") from error


def thumbnail(data: bytes, side: int | None) -> tuple[bytes, str]:
    """(bytes, media type) a browser can show: as stored if it can, else WebP; with `side`, at most side*side pixels."""
    kind = WEB_TYPES.get(extension(data))
    if kind and side is None:
        return data, kind
    picture = decode(data, max_pixels=side * side if side else None)
    if max(picture.size) > WEBP_SIDE:
        picture.thumbnail((WEBP_SIDE, WEBP_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=THUMBNAIL_QUALITY)
    return buffer.getvalue(), "image/webp"


def _from_text(value: str, param: str, limits: LimitsConfig) -> bytes:
    if ADDRESS.match(value):
        raise invalid(param, "pictures come as base64 or a data: URL; addresses are not fetched", "address_not_fetched")
    if value[:5].lower() == "data:":
        found = DATA_URL.match(value)
        if not found or not found.group(3):
            raise invalid(param, "a data URL must read data:image/...;base64,...", "invalid_image")
        value = value[found.end() :]
    if len(value) * 3 // 4 > limits.max_image_bytes + 3:
        raise _too_large(param, limits)
    try:
        return base64.b64decode("".join(value.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid(param, f"not valid base64 ({error})", "invalid_image") from error


def _too_large(param: str, limits: LimitsConfig) -> ApiError:
    return ApiError(413, "image_too_large", f"{param}: a picture may have {limits.max_image_bytes} bytes", param)
