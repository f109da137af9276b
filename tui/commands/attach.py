"""``finetui attach``: watch a run, from its start, from any terminal."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated

import typer

from ...engine.run import Run, list_runs
from ...planner.errors import RunError
from .options import JsonFlag

PlainFlag = Annotated[bool, typer.Option("--plain", help="Lines instead of the app.")]
RunOrLatest = Annotated[
    str | None, typer.Argument(metavar="[RUN]", help="Name or directory; the latest run if left out.")
]


def attach(run: RunOrLatest = None, plain: PlainFlag = False, as_json: JsonFlag = False) -> None:
    """Watch a run; closing this viewer leaves it running."""
    found = Run.open(run) if run else latest()
    if as_json:
        from ...engine.events import read_events

        for event in read_events(found.events_path):
            print(json.dumps({"seq": event.seq, "time": event.time, "type": event.type, **event.data}))
        return
    from ..terminal import refusal

    if plain or refusal(os.environ, tty=sys.stdin.isatty() and sys.stdout.isatty()):
        from ..watch import watch

        raise typer.Exit(watch(found, plain=plain or None))
    from ..app import run_app

    run_app(mode="monitor", run=found)


def latest() -> Run:
    """The newest run.

    Raises:
        RunError: there is none.
    """
    runs = list_runs()
    if not runs:
        raise RunError("there are no runs", do="Start one with: finetui quickstart")
    return runs[0]
