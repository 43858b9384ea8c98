"""Items over the API: write, read, list, delete, and their pictures."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Collection, Mapping

from unime_ray.config_serve import ServeConfig
from unime_ray.corpus.payload import Item
from unime_ray.errors import RejectedRow
from unime_ray.serve.agree import AgreeingEncoder
from unime_ray.serve.catalog import Ref, Wanted
from unime_ray.serve.content import check_text, make_item
from unime_ray.serve.deadline import Deadline
from unime_ray.serve.errors import ApiError, invalid
from unime_ray.serve.metrics import Meter
from unime_ray.serve.pictures import thumbnail
from unime_ray.serve.schemas import (
    ItemAnswer,
    ItemDeleteAnswer,
    ItemsAnswer,
    ItemsWriteAnswer,
    ItemsWriteRequest,
    ItemWrite,
)
from unime_ray.serve.search import deadline_of, image_url, names_content
from unime_ray.serve.stages import Encoded, EncoderStage, NewItem, RetrieverStage
from unime_ray.serve.tasks import caption, kind_of

PICTURE_CACHE_BYTES = 64 << 20
Picture = tuple[bytes, str, str]
"""Encoded bytes, media type, ETag."""


class Items:
    """`instructions` are those of the run's own items, by kind: a written item gets them unless it has its own."""

    def __init__(
        self,
        encoder: EncoderStage,
        retriever: RetrieverStage,
        instructions: Mapping[str, str],
        config: ServeConfig,
        meter: Meter,
    ) -> None:
        self.encoder, self.retriever = AgreeingEncoder(encoder), retriever
        self.instructions, self.config, self.meter = instructions, config, meter
        self._pictures: OrderedDict[tuple[str, str | None, int | None], Picture] = OrderedDict()
        self._picture_bytes = 0

    async def write(self, request: ItemsWriteRequest) -> ItemsWriteAnswer:
        """Raises: ApiError (a field is wrong), StageFailed. Nothing is written then."""
        limit = self.config.limits.max_inputs
        if len(request.items) > limit:
            raise invalid("items", f"{len(request.items)} items; at most {limit} are taken at once")
        deadline = deadline_of(request.deadline_ms, self.config)
        new = await asyncio.to_thread(lambda: [self._new(item, f"items[{n}]") for n, item in enumerate(request.items)])

        async def write(encoded: Encoded) -> tuple[list[str], int]:
            for place, error in enumerate(encoded.errors):
                if error is not None:
                    raise invalid(f"items[{place}]", error)
            return await self.retriever.write(new, encoded.vectors, encoded.revision, deadline)

        _, (ids, version) = await self.encoder.embed_for([each.item for each in new], deadline, write)
        return ItemsWriteAnswer(ids=ids, version=version)

    async def delete(self, name: str) -> ItemDeleteAnswer:
        version = await self.retriever.delete(name, self._deadline())
        if version is None:
            raise no_item(name)
        for key in [key for key in self._pictures if key[0] == name]:
            self._picture_bytes -= len(self._pictures.pop(key)[0])
        return ItemDeleteAnswer(id=name, version=version)

    async def get(self, name: str) -> ItemAnswer:
        found = await self.retriever.get(name, self._deadline())
        if found is None:
            raise no_item(name)
        return shown(*found, self.instructions.values())

    async def page(self, cursor: int, limit: int, wanted: Wanted) -> ItemsAnswer:
        page = await self.retriever.page(cursor, limit, wanted, self._deadline())
        items = [shown(ref, item, self.instructions.values()) for ref, item in page.items]
        return ItemsAnswer(items=items, next_cursor=page.next_cursor, total=page.total)

    async def picture(self, name: str, version: str | None, side: int | None) -> Picture:
        """The picture of an item, as a browser can show it. `version` is part of the address: content never changes
        under one, so it may be kept."""
        key = (name, version, side)
        kept = self._pictures.get(key) if version is not None else None
        self.meter.picture(kept is not None)
        if kept is not None:
            self._pictures.move_to_end(key)
            return kept
        found = await self.retriever.picture(name, self._deadline())
        if found is None:
            raise ApiError(404, "no_picture", f"id: item {name!r} is not there or has no picture", "id")
        image, data = found
        try:
            body, media = await asyncio.to_thread(thumbnail, data, side)
        except RejectedRow as error:
            raise ApiError(404, "no_picture", f"id: the picture of {name!r} does not decode ({error})", "id") from error
        answer = (body, media, f'"{image.hex()}-{side or 0}"')
        if names_content(version, image.hex()):
            self._keep(key, answer)
        return answer

    def _keep(self, key: tuple[str, str | None, int | None], answer: Picture) -> None:
        before = self._pictures.pop(key, None)  # two requests at once may both have read it
        self._picture_bytes += len(answer[0]) - (len(before[0]) if before else 0)
        self._pictures[key] = answer
        while self._picture_bytes > PICTURE_CACHE_BYTES:
            self._picture_bytes -= len(self._pictures.popitem(last=False)[1][0])

    def _new(self, write: ItemWrite, param: str) -> NewItem:
        instruction = write.instruction
        if instruction is None:
            instruction = self.instructions.get(kind_of(write.text and write.text.strip(), write.image))
        check_text(write.dataset, f"{param}.dataset", self.config.limits)
        check_text(write.split, f"{param}.split", self.config.limits)
        item = make_item(write.text, write.image, self.config.limits, f"{param}.text", f"{param}.image", instruction)
        return NewItem(write.id, item, write.dataset, write.split)

    def _deadline(self) -> Deadline:
        return deadline_of(None, self.config)


def shown(ref: Ref, item: Item, instructions: Collection[str]) -> ItemAnswer:
    return ItemAnswer(
        id=ref.id,
        text=item.text,
        caption=caption(item.text, instructions),
        rendered=item.rendered,
        image_url=image_url(ref.id, item.image_id),
        dataset=ref.dataset,
        split=ref.split,
        live=ref.log_row is not None,
    )


def no_item(name: str) -> ApiError:
    return ApiError(404, "no_such_item", f"id: no item {name!r}", "id")
