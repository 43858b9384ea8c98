"""The image policy: what pictures may come in, and the one way they are turned into pixels.

Every picture a model sees went through `decode`: EXIF orientation applied, first frame of an animation, RGB, laid on
white where it was transparent, 16-bit greys scaled to 8. Everything that is wrong with a picture surfaces as
`RejectedRow`, whose reason goes to `rejects`. Resizing to a model's pixel grid is the image processor's; `fit` only
bounds what is stored.
"""

from __future__ import annotations

import io
import math
import struct
import zlib

import numpy as np
from PIL import Image

from unime_ray.config import ImagePolicy
from unime_ray.errors import RejectedRow

# Named, so that no other plug-in of Pillow runs on a stranger's bytes (EPS starts Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM")
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "JPEG2000": "jp2", "TIFF": "tif"}
STORE_QUALITY = 95
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture of an EXIF orientation upright (Pillow turns against the clock)."""
DEFAULT_POLICY = ImagePolicy()

# What Pillow's decoders raise on broken bytes. OSError covers truncation and UnidentifiedImageError.
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
)


def probe(data: bytes, policy: ImagePolicy = DEFAULT_POLICY) -> tuple[int, int]:
    """(width, height) in pixels after EXIF orientation, from the header alone: no pixel is decoded.

    Raises:
        RejectedRow: empty, too many bytes, unknown format, broken header, too many pixels or a side too short.
    """
    return _upright_size(_open(data, policy))


def check_image(data: bytes, policy: ImagePolicy = DEFAULT_POLICY) -> tuple[int, int]:
    """(width, height) of a picture that decodes to its last byte.

    Raises:
        RejectedRow: as `probe`, or the pixels are corrupt or truncated.
    """
    image = _open(data, policy)
    size = _upright_size(image)
    if image.format == "PNG":
        _verify(_open(data, policy))
    # A JPEG decoded at an eighth of its size still reads the whole stream, so truncation shows at little cost.
    image.draft(image.mode, (max(image.width // 8, 1), max(image.height // 8, 1)))
    _load(image)
    return size


def decode(data: bytes, policy: ImagePolicy = DEFAULT_POLICY, max_pixels: int | None = None) -> Image.Image:
    """The picture as RGB, upright, on white; with `max_pixels`, shrunk to at most so many.

    Raises:
        RejectedRow: as `check_image`.
    """
    image = _open(data, policy)
    if max_pixels is not None and image.width * image.height > max_pixels:
        scale = math.sqrt(max_pixels / (image.width * image.height))
        image.draft(image.mode, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
    _load(image)
    rgb = _rgb_on_white(_upright(image))
    return fit(rgb, max_pixels) if max_pixels is not None else rgb


def fit(image: Image.Image, max_pixels: int) -> Image.Image:
    """`image` with at most `max_pixels` pixels, its shape kept; returned as it is if small enough."""
    if image.width * image.height <= max_pixels:
        return image
    scale = math.sqrt(max_pixels / (image.width * image.height))
    size = (max(int(image.width * scale), 1), max(int(image.height * scale), 1))
    return image.resize(size, Image.Resampling.BICUBIC)


def store_bytes(data: bytes, policy: ImagePolicy = DEFAULT_POLICY) -> bytes:
    """What ingest stores of a picture: its bytes as they came, or re-encoded to `policy.store_max_pixels` if larger.

    The id is always the hash of the bytes as they came, so it does not change with the policy.
    """
    limit = policy.store_max_pixels
    if limit is None:
        return data
    width, height = probe(data, policy)
    if width * height <= limit:
        return data
    buffer = io.BytesIO()
    decode(data, policy, limit).save(buffer, "JPEG", quality=STORE_QUALITY, subsampling=0)
    return buffer.getvalue()


def extension(data: bytes) -> str:
    """File extension for encoded bytes, without the dot: `png`, `jpg`, `webp`."""
    name = _open(data, ImagePolicy(max_source_pixels=2**62, max_source_bytes=2**62, min_side=1)).format or "PNG"
    return EXTENSIONS.get(name, name.lower())


def _open(data: bytes, policy: ImagePolicy) -> Image.Image:
    if not data:
        raise RejectedRow("picture is empty (0 bytes)")
    if len(data) > policy.max_source_bytes:
        raise RejectedRow(f"picture has {len(data)} bytes; corpus.image.max_source_bytes is {policy.max_source_bytes}")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RejectedRow(f"picture may be a decompression bomb: {_line(error)}") from error
    except Image.UnidentifiedImageError as error:
        raise RejectedRow(f"not a picture in a known format ({', '.join(FORMATS)})") from error
    except BROKEN as error:
        raise RejectedRow(f"picture has a broken header: {_line(error)}") from error
    pixels = image.width * image.height
    if pixels > policy.max_source_pixels:
        raise RejectedRow(
            f"picture has {image.width}x{image.height} pixels; "
            f"corpus.image.max_source_pixels is {policy.max_source_pixels}"
        )
    if min(image.size) < policy.min_side:
        raise RejectedRow(
            f"picture has {image.width}x{image.height} pixels; corpus.image.min_side is {policy.min_side}"
        )
    return image


def _load(image: Image.Image) -> None:
    """Decode the pixels of the first frame."""
    if image.mode in ("I", "F"):
        raise RejectedRow(
            f"picture has pixels of mode {image.mode!r}, whose range is unknown; save it with 8 or 16 bits"
        )
    try:
        image.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RejectedRow(f"picture may be a decompression bomb: {_line(error)}") from error
    except BROKEN as error:
        raise RejectedRow(f"picture is corrupt or truncated: {_line(error)}") from error


def _verify(image: Image.Image) -> None:
    """Compare the checksums of a PNG, which decoding alone does not."""
    try:
        image.verify()
    except BROKEN as error:
        raise RejectedRow(f"picture is corrupt or truncated: {_line(error)}") from error


def _upright_size(image: Image.Image) -> tuple[int, int]:
    return (image.height, image.width) if _orientation(image) >= 5 else image.size  # 5 to 8 swap width and height


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF data say. Pillow's own function also writes them, and fails where they are odd."""
    turn = TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8. Pictures with broken EXIF data are taken as they lie."""
    try:
        found = image.getexif().get(0x0112, 1)
    except BROKEN:
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _rgb_on_white(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        front = image.convert("RGBA")
        canvas = Image.new("RGBA", front.size, "white")
        canvas.alpha_composite(front)
        return canvas.convert("RGB")
    return image.convert("RGB")


def _line(error: BaseException) -> str:
    """An exception's message on one line, or its class if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
