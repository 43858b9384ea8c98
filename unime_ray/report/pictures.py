"""Pictures of the gallery: each is embedded once, as a data URI in a style rule, however often it is shown."""

from __future__ import annotations

import base64
import io

from unime_ray.config import ImagePolicy
from unime_ray.corpus.images import decode
from unime_ray.errors import RejectedRow

SIDE = 112
BUDGET_BYTES = 1_900_000
SIGNATURES = {b"\x89PNG": "image/png", b"RIFF": "image/webp", b"\xff\xd8\xff": "image/jpeg"}
SMALL_BYTES = 6_000


class Pictures:
    """Thumbnails by picture id, as class names of rules in `css`. Past the budget no more are taken."""

    def __init__(self, budget_bytes: int = BUDGET_BYTES) -> None:
        self._names: dict[bytes, str | None] = {}
        self._rules: list[str] = []
        self._left = budget_bytes

    def name(self, image_id: bytes, data: bytes) -> str | None:
        """The class that shows this picture, or None if it cannot be shown or the budget is spent."""
        if image_id not in self._names:
            self._names[image_id] = self._add(data)
        return self._names[image_id]

    def _add(self, data: bytes) -> str | None:
        found = thumbnail(data)
        if found is None or len(found[1]) * 4 // 3 > self._left:
            return None
        kind, small = found
        encoded = base64.b64encode(small).decode()
        self._left -= len(encoded)
        name = f"p{len(self._rules)}"
        self._rules.append(f".{name}{{background-image:url(data:{kind};base64,{encoded})}}")
        return name

    @property
    def css(self) -> str:
        """The rules; base64 and our own names only, so safe to put into a style element as they are."""
        return "\n".join(self._rules)


def thumbnail(data: bytes) -> tuple[str, bytes] | None:
    """(media type, encoded picture of at most SIDE pixels a side); None if it does not decode."""
    try:
        picture = decode(data, ImagePolicy())
    except RejectedRow:
        return None
    kind = next((kind for start, kind in SIGNATURES.items() if data.startswith(start)), None)
    if kind and max(picture.size) <= SIDE and len(data) <= SMALL_BYTES:
        return kind, data  # small enough as it is
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=78, method=4)
    return "image/webp", buffer.getvalue()
