"""The reading thread: everything once and in order, patient with a busy screen, gone when told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from finetui.engine.events import EventLog, LogLine
from finetui.engine.run import Run
from finetui.tui.follower import BATCH, Follower, Update


def wait_for(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_everything_once_and_in_order(make_run: Callable[..., Run]) -> None:
    run = make_run("long", [(0.0, LogLine(0, str(n))) for n in range(2 * BATCH + 7)])
    got: list[Update] = []
    follower = Follower(run, got.append, poll_s=0.01)
    follower.start()
    wait_for(lambda: bool(got) and got[-1].caught_up)
    with EventLog(run.events_path) as log:
        log.append(LogLine(0, "last"))
    wait_for(lambda: got[-1].events[-1].data["line"] == "last")
    follower.stop()
    assert [event.seq for update in got for event in update.events] == list(range(1, 2 * BATCH + 9))
    assert max(len(update.events) for update in got) == BATCH


def test_waits_while_the_screen_is_busy_and_ends_when_told(make_run: Callable[..., Run]) -> None:
    busy = threading.Event()
    got: list[Update] = []
    busy.set()
    follower = Follower(make_run("r"), got.append, busy=busy.is_set, poll_s=0.01)
    follower.start()
    time.sleep(0.1)
    assert got == []
    busy.clear()
    wait_for(lambda: bool(got))
    follower.stop()
    wait_for(lambda: not follower._thread.is_alive())
