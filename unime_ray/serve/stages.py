"""What a request asks of the stages behind it, whoever answers: Ray Serve deployments, or plain objects in a test.

Every call carries a deadline. A stage that does not answer raises `StageFailed` (late, overloaded or down).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from unime_ray.corpus.payload import Item
from unime_ray.ids import show
from unime_ray.serve.catalog import Found, Ref, Wanted
from unime_ray.serve.deadline import Deadline


@dataclass(frozen=True)
class Encoded:
    """Vectors (N, D) float32 and, per item, None or why it has none; `tokens` counts what the model read. `model` is
    what its users call the embedder."""

    vectors: np.ndarray
    errors: list[str | None]
    tokens: int
    revision: str
    model: str


@dataclass(frozen=True)
class IndexState:
    """What the index holds at the moment."""

    revision: str
    dim: int
    indexed: int
    expected: int
    live: int
    version: int
    groups: dict[tuple[str, str], int]
    built: str

    @property
    def ready(self) -> bool:
        return self.indexed >= self.expected


@dataclass(frozen=True)
class NewItem:
    """An item to write: what its user calls it (None: the hash of its content), its content and where it belongs."""

    id: str | None
    item: Item
    dataset: str
    split: str

    @property
    def name(self) -> str:
        return self.id or show(self.item.item_id)


@dataclass(frozen=True)
class Page:
    items: list[tuple[Ref, Item]]
    next_cursor: int | None
    total: int


class EncoderStage(Protocol):
    async def embed(self, items: Sequence[Item], deadline: Deadline, revision: str | None = None) -> Encoded:
        """`revision`: of the embedder to use, if it is held (the answer says which one it was); None: the current."""
        ...


class RetrieverStage(Protocol):
    async def search(
        self, vector_D: np.ndarray, revision: str, k: int, wanted: Wanted, deadline: Deadline
    ) -> list[tuple[Found, Item]]:
        """Hits, best first, with their payload but without pictures."""
        ...

    async def write(
        self, items: Sequence[NewItem], vectors_ND: np.ndarray, revision: str, deadline: Deadline
    ) -> tuple[list[str], int]:
        """Ids and the index's version, once the items are durable and searchable."""
        ...

    async def delete(self, name: str, deadline: Deadline) -> int | None:
        """The index's version; None if there is no such item."""
        ...

    async def get(self, name: str, deadline: Deadline) -> tuple[Ref, Item] | None: ...
    async def page(self, start: int, limit: int, wanted: Wanted, deadline: Deadline) -> Page: ...
    async def picture(self, name: str, deadline: Deadline) -> tuple[bytes, bytes] | None:
        """(image id, encoded picture) of the item called `name`; None without item or picture."""
        ...

    async def state(self, deadline: Deadline) -> IndexState: ...


class RerankerStage(Protocol):
    async def rerank_refs(self, query: Item, refs: Sequence[Ref], deadline: Deadline) -> list[float | None]:
        """Each candidate's share of the listwise vote; None for one that cannot be shown."""
        ...

    async def rerank_items(
        self, query: Item, items: Sequence[Item], mode: str, deadline: Deadline
    ) -> list[float | None]:
        """The same for items that come with the request; `pointwise` gives the probability of Yes instead."""
        ...
