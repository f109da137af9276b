"""The app behind a web server that only this machine and only the holder of a token can use.

textual-serve starts one app process per browser window and asks nobody who they are. In front of it stand three
checks: the server listens on the loopback address alone; the ``Host`` header must name it, so that no other site's
name can be pointed here (DNS rebinding); and every request needs the token, once in the link, then as a cookie that
scripts can't read and other sites don't send.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from textual_serve.server import Server

HOST = "127.0.0.1"
_NAMES = frozenset({HOST, "localhost"})
_COOKIE = "finetui-token"

#: textual-serve's own page asks Google for a font, and takes no key before it has been clicked.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>finetui</title>
<link rel="stylesheet" href="/static/css/xterm.css">
<style>
@font-face { font-family: "Roboto Mono"; src: url("/static/fonts/RobotoMono-VariableFont_wght.ttf"); }
body { margin: 0; background: #14171c; color: #d3d7de; font-family: "Roboto Mono", monospace; }
#closed { display: none; padding: 2em; }
body.-closed #closed { display: block; }
body.-closed #terminal { display: none; }
</style>
<script src="/static/js/textual.js"></script>
<script>
document.addEventListener("DOMContentLoaded", () => new MutationObserver((_, watch) => {
  const keys = document.querySelector("#terminal textarea");
  if (keys && document.body.classList.contains("-first-byte")) { keys.focus(); watch.disconnect(); }
}).observe(document.body, {attributes: true, childList: true, subtree: true}));
</script>
</head>
<body>
<div id="closed">finetui has ended here; runs go on. <a href="/">Open it again</a></div>
<div id="terminal" class="textual-terminal" data-session-websocket-url="ws://%s/ws" data-font-size="16"></div>
</body>
</html>
"""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class LocalServer(Server):
    """textual-serve's server behind the checks above.

    Args:
        command: starts the app.
        port: where to listen on the loopback address.
    """

    def __init__(self, command: str, port: int) -> None:
        super().__init__(command, host=HOST, port=port, title="finetui", public_url=f"http://{HOST}:{port}")
        self.token = secrets.token_urlsafe(24)

    def initialize_logging(self) -> None:
        """Warnings alone: a log of requests would hold the token."""
        logging.basicConfig(level=logging.WARNING)

    @property
    def link(self) -> str:
        """What to open."""
        return f"{self.public_url}/?token={self.token}"

    async def _make_app(self) -> web.Application:
        app = await super()._make_app()
        app.middlewares.append(self._admit)
        return app

    async def handle_index(self, request: web.Request) -> web.Response:
        """The page with the terminal."""
        return web.Response(text=_PAGE % f"{HOST}:{self.port}", content_type="text/html")

    async def on_startup(self, app: web.Application) -> None:
        """Say nothing: whoever started the server has told where it is."""

    @property
    def _admit(self) -> Any:
        @web.middleware
        async def admit(request: web.Request, handler: Handler) -> web.StreamResponse:
            if request.url.host not in _NAMES:
                raise web.HTTPForbidden(text="This server answers to localhost alone.")
            given = request.query.get("token", "") or request.cookies.get(_COOKIE, "")
            if not secrets.compare_digest(given.encode(), self.token.encode()):
                raise web.HTTPForbidden(text="Open the link that finetui serve printed: it holds the token.")
            response = await handler(request)
            if "token" in request.query and not response.prepared:
                response.set_cookie(_COOKIE, self.token, httponly=True, samesite="Strict")
            return response

        return admit
