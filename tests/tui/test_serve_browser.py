"""``finetui serve`` in a real browser: the page shows the Plan screen, and keys pressed in it arrive."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from finetui.tests.bench.screen import Screen
from finetui.tests.bench.terminal import environment
from finetui.tui.keys import key_of

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Browser:
    """One page of a headless Chromium, told what to do over the Chrome DevTools Protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._last = socket, 0
        self.screen = Screen(1, 1)
        """What the app on the page has been sent, in a terminal of our own."""
        self.asked: list[str] = []
        """Every address the page has asked for."""

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Do one thing; what the page receives meanwhile is taken in."""
        self._last += 1
        await self._socket.send_json({"id": self._last, "method": method, "params": parameters})
        while True:
            if (said := await self._hear()).get("id") == self._last:
                assert "error" not in said, said
                return said["result"]

    async def _hear(self) -> dict[str, Any]:
        said = await self._socket.receive_json(timeout=30)
        if said.get("method") == "Network.webSocketFrameReceived":
            frame = said["params"]["response"]
            if frame["opcode"] == 2:
                self.screen.feed(base64.b64decode(frame["payloadData"]))
        if said.get("method") == "Network.requestWillBeSent":
            self.asked.append(said["params"]["request"]["url"])
        if said.get("method") == "Network.webSocketFrameSent":
            self._sized(said["params"]["response"]["payloadData"])
        return said

    def _sized(self, sent: str) -> None:
        """The page tells the app how large it is."""
        if found := re.search(r'"width": ?(\d+), ?"height": ?(\d+)', sent):
            self.screen.resize(int(found[1]), int(found[2]))

    async def shows(self, *words: str) -> None:
        """Wait until the app shows these words."""
        async with asyncio.timeout(30):
            while not all(word in self.screen.text() for word in words):
                await self._hear()

    async def press(self, key: str) -> None:
        """Press a digit as a person does."""
        for kind in ("keyDown", "keyUp"):
            text = {"text": key} if kind == "keyDown" else {}
            await self.call("Input.dispatchKeyEvent", type=kind, key=key, code=f"Digit{key}",
                            windowsVirtualKeyCode=ord(key), **text)  # fmt: skip

    async def picture(self) -> bytes:
        """The page as PNG, once it has come to rest."""
        before = b""
        for _ in range(40):
            await asyncio.sleep(0.25)
            now = base64.b64decode((await self.call("Page.captureScreenshot"))["data"])
            if now == before:
                return now
            before = now
        raise AssertionError("the page does not come to rest")


@pytest.fixture
async def link(tmp_path: Path) -> AsyncIterator[str]:
    """A server, started as a user starts it."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-P", "-m", "finetui", "serve", "--port", str(port)], text=True,
                              stderr=subprocess.PIPE, env=environment(tmp_path, COLORTERM=""))  # fmt: skip
    assert server.stderr is not None
    first = await asyncio.to_thread(server.stderr.readline)
    assert "http://127.0.0.1" in first, first + server.stderr.read()
    yield first.split()[1]
    server.terminate()
    await asyncio.to_thread(server.wait, 10)


@pytest.fixture
async def open_page(tmp_path: Path) -> AsyncIterator[Callable[[str], Awaitable[Browser]]]:
    """Opens a page in a Chromium of its own."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    profile = tmp_path / "profile"
    chromium = subprocess.Popen(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--window-size=1000,700",
         "--remote-allow-origins=*", f"--user-data-dir={profile}", "about:blank"],
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    async with aiohttp.ClientSession() as session, contextlib.AsyncExitStack() as stack:

        async def open_(link: str) -> Browser:
            told = profile / "DevToolsActivePort"
            async with asyncio.timeout(60):
                while not told.is_file() or "\n" not in told.read_text(encoding="utf-8"):
                    await asyncio.sleep(0.1)
                port = told.read_text(encoding="utf-8").split()[0]
                async with session.get(f"http://127.0.0.1:{port}/json") as answer:
                    page = next(target for target in await answer.json() if target["type"] == "page")
            socket = session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0)
            browser = Browser(await stack.enter_async_context(socket))
            await browser.call("Network.enable")
            await browser.call("Page.enable")
            await browser.call("Emulation.setFocusEmulationEnabled", enabled=True)
            await browser.call("Page.navigate", url=link)
            return browser

        yield open_
    chromium.terminate()
    chromium.wait(10)


async def test_chromium_shows_plan_and_takes_a_key(link: str, open_page: Callable[[str], Awaitable[Browser]]) -> None:
    page = await open_page(link)
    await page.shows("verdict", "fits", "GiB")
    plan = await page.picture()
    await page.press(key_of("runs"))
    await page.shows("runs", "held-out")
    assert await page.picture() != plan, "the page did not change on the screen"
    strangers = [url for url in page.asked if not url.startswith(("http://127.0.0.1:", "data:", "blob:"))]
    assert strangers == [], "nothing but this machine may learn that finetui is at work"
