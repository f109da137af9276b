"""Follower: reads one run's events in a thread that touches no widget and only hands over what it found."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from ..engine.events import Event, EventReader
from ..engine.run import Run, Status
from ..planner.errors import RunError

#: Events handed over at a time, so that the screen stays responsive while it takes in a long run.
BATCH = 2000


@dataclass(frozen=True)
class Update:
    """What is new about a run. ``caught_up``: there was nothing more to read."""

    source: Follower
    events: list[Event]
    status: Status
    caught_up: bool


class Follower:
    """Follows a run from its start until :meth:`stop`.

    Args:
        run: the run.
        deliver: called from the thread with each update; must be safe to call from there.
        busy: whether the receiver is behind, or out of sight; then the thread waits instead of queueing more.
    """

    def __init__(
        self,
        run: Run,
        deliver: Callable[[Update], object],
        *,
        busy: Callable[[], bool] = lambda: False,
        poll_s: float = 0.25,
    ) -> None:
        self.run = run
        self._reader = EventReader(run.events_path)
        self._deliver, self._busy, self._poll_s = deliver, busy, poll_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name=f"follow {run.name}", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, without waiting for it."""
        self._ended.set()

    def _follow(self) -> None:
        told: Status | None = None
        while not self._ended.is_set():
            if self._busy():
                self._ended.wait(self._poll_s)
                continue
            try:
                status = self.run.status
            except RunError as error:  # deleted while it was watched
                status = Status(state="lost", message=error.what, do=error.do)
            events = self._reader.read(BATCH)
            caught_up = len(events) < BATCH
            if events or status != told:
                self._deliver(Update(self, events, status, caught_up))
                told = status
            if caught_up:
                self._ended.wait(self._poll_s)
