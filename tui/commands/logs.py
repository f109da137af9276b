"""``finetui logs``: what the ranks of a run printed, or its events as lines."""

from __future__ import annotations

import codecs
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated

import typer

from ...engine.events import Event, EventReader, line_of, read_events
from ...engine.past import glimpse
from ...engine.run import Run
from ...engine.status import LIVE_STATES
from ...planner.errors import RunError
from ...planner.printable import unstyled
from .options import JsonFlag, RunOrLatest
from .places import HostFlag, the_run

FollowFlag = Annotated[bool, typer.Option("--follow", "-f", help="Go on printing until the run ends.")]
RankFlag = Annotated[int, typer.Option("--rank", help="Which rank.")]
EventsFlag = Annotated[bool, typer.Option("--events", help="The run's events as lines instead of its printed output.")]
LinesFlag = Annotated[int | None, typer.Option("--lines", "-n", help="Only the last N lines.")]


def logs(run: RunOrLatest = None, follow: FollowFlag = False, rank: RankFlag = 0, events: EventsFlag = False,
         lines: LinesFlag = None, host: HostFlag = None, as_json: JsonFlag = False) -> None:  # fmt: skip
    """Print a rank's log. With -f, as it grows; with --json, one object per line; of another machine, its last part."""
    with the_run(run, host) as found:
        if events:
            _events(found, follow, lines, as_json)
        else:
            _printed(found, follow, rank, lines, as_json)


def _printed(run: Run, follow: bool, rank: int, lines: int | None, as_json: bool) -> None:
    path = run.log_path(rank)
    if not path.exists() and not (follow and run.live):
        there = sorted(p.name for p in path.parent.glob("*.log"))
        raise RunError(f"rank {rank} has no log", where=str(path), do=f"There is: {', '.join(there) or 'nothing yet'}.")
    offset = 0
    decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
    write = _objects(rank) if as_json else sys.stdout.write
    while True:
        ended = run.status.state not in LIVE_STATES  # asked before reading, so that the last lines are not missed
        if path.exists():
            first = offset == 0
            with open(path, "rb") as file:
                file.seek(offset)
                chunk = file.read()
                offset += len(chunk)
            if first and lines is not None:
                chunk = b"".join(chunk.splitlines(keepends=True)[-lines:] if lines else [])
            write(unstyled(decode(chunk)))
            sys.stdout.flush()
        if not follow or ended:
            return
        time.sleep(0.25)


def _objects(rank: int) -> Callable[[str], object]:
    """Writes text line by line as JSON; a line that is not whole yet waits for its end."""
    rest = ""

    def write(text: str) -> None:
        nonlocal rest
        *whole, rest = (rest + text).split("\n")
        for line in whole:
            print(json.dumps({"rank": rank, "line": line}, ensure_ascii=False))

    return write


def _events(run: Run, follow: bool, lines: int | None, as_json: bool) -> None:
    if follow:
        if as_json:
            raise RunError("--json prints the events so far", do="Leave out --follow, or --json.")
        from ..watch import watch

        raise typer.Exit(watch(run, plain=True))
    from ..history import History
    from ..watch import lines_of

    history = History()
    show = _json_lines if as_json else lambda events: lines_of(events, history)
    if lines is not None:
        newest = deque(_newest(run, lines, show), maxlen=lines)
        print("".join(f"{line}\n" for line in newest), end="")
        return
    reader = EventReader(run.events_path)
    while events := reader.read(1000):  # a long run does not fit into memory
        print("".join(f"{line}\n" for line in show(events)), end="")


def _newest(run: Run, lines: int, show: Callable[[list[Event]], Iterable[str]]) -> list[str]:
    """At least the newest lines: those of the end of the file, or of all of it where that is not enough."""
    past = glimpse(run.events_path)
    end = [event for event in past.events if event.seq >= past.exact_from]
    if past.exact_from == 0 or len(end) >= lines:
        return list(show(past.events))
    return list(show(read_events(run.events_path)))


def _json_lines(events: list[Event]) -> Iterator[str]:
    return map(line_of, events)
