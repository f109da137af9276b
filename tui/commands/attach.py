"""``finetui attach``: watch a run, from its start, from any terminal, on this machine or on another one."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from ...engine.run import Run
from .options import JsonFlag, RunOrLatest
from .places import HostFlag, latest, runs_of

PlainFlag = Annotated[bool, typer.Option("--plain", help="Lines instead of the app.")]


def attach(run: RunOrLatest = None, host: HostFlag = None, plain: PlainFlag = False, as_json: JsonFlag = False) -> None:
    """Watch a run; closing this viewer leaves it running. --json prints its events so far, one per line."""
    if host is None:
        raise typer.Exit(_watch(latest() if run is None else Run.open(run), plain=plain, as_json=as_json))
    with runs_of(host) as remote:
        found = remote.open(remote.host.open(run))
        raise typer.Exit(_watch(found, plain=plain, as_json=as_json, backend=remote.backend()))


def _watch(run: Run, *, plain: bool, as_json: bool, backend: object = None) -> int:
    if as_json:
        from ...engine.events import EventReader, line_of

        reader = EventReader(run.events_path)
        while events := reader.read(1000):  # a long run does not fit into memory
            for event in events:
                print(line_of(event))
        return 0
    from ..terminal import refusal

    if plain or refusal(os.environ, tty=sys.stdin.isatty() and sys.stdout.isatty()):
        from ..watch import watch

        return watch(run, plain=plain or None)
    from ..app import run_app

    run_app(mode="monitor", run=run, backend=backend)  # type: ignore[arg-type]
    return 0
