"""``finetui serve``: the app through a real server and a real websocket, and who is kept out."""

from __future__ import annotations

import asyncio
import os
import shlex
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from finetui.tui.web import HOST, LocalServer


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[LocalServer]:
    root = str(Path(sys.modules["finetui"].__path__[0]).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, *filter(None, sys.path)]))
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    served = LocalServer(shlex.join([sys.executable, "-P", "-m", "finetui"]), port)
    runner = web.AppRunner(await served._make_app())
    await runner.setup()
    await web.TCPSite(runner, HOST, port).start()
    yield served
    await runner.cleanup()


async def read_until(socket: Any, word: bytes, *, seconds: float = 20.0) -> None:
    seen = b""
    async with asyncio.timeout(seconds):
        while word not in seen:
            message = await socket.receive()
            assert message.type in (aiohttp.WSMsgType.BINARY, aiohttp.WSMsgType.TEXT), message
            seen += message.data if isinstance(message.data, bytes) else message.data.encode()


async def test_the_app_answers_keys_in_a_browser(server: LocalServer) -> None:
    jar = aiohttp.CookieJar(unsafe=True)  # a browser keeps cookies of an address too
    async with aiohttp.ClientSession(cookie_jar=jar) as browser:
        async with browser.get(server.link) as page:
            assert page.status == 200
            assert "ws://127.0.0.1" in await page.text()
        async with browser.ws_connect(f"{server.public_url}/ws?width=100&height=30") as terminal:
            await read_until(terminal, b"verdict")
            await terminal.send_json(["stdin", "?"])
            await read_until(terminal, b"A field of a form")


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/", {}),
        ("/?token=guess", {}),
        ("/ws", {"Cookie": "finetui-token=guess"}),
        ("/static/js/textual.js", {}),
        ("/?token={token}", {"Host": "evil.example"}),
    ],
)
async def test_who_is_kept_out(server: LocalServer, path: str, headers: dict[str, str]) -> None:
    async with aiohttp.ClientSession() as stranger:
        url = server.public_url + path.format(token=server.token)
        async with stranger.get(url, headers=headers) as answer:
            assert answer.status == 403


async def test_the_token_is_new_each_time_and_no_script_reads_it(server: LocalServer) -> None:
    assert LocalServer("true", 1).token != server.token
    async with aiohttp.ClientSession() as browser, browser.get(server.link) as page:
        cookie = page.headers["Set-Cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
