"""Items as the report shows them; a picture is embedded once, as a data URI in a style rule, however often shown."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Sequence
from typing import Any

from unime_ray.artifacts import Run
from unime_ray.config import ImagePolicy
from unime_ray.corpus.images import decode
from unime_ray.corpus.lance_io import open_lance
from unime_ray.corpus.payload import Item, PayloadStore
from unime_ray.corpus.truth import Truth
from unime_ray.errors import RejectedRow

SIDE = 112
BUDGET_BYTES = 1_900_000
SIGNATURES = {b"\x89PNG": "image/png", b"RIFF": "image/webp", b"\xff\xd8\xff": "image/jpeg"}
SMALL_BYTES = 6_000
TEXT_CHARS = 160
SHARED_TIMES, SHARED_PART, SAMPLED_ITEMS = 5, 0.01, 20_000


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


class Instructions:
    """Texts, and openings up to a colon, that many items of a corpus share: instructions rather than content."""

    def __init__(self, texts: Sequence[tuple[str | None, bool]]) -> None:
        """`texts` are (text, whether the item has a picture) of a sample of items."""
        least = max(SHARED_TIMES, int(SHARED_PART * len(texts)))
        whole = Counter(text for text, has_picture in texts if text and has_picture)
        openings = Counter(opening(text) for text, _ in texts if text)
        self.whole = {text for text, times in whole.items() if times >= least}
        self.openings = {text for text, times in openings.items() if text and times >= least}

    @classmethod
    def of(cls, run: Run) -> Instructions:
        """From the first items of a run; without any before ingest."""
        if run.artifact("items").manifest() is None:
            return cls([])
        items = open_lance(run.artifact("items").data_uri)
        table = items.to_table(columns=["text", "image_id"], limit=SAMPLED_ITEMS)
        pictures = table["image_id"].is_valid().to_pylist()
        return cls(list(zip(table["text"].to_pylist(), pictures, strict=True)))

    def split(self, text: str, has_picture: bool) -> tuple[str, str]:
        """(instruction, content) of a text."""
        if has_picture and text in self.whole:
            return text, ""
        lead = opening(text)
        return (lead, text[len(lead) :].strip()) if lead in self.openings else ("", text)


def opening(text: str) -> str:
    """The text up to its first colon, or nothing if it has none or ends there."""
    head, colon, rest = text.partition(":")
    return head + colon if colon and rest.strip() else ""


class Payload:
    """Items ready to be shown: text, picture class, and the concept that a truth table knows them by."""

    def __init__(
        self,
        run: Run,
        ids: Sequence[bytes],
        pictures: Pictures,
        instructions: Instructions,
        truth: Truth | None = None,
    ) -> None:
        store = PayloadStore(run.artifact("images").data_uri, run.artifact("items").data_uri)
        found = store.items(list(ids)) if ids else []
        self._shown = {item.item_id: _show(item, pictures, instructions) for item in found}
        self._truth = truth
        self._concepts = {item.item_id: truth.concept(item.text, item.image_id) for item in found} if truth else {}

    def __getitem__(self, identifier: bytes) -> dict[str, Any]:
        return self._shown[identifier]

    def relevance(self, query: bytes, item: bytes) -> float | None:
        """True relevance, or None where it is not known."""
        pair = self._concepts.get(query), self._concepts.get(item)
        return None if self._truth is None or None in pair else self._truth.relevance(*pair)


def _show(item: Item, pictures: Pictures, instructions: Instructions) -> dict[str, Any]:
    has_picture = item.image_id is not None
    lead, text = instructions.split((item.text or "").strip(), has_picture)
    short = text if len(text) <= TEXT_CHARS else text[: TEXT_CHARS - 1].rstrip() + "…"
    name = pictures.name(item.image_id, item.image) if item.image_id and item.image else None
    return {"lead": lead, "text": short, "picture": name, "has_picture": has_picture}
