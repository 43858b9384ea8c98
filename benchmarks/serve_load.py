"""Clients for the load test of serving: closed loops, latencies, processor time by process, and search quality."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import requests

from unime_ray.metrics import ndcg_at

TICK = os.sysconf("SC_CLK_TCK")
REFUSED_PAUSE = 0.05
ROLES = {
    "ray::ServeReplica:unime-ray:ingress": "ingress",
    "ray::ServeReplica:unime-ray:encoder": "encoder",
    "ray::ServeReplica:unime-ray:retriever": "retriever",
    "ray::ServeReplica:unime-ray:reranker": "reranker",
    "ray::ProxyActor": "http proxy",
    "--serve-sequence": "one process",
}


async def load(address: str, bodies: Sequence[dict[str, Any]], clients: int, seconds: float) -> dict[str, Any]:
    """Each client sends its next search when the one before has been answered: rate, latencies in ms, what failed."""
    latencies: list[float] = []
    counts = {"ok": 0, "refused": 0, "failed": 0, "degraded": 0}
    queue = itertools.cycle(bodies)
    end = time.monotonic() + seconds

    async def client(session: aiohttp.ClientSession) -> None:
        while time.monotonic() < end:
            started = time.perf_counter()
            try:
                async with session.post(f"{address}/v1/search", json=next(queue)) as answer:
                    told, status = await answer.json(), answer.status
            except aiohttp.ClientError:
                counts["failed"] += 1
                await asyncio.sleep(REFUSED_PAUSE)
                continue
            if status == 200:
                latencies.append((time.perf_counter() - started) * 1000)
                counts["ok"] += 1
                counts["degraded"] += told["degraded"]
            else:
                counts["refused" if status == 429 else "failed"] += 1
                await asyncio.sleep(REFUSED_PAUSE)

    timeout = aiohttp.ClientTimeout(total=90)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=clients), timeout=timeout) as session:
        before, started = processor_seconds(), time.monotonic()
        await asyncio.gather(*(client(session) for _ in range(clients)))
        took, after = time.monotonic() - started, processor_seconds()
    p50, p95, p99 = np.percentile(latencies, [50, 95, 99]) if latencies else (float("nan"),) * 3
    times = {"p50_ms": round(p50, 1), "p95_ms": round(p95, 1), "p99_ms": round(p99, 1)}
    spent = {role: round((after[role] - before.get(role, 0.0)) * 1000 / max(counts["ok"], 1), 2) for role in after}
    rate = {"clients": clients, "requests_per_second": round(counts["ok"] / took, 2)}
    return {**rate, **times, **counts, "cpu_ms_per_request": {k: v for k, v in spent.items() if v >= 0.05}}


def processor_seconds() -> dict[str, float]:
    """Processor time used so far by the processes that serve, by role; this process is the `clients`."""
    found = {"clients": time.process_time()}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            with contextlib.suppress(OSError):  # it ended meanwhile
                name = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                role = next((role for sign, role in ROLES.items() if sign in name), None)
                if role is not None:
                    fields = (folder / "stat").read_text().rpartition(")")[2].split()
                    found[role] = found.get(role, 0.0) + (int(fields[11]) + int(fields[12])) / TICK
    return found


def quality(address: str, judged: Sequence[tuple[dict[str, Any], dict[str, float]]]) -> dict[str, float]:
    """Mean nDCG@10 of searches whose relevant items are known, in the order of retrieval and after reranking."""
    told: dict[str, list[float]] = {"retrieve": [], "rerank": []}
    for body, relevant in judged:
        for name in told:
            answer = requests.post(f"{address}/v1/search", json={**body, "rerank": name == "rerank"}, timeout=90)
            answer.raise_for_status()
            assert not answer.json()["degraded"]
            told[name].append(_ndcg(answer.json()["results"], relevant))
    return {name: round(float(np.mean(values)), 4) for name, values in told.items()} | {"queries": len(judged)}


def _ndcg(results: Sequence[dict[str, Any]], relevant: dict[str, float]) -> float:
    place_of = {hit["id"]: hit["rank"] for hit in results}
    golds = sorted((place_of.get(name, len(results) + 1), -gain) for name, gain in relevant.items())
    places = np.array([place for place, _ in golds])
    # `ndcg_at` counts the wrong answers before each gold, and adds the golds before it itself.
    return ndcg_at(places - np.arange(len(places)), -places.astype(float), [-gain for _, gain in golds], 10)


def wait_ready(address: str, seconds: float = 600.0) -> None:
    """Until the whole pool is indexed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(requests.ConnectionError):
            if requests.get(f"{address}/ready", timeout=30).status_code == 200:
                return
        time.sleep(0.5)
    raise SystemExit(f"{address} was not ready in {seconds:.0f} s")
