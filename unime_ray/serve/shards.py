"""The index divided among several retrievers: searches go to all and are merged, an item lives in one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from unime_ray.config_serve import ServeConfig
from unime_ray.corpus.payload import Item
from unime_ray.serve.catalog import Found, Ref, Wanted, shard_of
from unime_ray.serve.deadline import Deadline
from unime_ray.serve.stages import IndexState, NewItem, Page, RetrieverStage

CURSOR_ROWS = 1 << 40
"""A cursor is shard * CURSOR_ROWS + row: pages go through one shard after the other."""


def retriever_names(config: ServeConfig) -> list[str]:
    """What the retriever deployments are called."""
    count = config.retriever_shards
    return ["retriever"] if count == 1 else [f"retriever-{place}" for place in range(count)]


class ShardedRetriever:
    """A retriever made of retrievers. The whole is exact if the parts are: each item is in one part, the nearest k of
    the whole are among the nearest k of the parts, and ties go by id."""

    def __init__(self, shards: Sequence[RetrieverStage]) -> None:
        self.shards = shards

    async def search(
        self, vector_D: np.ndarray, revision: str, k: int, wanted: Wanted, deadline: Deadline
    ) -> list[tuple[Found, Item]]:
        parts = await _all([shard.search(vector_D, revision, k, wanted, deadline) for shard in self.shards])
        hits = [hit for part in parts for hit in part]
        return sorted(hits, key=lambda hit: (-hit[0].similarity, hit[0].ref.id))[:k]

    async def write(
        self, items: Sequence[NewItem], vectors_ND: np.ndarray, revision: str, deadline: Deadline
    ) -> tuple[list[str], int]:
        names = [new.name for new in items]
        parts = [[place for place, name in enumerate(names) if self._at(name) is shard] for shard in self.shards]
        written = [
            shard.write([items[place] for place in places], vectors_ND[places], revision, deadline)
            for shard, places in zip(self.shards, parts, strict=True)
            if places
        ]
        return names, max(version for _, version in await _all(written))

    async def delete(self, name: str, deadline: Deadline) -> int | None:
        return await self._at(name).delete(name, deadline)

    async def get(self, name: str, deadline: Deadline) -> tuple[Ref, Item] | None:
        return await self._at(name).get(name, deadline)

    async def picture(self, name: str, deadline: Deadline) -> tuple[bytes, bytes] | None:
        return await self._at(name).picture(name, deadline)

    async def page(self, start: int, limit: int, wanted: Wanted, deadline: Deadline) -> Page:
        first, row = divmod(start, CURSOR_ROWS)
        items: list[tuple[Ref, Item]] = []
        following: int | None = None
        for place in range(first, len(self.shards)):
            if len(items) == limit:
                following = place * CURSOR_ROWS
                break
            page = await self.shards[place].page(row, limit - len(items), wanted, deadline)
            items, row = items + page.items, 0
            if page.next_cursor is not None:
                following = place * CURSOR_ROWS + page.next_cursor
                break
        counts = await _all([shard.page(0, 1, wanted, deadline) for shard in self.shards])
        return Page(items, following, sum(page.total for page in counts))

    async def state(self, deadline: Deadline) -> IndexState:
        states: list[IndexState] = await _all([shard.state(deadline) for shard in self.shards])
        groups: dict[tuple[str, str], int] = {}
        for state in states:
            for group, count in state.groups.items():
                groups[group] = groups.get(group, 0) + count
        return IndexState(
            revision=states[0].revision,
            dim=states[0].dim,
            indexed=sum(state.indexed for state in states),
            expected=sum(state.expected for state in states),
            live=sum(state.live for state in states),
            version=max(state.version for state in states),
            groups=groups,
            built="; ".join(state.built for state in states),
        )

    def _at(self, name: str) -> RetrieverStage:
        return self.shards[shard_of(name, len(self.shards))]


async def _all(calls: Sequence) -> list:
    """Every answer. The first failure is raised once all have ended, so that none is left without a reader."""
    answers = await asyncio.gather(*calls, return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return list(answers)
