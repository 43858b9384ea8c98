"""What models need of an item; `corpus.payload.Item` is one."""

from __future__ import annotations

from typing import Protocol


class Item(Protocol):
    """The exact text a model gets, with the marker where its picture goes, and the encoded picture."""

    @property
    def item_id(self) -> bytes: ...
    @property
    def rendered(self) -> str: ...
    @property
    def text(self) -> str | None: ...
    @property
    def image_id(self) -> bytes | None: ...
    @property
    def image(self) -> bytes | None: ...
