"""What the retriever does beside answering: embed what has no vector yet, follow other replicas, rebuild.

At a first start (or under a new embedder) the run's pool is embedded by the serving encoder, part by part; every part
is kept, so that a restart goes on. Live items of another revision follow, then the loop watches for writes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from unime_ray.corpus.payload import Item
from unime_ray.serve.deadline import Deadline
from unime_ray.serve.errors import StageFailed
from unime_ray.serve.retriever import RetrieverEngine
from unime_ray.serve.stages import Encoded, EncoderStage

log = logging.getLogger("ray.serve.unime")
CHUNK = 64
"""Items embedded at once: few enough that searches need not wait long behind them."""
CHUNK_MS = 120_000
PAUSE_SECONDS = 1.0
REBUILD_SECONDS = 15.0
"""While the pool fills, what is there becomes searchable this often."""


async def keep_fresh(engine: RetrieverEngine, encoder: EncoderStage) -> None:
    """Runs for as long as the replica."""
    await fill(engine, encoder)
    while True:
        await asyncio.sleep(engine.config.refresh_seconds)
        await asyncio.to_thread(engine.refresh)
        if engine.stale:
            await reembed(engine, encoder)
        if engine.needs_rebuild():
            await asyncio.to_thread(engine.rebuild)


async def fill(engine: RetrieverEngine, encoder: EncoderStage) -> None:
    """Embed the pool items without a vector."""
    missing, built = engine.missing, time.monotonic()
    if not missing:
        return
    log.info("embedding %d of the pool's items with the served embedder", len(missing))
    for start in range(0, len(missing), CHUNK):
        ids = missing[start : start + CHUNK]
        items = await asyncio.to_thread(engine.payload.items, ids)
        encoded = await _patiently(encoder, items, engine.revision)
        await asyncio.to_thread(engine.take_in, ids, encoded.vectors, encoded.errors)
        if time.monotonic() - built > REBUILD_SECONDS:
            await asyncio.to_thread(engine.rebuild)
            built = time.monotonic()
    await asyncio.to_thread(engine.rebuild)


async def reembed(engine: RetrieverEngine, encoder: EncoderStage) -> None:
    """Give live items of another revision a vector of this one; those it cannot embed are given up."""
    rows = engine.stale[:CHUNK]
    items = await asyncio.to_thread(engine.live.items, [row.row for row in rows])
    encoded = await _patiently(encoder, items, engine.revision)
    engine.give_up(rows, encoded.errors)
    good = [place for place, error in enumerate(encoded.errors) if error is None]
    kept = [rows[place] for place in good], [items[place] for place in good], encoded.vectors[good]
    await asyncio.to_thread(engine.reembedded, *kept)


async def reembed_all(engine: RetrieverEngine, encoder: EncoderStage) -> None:
    """`reembed` until no live item is left behind."""
    await asyncio.to_thread(engine.refresh)
    while engine.stale:
        await reembed(engine, encoder)


async def _patiently(encoder: EncoderStage, items: Sequence[Item], revision: str) -> Encoded:
    """Ask until the encoder answers with `revision`: it may still be loading it, and under load its queue be full."""
    while True:
        try:
            encoded = await encoder.embed(items, Deadline.after_ms(CHUNK_MS), revision)
            if encoded.revision == revision:
                return encoded
        except StageFailed as failure:
            log.warning("embedding waits: %s", failure)
        await asyncio.sleep(PAUSE_SECONDS)
