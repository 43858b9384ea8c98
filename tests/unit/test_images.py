"""The image policy: what comes in, and what a model sees of it."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from unime_ray.config import ImagePolicy
from unime_ray.corpus.images import check_image, decode, extension, fit, probe, store_bytes
from unime_ray.errors import RejectedRow


def encoded(image: Image.Image, fmt: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def noise(size: tuple[int, int]) -> Image.Image:
    return Image.effect_noise(size, 80).convert("RGB")


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"])
def test_every_format_is_read_and_named(fmt):
    data = encoded(Image.new("RGB", (20, 10), (200, 30, 30)), fmt)
    assert probe(data) == check_image(data) == (20, 10)
    picture = decode(data)
    assert picture.mode == "RGB" and picture.size == (20, 10)
    assert np.abs(np.asarray(picture, int)[5, 10] - [200, 30, 30]).max() <= 4
    assert Image.open(io.BytesIO(data)).format.lower().startswith(extension(data)[:2])


def test_exif_orientation_is_applied():
    lying = Image.new("RGB", (20, 10), "white")
    lying.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    data = encoded(lying, "PNG", exif=exif)
    assert probe(data) == check_image(data) == (10, 20)
    upright = decode(data)
    assert upright.size == (10, 20)
    assert upright.getpixel((9, 0)) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_undone_as_pillow_undoes_it(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(noise((6, 4)), "PNG", exif=exif)
    wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(np.asarray(decode(data)), np.asarray(wanted))


def test_odd_exif_data_does_not_keep_a_checked_picture_from_being_decoded():
    """A text where a number belongs: Pillow reads it, and fails to write it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x0213] = 1
    data = bytearray(encoded(noise((20, 10)), "JPEG", exif=exif))
    tag = next(tag for tag in (b"\x02\x13\x00\x03", b"\x13\x02\x03\x00") if tag in data)  # in either byte order
    data[data.index(3, data.index(tag) + 2)] = 2
    with pytest.raises((struct.error, TypeError, ValueError, AttributeError)):
        ImageOps.exif_transpose(Image.open(io.BytesIO(bytes(data))))
    assert check_image(bytes(data)) == decode(bytes(data)).size == (10, 20)


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [
        (Image.new("RGBA", (4, 4), (255, 0, 0, 0)), {}, (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (0, 0, 0, 128)), {}, (127, 127, 127)),
        (Image.new("LA", (4, 4), (0, 0)), {}, (255, 255, 255)),
        (Image.new("L", (4, 4), 0), {"transparency": 0}, (255, 255, 255)),
        (Image.new("I;16", (4, 4), 0x8000), {}, (128, 128, 128)),
        (Image.new("1", (4, 4), 1), {}, (255, 255, 255)),
    ],
)
def test_pixels_become_rgb_on_white(image, options, expected):
    assert decode(encoded(image, "PNG", **options)).getpixel((1, 1)) == expected


def test_palette_transparency_and_cmyk():
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 255, 0] + [0] * 765)
    assert decode(encoded(palette, "PNG", transparency=0)).getpixel((0, 0)) == (255, 255, 255)
    assert decode(encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG")).getpixel((0, 0)) == (255, 255, 255)


def test_an_animation_is_its_first_frame():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
def test_a_truncated_picture_is_rejected(fmt):
    data = encoded(noise((64, 64)), fmt)
    with pytest.raises(RejectedRow, match="corrupt|truncated|broken|known format"):
        check_image(data[: len(data) * 2 // 3])


def test_flipped_bytes_are_rejected():
    data = bytearray(encoded(noise((64, 64)), "PNG"))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(RejectedRow, match="corrupt"):
        check_image(bytes(data))


@pytest.mark.parametrize(
    "data", [b"", b"<html>404</html>", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\x89PNG\r\n\x1a\n", b"RIFF"]
)
def test_what_is_no_picture_is_rejected(data):
    with pytest.raises(RejectedRow):
        probe(data)


def test_a_bomb_is_rejected_by_its_header():
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")
    )
    with pytest.raises(RejectedRow, match="60000x60000|bomb"):
        check_image(data)


def test_limits_of_the_policy():
    data = encoded(Image.new("RGB", (40, 30)))
    with pytest.raises(RejectedRow, match="max_source_pixels is 1000"):
        probe(data, ImagePolicy(max_source_pixels=1000))
    with pytest.raises(RejectedRow, match="max_source_bytes is 10"):
        probe(data, ImagePolicy(max_source_bytes=10))
    with pytest.raises(RejectedRow, match="min_side is 2"):
        probe(encoded(Image.new("RGB", (40, 1))))


def test_floating_point_pixels_are_rejected():
    with pytest.raises(RejectedRow, match="mode 'F'"):
        check_image(encoded(Image.new("F", (8, 8), 0.5), "TIFF"))


def test_fit_bounds_pixels_and_keeps_shape():
    small = fit(Image.new("RGB", (400, 100)), 10_000)
    assert small.size == (200, 50)
    assert fit(small, 10_000) is small


def test_decode_to_a_pixel_limit():
    assert decode(encoded(noise((400, 200)), "JPEG"), max_pixels=800).size == (40, 20)


def test_store_bytes_reencodes_only_what_is_too_large():
    data = encoded(noise((100, 100)))
    assert store_bytes(data) is data
    assert store_bytes(data, ImagePolicy(store_max_pixels=10_000)) is data
    assert probe(store_bytes(data, ImagePolicy(store_max_pixels=2_500))) == (50, 50)
