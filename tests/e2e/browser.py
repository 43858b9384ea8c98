"""Headless Chromium over its DevTools protocol: what a test of the page needs, and no driver to install."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)
WAIT_SECONDS = 60.0
"""For anything: a machine under load is slow, and what never happens fails all the same."""
MIDDLE = """async (selector) => {
    const element = document.querySelector(selector);
    if (!element) return null;
    element.scrollIntoView({ block: 'center', behavior: 'instant' });
    const frame = () => new Promise((resolve) => requestAnimationFrame(resolve));
    await frame();
    const before = element.getBoundingClientRect();
    await frame();
    const box = element.getBoundingClientRect();
    const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
    const still = box.x === before.x && box.y === before.y && box.width && box.height;
    return still && element.contains(document.elementFromPoint(x, y)) ? [x, y] : null;
}"""
"""The middle of an element; null while it is not there, moves, or is covered by something else."""


class Page:
    """One tab. Every method awaits what it does."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._number = 0
        self.console: list[str] = []
        """Errors the page has logged or thrown."""

    async def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol and its result."""
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            message = await asyncio.wait_for(self._socket.receive_json(), WAIT_SECONDS)
            self._note(message)
            if message.get("id") == self._number:
                if "error" in message:
                    raise AssertionError(f"{method}: {message['error']}")
                return message["result"]

    def _note(self, message: dict[str, Any]) -> None:
        parameters = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            self.console.append(details.get("exception", {}).get("description", details["text"]))
        if message.get("method") == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.console.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")

    async def open(self, url: str) -> None:
        await self.send("Page.navigate", url=url)
        await self.until("location.href !== 'about:blank' && document.readyState === 'complete'")

    async def run(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        answer = await self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise AssertionError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    async def until(self, script: str, seconds: float = WAIT_SECONDS) -> Any:
        """Wait until a JavaScript expression is true; returns its value."""
        ends = time.monotonic() + seconds
        while not (value := await self.run(script)):
            if time.monotonic() > ends:
                raise AssertionError(f"not true in {seconds:g} s: {script}; the page logged {self.console}")
            await asyncio.sleep(0.05)
        return value

    async def type(self, text: str) -> None:
        """Type into the field that has the focus; the page may give it only with its first frame."""
        await self.until("document.activeElement?.matches('input, textarea')")
        await self.send("Input.insertText", text=text)

    async def press(self, key: str, code: str | None = None) -> None:
        """Press a key: a character, or a named one like Enter or ArrowDown."""
        codes = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        extra: dict[str, Any] = {"windowsVirtualKeyCode": codes.get(key, ord(key[0].upper()))}
        if key == "Enter":
            extra["text"] = "\r"
        elif len(key) == 1:
            extra["text"] = key
        await self.send("Input.dispatchKeyEvent", type="keyDown", key=key, code=code or key, **extra)
        await self.send("Input.dispatchKeyEvent", type="keyUp", key=key, code=code or key)

    async def click(self, selector: str) -> None:
        """A real mouse click in the middle of an element, once it stands still there with nothing over it."""
        x, y = await self.until(f"({MIDDLE})({json.dumps(selector)})")
        for kind in ("mousePressed", "mouseReleased"):
            await self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    async def size(self, width: int, height: int, *, mobile: bool = False, scale: float = 1.0) -> None:
        await self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=mobile
        )

    async def prefer(self, **features: str) -> None:
        """Media features, e.g. `prefers_color_scheme="dark"`."""
        given = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        await self.send("Emulation.setEmulatedMedia", features=given)

    async def screenshot(self, path: Path) -> None:
        answer = await self.send("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(answer["data"]))


@contextlib.asynccontextmanager
async def browser(profile: Path) -> AsyncIterator[Page]:
    """Chromium with one empty tab; ended (only this one) on the way out."""
    assert CHROMIUM is not None, "ask for CHROMIUM first"
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    command = [CHROMIUM, *options, "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port = await _port(profile / "DevToolsActivePort", process)
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                targets = await answer.json()
            address = next(target["webSocketDebuggerUrl"] for target in targets if target["type"] == "page")
            async with session.ws_connect(address, max_msg_size=0) as socket:
                page = Page(socket)
                for domain in ("Page", "Runtime", "Log"):
                    await page.send(f"{domain}.enable")
                yield page
    finally:
        process.terminate()
        process.wait(10)


async def _port(file: Path, process: subprocess.Popen) -> int:
    for _ in range(int(WAIT_SECONDS * 10)):
        if file.is_file() and (text := file.read_text().split()):
            return int(text[0])
        assert process.poll() is None, "chromium ended at once"
        await asyncio.sleep(0.1)
    raise AssertionError("chromium did not open its DevTools port")
