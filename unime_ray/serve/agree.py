"""A query's vector and the index must come of one revision of the embedder, also while another is being swapped in.

Encoder and retriever change over at moments of their own, and both keep the revision before for a while. A retriever
that does not hold a vector's revision says which one it serves; the query is then embedded again by that one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from unime_ray.corpus.payload import Item
from unime_ray.serve.deadline import Deadline
from unime_ray.serve.errors import StageDown
from unime_ray.serve.stages import Encoded, EncoderStage

T = TypeVar("T")
TRIES = 3


class OtherRevision(StageDown):
    """The retriever serves vectors of `revision`, not those it was asked with."""

    def __init__(self, revision: str) -> None:
        super().__init__("retriever", "its index holds another revision's vectors")
        self.revision = revision


class AgreeingEncoder:
    """An encoder that remembers which revision the retriever last asked for."""

    def __init__(self, encoder: EncoderStage) -> None:
        self.encoder = encoder
        self._revision: str | None = None

    async def embed_for(
        self, items: Sequence[Item], deadline: Deadline, use: Callable[[Encoded], Awaitable[T]]
    ) -> tuple[Encoded, T]:
        """The vectors, and what `use` made of them.

        Raises:
            StageFailed: a stage did not answer, or they did not agree.
        """
        failure: OtherRevision | None = None
        for _ in range(TRIES):
            encoded = await self.encoder.embed(items, deadline, self._revision)
            try:
                return encoded, await use(encoded)
            except OtherRevision as other:
                self._revision, failure = other.revision, other
        assert failure is not None, "the loop ends early unless it failed"
        raise failure
