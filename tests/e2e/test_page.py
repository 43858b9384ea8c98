"""The search page in a real browser: type, drop, paste, click, keys, themes, phone. Stages without models."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import picture
from tests.e2e.browser import CHROMIUM, Page, browser
from tests.unit.serve_fixtures import (
    FakeEncoder,
    FakeReranker,
    LocalRetriever,
    filled_engine,
    listening,
    make_bundle,
    make_run,
)
from unime_ray.serve.app import Stages, build_app
from unime_ray.serve.errors import StageOverloaded
from unime_ray.serve.gate import key_digests
from unime_ray.serve.metrics import NoMeter
from unime_ray.serve.negatives import read_negatives
from unime_ray.serve.tasks import item_instructions, query_tasks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium"),
]
SEARCHED = "!document.getElementById('summary').hidden && !document.querySelector('.busy')"
THUMB = "document.getElementById('thumb')"
CARDS = "document.querySelectorAll('#results .card').length"


@contextlib.contextmanager
def serving(tmp_path: Path, reranker: FakeReranker, digests: tuple[bytes, ...] = ()) -> Iterator[str]:
    """The address of the page over eight colors and their names."""
    bundle = make_bundle(make_run(tmp_path / "run"))
    stages = Stages(FakeEncoder(), LocalRetriever(filled_engine(bundle)), reranker)
    payload = bundle.payload()
    ids = bundle.run.artifact("pools").read(["item_id"]).column(0).to_pylist()
    tasks, words = query_tasks(bundle.run, payload), item_instructions(payload, ids)
    negatives = read_negatives(bundle.run, None, payload)
    app = build_app(bundle, stages, tasks, words, NoMeter(), digests, negatives=negatives)
    with listening(app) as url:
        yield f"{url}/"


def visit(tmp_path: Path, address: str, steps: Callable[[Page], Awaitable[None]]) -> None:
    async def session() -> None:
        async with browser(tmp_path / "profile") as page:
            await page.size(1280, 900)
            await page.open(address)
            await steps(page)

    asyncio.run(session())


@pytest.fixture
def reranker() -> FakeReranker:
    return FakeReranker()


@pytest.fixture
def address(tmp_path: Path, reranker: FakeReranker) -> Iterator[str]:
    with serving(tmp_path, reranker) as url:
        yield url


async def searching(page: Page, action: Awaitable[None]) -> None:
    """Do something that must start a search, and wait for the answer of one that began after it."""
    asked = "performance.getEntriesByType('resource').filter(e => e.name.endsWith('/v1/search')).length"
    before = await page.run(asked)
    await action
    await page.until(f"{asked} > {before} && {SEARCHED}")


async def captions(page: Page) -> list[str]:
    return await page.run("[...document.querySelectorAll('#results .card')].map(c => c.getAttribute('aria-label'))")


async def hand_over(page: Page, event: str, data: bytes) -> None:
    """A drop or a paste of a picture, as the browser would fire it."""
    script = """(async () => {
        const bytes = Uint8Array.from(atob(DATA), c => c.charCodeAt(0));
        const transfer = new DataTransfer();
        transfer.items.add(new File([bytes], 'p.png', { type: 'image/png' }));
        const init = { bubbles: true, cancelable: true };
        document.body.dispatchEvent(EVENT === 'drop' ? new DragEvent('drop', { ...init, dataTransfer: transfer })
            : new ClipboardEvent('paste', { ...init, clipboardData: transfer }));
    })()"""
    encoded = json.dumps(base64.b64encode(data).decode())
    await page.run(script.replace("DATA", encoded).replace("EVENT", json.dumps(event)))


def test_type_drop_paste_and_click(tmp_path: Path, address: str) -> None:
    async def steps(page: Page) -> None:
        await page.until(f"{CARDS} > 5")
        await page.type("red")
        await searching(page, page.press("Enter"))
        assert await page.run(CARDS) == 12
        assert await page.run("document.querySelectorAll('#results .move.up').length") > 0, "moves are shown"
        await page.until("[...document.images].some(i => i.naturalWidth > 0)")
        await searching(page, page.click("#rerank-label"))
        assert not await page.run("document.querySelector('#results .move')")
        assert "the color red" in " ".join((await captions(page))[:2])
        for event, color in (("drop", "blue"), ("paste", "green")):
            await searching(page, hand_over(page, event, picture(color)))
            assert not await page.run(f"{THUMB}.hidden")
            assert f"the color {color}" in " ".join((await captions(page))[:2])
        shown = await page.run(f"{THUMB}.querySelector('img').src")
        # A card with a picture, and another one than was pasted: its picture becomes the question.
        await searching(page, page.click("#results li:nth-child(n + 4):has(img) .card"))
        assert await page.run(f"{THUMB}.querySelector('img').src") not in ("", shown)
        await page.click("#thumb-remove")
        await page.until(f"{THUMB}.hidden && !document.getElementById('intro').hidden")
        assert page.console == []

    visit(tmp_path, address, steps)


def test_keys_walk_the_results_and_search_with_one(tmp_path: Path, address: str) -> None:
    async def steps(page: Page) -> None:
        await page.until(f"{CARDS} > 5")
        await page.type("red")
        await searching(page, page.press("Enter"))
        await page.press("ArrowDown")
        await page.press("ArrowRight")
        at = "[...document.querySelectorAll('.card')].indexOf(document.activeElement)"
        assert await page.run(at) == 1
        await page.press("ArrowDown")
        assert await page.run(at) > 2
        await page.press("ArrowUp")
        assert await page.run(at) == 1
        before = await page.run(
            "performance.getEntriesByType('resource').filter(e => e.name.endsWith('/search')).length"
        )
        await page.press("r")
        searches = "performance.getEntriesByType('resource').filter(e => e.name.endsWith('/search')).length"
        await page.until(f"{searches} > {before} && !document.querySelector('.busy')")
        assert not await page.run("document.getElementById('rerank').checked")
        await page.press("/")
        assert await page.run("document.activeElement.id") == "text"
        await page.press("Escape")
        await page.until("!document.getElementById('intro').hidden")
        assert await page.run("document.getElementById('text').value") == ""

    visit(tmp_path, address, steps)


def test_the_address_keeps_the_question(tmp_path: Path, address: str) -> None:
    async def steps(page: Page) -> None:
        await page.until(SEARCHED)
        assert await page.run("document.getElementById('text').value") == "red"
        assert await page.run(CARDS) == 6

    visit(tmp_path, f"{address}#q=red&k=6&rerank=1", steps)


def test_a_search_need_not_wait_for_the_server_to_describe_itself(tmp_path: Path, address: str) -> None:
    late = """{ const real = window.fetch; let asked = 0; window.fetch = (url, options) =>
        String(url).endsWith('/v1/info') && asked++ < 2
            ? Promise.resolve(new Response('{"error": {"message": "a stage is starting"}}', { status: 503 }))
            : real(url, options); }"""

    async def session() -> None:
        async with browser(tmp_path / "profile") as page:
            await page.send("Page.addScriptToEvaluateOnNewDocument", source=late)
            await page.open(address)
            await page.type("red")
            await page.press("Enter")
            await page.until(SEARCHED)
            assert await page.run(CARDS) == 12
            await page.until("document.getElementById('status').textContent.includes('items')")
            assert await page.run(CARDS) == 12 and not await page.run("document.querySelector('.busy')")
            assert page.console == []

    asyncio.run(session())


def test_a_training_query_shows_its_hard_negatives(tmp_path: Path, address: str) -> None:
    async def steps(page: Page) -> None:
        await page.until(f"{CARDS} > 5")
        await page.type("red")
        await page.press("Enter")
        await page.until("!document.getElementById('training').hidden")
        badges = "[...document.querySelectorAll('#negatives .move')].map(b => b.textContent)"
        assert await page.run(badges) == ["cycle", "hardest"]
        assert "0.90" in await page.run("document.getElementById('training-note').textContent")
        await page.click("#negatives li:nth-child(1) .card")
        await page.until(f"document.getElementById('training').hidden && {SEARCHED}")
        assert not await page.run("document.getElementById('thumb').hidden"), "it searches with the negative"

    visit(tmp_path, address, steps)


def test_themes_and_a_phone_without_sideways_scrolling(tmp_path: Path, address: str) -> None:
    async def steps(page: Page) -> None:
        await page.prefer(prefers_color_scheme="dark")
        await page.until("document.documentElement.dataset.theme === 'dark'")
        await page.click("#theme")
        assert await page.run("document.documentElement.dataset.theme") == "light"
        await page.size(390, 844, mobile=True, scale=2)
        await page.click("#text")  # the button that was clicked has the focus
        await page.type("red")
        await searching(page, page.press("Enter"))
        await page.run("document.querySelector('#task option').textContent = 'a long instruction '.repeat(9)")
        assert await page.run("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"
        columns = "getComputedStyle(document.getElementById('results')).gridTemplateColumns.split(' ').length"
        assert await page.run(columns) == 2
        await page.screenshot(tmp_path / "phone.png")
        assert (tmp_path / "phone.png").stat().st_size > 10_000

    visit(tmp_path, address, steps)


def test_degraded_and_refused_searches_say_so(tmp_path: Path, address: str, reranker: FakeReranker) -> None:
    reranker.failure = StageOverloaded("reranker")

    async def steps(page: Page) -> None:
        await page.until(f"{CARDS} > 5")
        await page.type("red")
        await page.press("Enter")
        told = await page.until(f"{SEARCHED} && document.getElementById('notice').textContent")
        assert "busy" in told and await page.run(CARDS) == 12
        await page.run("fetch = () => Promise.reject(new Error('no network'))")
        await page.press("Enter")
        await page.until("document.getElementById('notice').textContent.includes('No network')")

    visit(tmp_path, address, steps)


def test_a_guarded_server_asks_for_its_key(tmp_path: Path, reranker: FakeReranker) -> None:
    async def steps(page: Page) -> None:
        await page.until("document.getElementById('key-dialog').open")
        await page.type("secret")
        await page.press("Enter")
        await page.until(f"{CARDS} > 5")
        await page.until("[...document.images].filter(i => i.naturalWidth > 0).length > 2")

    with serving(tmp_path, reranker, key_digests("secret")) as url:
        visit(tmp_path, url, steps)
