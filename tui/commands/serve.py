"""``finetui serve``: the app in a browser, for whoever holds the link. Nothing but this machine can reach it."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated

import typer

from ...planner.errors import MissingExtraError, UserError

PortFlag = Annotated[int, typer.Option("--port", min=1, max=65535, help="Port on localhost.")]


def serve(port: PortFlag = 8000) -> None:
    """Show the app in a browser on this machine. From elsewhere, through: ssh -L 8000:localhost:8000 BOX"""
    try:
        from ..web import LocalServer
    except ImportError as error:
        raise MissingExtraError("serve", "serve") from error
    command = shlex.join([sys.executable, "-P", "-m", "finetui"])
    server = LocalServer(command, port)
    print(f"Open {server.link}\nCtrl-C ends it; runs go on.", file=sys.stderr)
    try:
        server.serve()
    except OSError as error:
        raise UserError(f"port {port} can't be used ({error.strerror})", do="Give another with --port.") from error
