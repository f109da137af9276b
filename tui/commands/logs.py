"""``finetui logs``: what the ranks of a run printed."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from ...engine.run import LIVE_STATES, Run
from ...planner.errors import RunError
from .options import RunArgument

FollowFlag = Annotated[bool, typer.Option("--follow", "-f", help="Go on printing until the run ends.")]
RankFlag = Annotated[int, typer.Option("--rank", help="Which rank.")]
EventsFlag = Annotated[bool, typer.Option("--events", help="The run's events as lines instead of its printed output.")]
LinesFlag = Annotated[int | None, typer.Option("--lines", "-n", help="Only the last N lines.")]


def logs(run: RunArgument, follow: FollowFlag = False, rank: RankFlag = 0, events: EventsFlag = False,
         lines: LinesFlag = None) -> None:  # fmt: skip
    """Print a rank's log; with -f, as it grows."""
    found = Run.open(run)
    if events:
        _events(found, follow)
        return
    path = found.log_path(rank)
    if not path.exists() and not (follow and found.live):
        there = sorted(p.name for p in path.parent.glob("*.log"))
        raise RunError(f"rank {rank} has no log", where=str(path), do=f"There is: {', '.join(there) or 'nothing yet'}.")
    offset = 0
    first = True
    while True:
        ended = found.status.state not in LIVE_STATES  # asked before reading, so that the last lines are not missed
        if path.exists():
            with open(path, "rb") as file:
                file.seek(offset)
                chunk = file.read()
                offset += len(chunk)
            if first and lines is not None:
                chunk = b"".join(chunk.splitlines(keepends=True)[-lines:] if lines else [])
            first = False
            sys.stdout.buffer.write(chunk)
            sys.stdout.flush()
        if not follow or ended:
            return
        time.sleep(0.25)


def _events(run: Run, follow: bool) -> None:
    from ..watch import lines_of, watch

    if follow:
        raise typer.Exit(watch(run, plain=True))
    from ...engine.events import read_events
    from ..history import History

    for line in lines_of(read_events(run.events_path), History()):
        print(line)
