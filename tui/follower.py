"""Follower: reads one run's events in a thread that touches no widget and only hands over what it found.

A short run is handed over event by event. Of a long one there is a picture at once, from its end and from samples of
its past; then a better one, with all that is told seldom; and when every event was read, the exact one. Whoever shows
them replaces the one by the other, and adds what is new in the meantime.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from ..engine.events import Event, EventReader
from ..engine.past import SAMPLED_TYPES, SHORT_BYTES, essentials, glimpse
from ..engine.run import Run
from ..engine.status import Status
from ..planner.errors import FinetuiError, RunError

#: Events handed over at a time, so that the screen stays responsive while it takes in a long run.
BATCH = 2000
#: Bytes before the end of a long file from which on samples of GPUs count: they say what is so now.
_NOW_BYTES = 256 << 10
#: Share of the time that the thread reads the past: the rest belongs to the screen.
_DUTY = 0.5
#: How much more of the past is read before the receiver is told of it.
_SHARE_STEP = 0.02


class Fold(Protocol):
    """What takes in events one by one."""

    def apply(self, event: Event) -> None:
        """Take in one event."""


F = TypeVar("F", bound=Fold)


@dataclass(frozen=True)
class Update(Generic[F]):
    """What is new about a run.

    Attributes:
        source: who found it.
        events: to be added to what is shown, after ``fold`` has replaced it.
        status: the run's state.
        caught_up: there was nothing more to read.
        fold: takes the place of what is shown, or None. It belongs to the receiver from now on.
        share: how much of the run's past has been read for what is shown, 0 to 1; below 1 it was sampled.
    """

    source: Follower[F]
    events: list[Event]
    status: Status
    caught_up: bool
    fold: F | None = None
    share: float = 1.0


class Follower(Generic[F]):
    """Follows a run from its start until :meth:`stop`.

    Args:
        run: the run.
        deliver: called from the thread with each update; must be safe to call from there.
        begin: makes what events are taken in by, for the past of a long run; without it every event is handed over.
        prepare: called first, from the thread, for what must be done before the run can be read.
        busy: whether the receiver is behind, or out of sight; then the thread waits instead of queueing more.
    """

    def __init__(
        self,
        run: Run,
        deliver: Callable[[Update[F]], object],
        *,
        begin: Callable[[], F] | None = None,
        prepare: Callable[[], object] = lambda: None,
        busy: Callable[[], bool] = lambda: False,
        poll_s: float = 0.25,
    ) -> None:
        self.run = run
        self._reader = EventReader(run.events_path)
        self._past: _Past[F] | None = None
        self._deliver, self._begin, self._busy, self._poll_s = deliver, begin, busy, poll_s
        self._prepare = prepare
        self._told: Status | None = None
        self._told_share = 1.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name=f"follow {run.name}", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, without waiting for it."""
        self._ended.set()

    def _follow(self) -> None:
        opened = self._begin is None
        try:
            self._prepare()
        except FinetuiError as error:
            self._deliver(Update(self, [], Status(state="lost", message=error.what, do=error.do), True))
            return
        while not self._ended.is_set():
            if self._busy():
                self._ended.wait(self._poll_s)
                continue
            if not opened:
                opened = True
                self._open()
            events = self._reader.read(BATCH)
            caught_up = len(events) < BATCH
            self._tell(events, caught_up)
            if self._past is not None:
                self._read_past(self._past)
            elif caught_up:
                self._ended.wait(self._poll_s)

    def _tell(self, events: list[Event], caught_up: bool, fold: F | None = None) -> None:
        try:
            status = self.run.status
        except RunError as error:  # deleted while it was watched
            status = Status(state="lost", message=error.what, do=error.do)
        share = self._past.share if self._past is not None else 1.0
        if events or fold is not None or status != self._told or abs(share - self._told_share) >= _SHARE_STEP:
            self._deliver(Update(self, events, status, caught_up, fold, share))
            self._told, self._told_share = status, share

    def _open(self) -> None:
        """Of a long run, hand over what a glimpse shows, then what is told seldom as well."""
        path = self.run.events_path
        try:
            if self._begin is None or path.stat().st_size <= SHORT_BYTES:
                return
            first = glimpse(path)
            self._past = _Past(EventReader(path), self._begin())
            self._reader = EventReader(path, first.events[-1].seq if first.events else 0, first.offset)
            self._tell([], True, _folded(self._begin(), first.events))
            seldom = {event.seq: event for event in essentials(path).events}
        except OSError:  # gone since; the next look at its state says so
            return
        known = {event.seq: event for event in first.events}
        seldom = {seq: event for seq, event in seldom.items() if not known or seq <= first.events[-1].seq}
        both = known | seldom
        self._tell([], True, _folded(self._begin(), [both[seq] for seq in sorted(both)]))

    def _read_past(self, past: _Past[F]) -> None:
        """A little more of the past; when it has come to the present, what was folded of it is the exact one."""
        began = time.monotonic()
        if past.step(self._reader.offset):
            self._reader, self._past = past.reader, None
            self._tell([], True, past.fold)
        else:
            self._ended.wait(min((time.monotonic() - began) * (1 / _DUTY - 1), self._poll_s))


@dataclass
class _Past(Generic[F]):
    """Every event of a long run, taken in from its start in pieces."""

    reader: EventReader
    fold: F
    share: float = 0.0

    def step(self, end: int) -> bool:
        """Take in the next piece; whether all before byte ``end`` has been."""
        skip = SAMPLED_TYPES if self.reader.offset < end - _NOW_BYTES else ()
        events = self.reader.read(BATCH // 4, skip=skip)
        for event in events:
            self.fold.apply(event)
        self.share = min(self.reader.offset / max(end, 1), 1.0)
        return self.reader.offset >= end or not events


def read_whole(run: Run, fold: F) -> F:
    """Take in every event of a run but the old samples of its GPUs, in pieces: a long run does not fit into memory."""
    try:
        end = run.events_path.stat().st_size
    except OSError:
        return fold
    past = _Past(EventReader(run.events_path), fold)
    while not past.step(end):
        pass
    return fold


def _folded(fold: F, events: list[Event]) -> F:
    for event in events:
        fold.apply(event)
    return fold
