"""Logs: what each rank of a run prints, and its events as lines, from the start or as they grow."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from textual import on
from textual.app import ComposeResult
from textual.message import Message

from ...engine.events import EventReader
from ...engine.past import Past, glimpse
from ...engine.run import Run
from ...planner.errors import FinetuiError
from ..follower import BATCH
from ..history import History
from ..keys import Key, bindings
from ..watch import lines_of
from ..widgets.lines import Line
from ..widgets.log_view import KEPT, LogView
from ..widgets.run_details import NO_RUNS
from .base import BaseScreen
from .editor import Editor

#: Seconds between looks at a file.
_POLL_S = 0.25
#: Bytes read at a time, and of a file that is larger than this from its end.
_CHUNK, _LARGEST = 1 << 20, 64 << 20
#: Messages waiting for this screen above which the reader pauses.
_BACKLOG = 10


def sources(run: Run) -> list[str]:
    """What can be read of a run: the files in its log folder, then its events."""
    return [*sorted(path.name for path in (run.path / "log").glob("*.log")), "events"]


def file_lines(path: Path) -> Iterator[list[str]]:
    """The whole lines of a file that grows, as they come; an empty list when there is nothing new."""
    offset, rest = 0, b""
    while True:
        try:
            with open(path, "rb") as file:
                size = file.seek(0, 2)
                if size < offset:  # begun anew
                    offset, rest = 0, b""
                if size - offset > _LARGEST:
                    offset, rest = size - _LARGEST, b""
                file.seek(offset)
                chunk = file.read(_CHUNK)
        except OSError:
            yield []
            continue
        offset += len(chunk)
        *whole, rest = (rest + chunk).split(b"\n")
        yield [line.decode("utf-8", "replace") for line in whole]


def event_lines(path: Path) -> Iterator[list[str]]:
    """A run's events as lines, as they come; of a long past, its end."""
    history = History()
    try:
        past = glimpse(path)
    except OSError:  # not written yet
        past = Past([], 0, 0)
    for event in past.events:
        if event.seq < past.exact_from:
            history.apply(event)
    newest = [event for event in past.events if event.seq >= past.exact_from]
    left_out = [f"… the {past.exact_from - 1:,} events before are left out"] if past.exact_from else []
    yield [*left_out, *lines_of(newest, history)]
    reader = EventReader(path, newest[-1].seq if newest else 0, past.offset)
    while True:
        yield list(lines_of(reader.read(BATCH), history))


class LogsScreen(BaseScreen):
    """One log of the run that is watched."""

    SCOPE = "logs"
    BINDINGS = bindings("logs")

    @dataclass
    class Grown(Message):
        """More lines of what ``place`` says."""

        place: tuple[Run, str]
        lines: list[str]

    def __init__(self) -> None:
        super().__init__()
        self._run: Run | None = None
        self._source = ""
        self._ended, self._seen = threading.Event(), threading.Event()

    def body(self) -> ComposeResult:
        """The lines."""
        yield LogView()

    def on_mount(self) -> None:
        """Begin to read."""
        self.query_one(LogView).focus()
        threading.Thread(target=self._follow, daemon=True, name="read logs").start()

    def on_screen_resume(self) -> None:
        """Another run may be watched now."""
        super().on_screen_resume()
        try:
            run = self.owner.watched or next(iter(self.owner.backend.runs()), None)
        except FinetuiError as error:
            run = None
            self.notify(str(error), severity="error")
        if run is not None and (self._run is None or run.path != self._run.path):
            self._read(run, sources(run)[0])
        elif run is None:
            view = self.query_one(LogView)
            view.nothing = NO_RUNS
            view.redraw()
        self._seen.set()

    def on_screen_suspend(self) -> None:
        """Nobody looks."""
        self._seen.clear()

    def on_unmount(self) -> None:
        """End the reading thread."""
        self._ended.set()
        self._seen.set()

    def _read(self, run: Run, source: str) -> None:
        view = self.query_one(LogView)
        view.clear()
        self._run, self._source = run, source
        view.heading = f"{run.name}: {source}"
        view.nothing = ""
        view.redraw()
        self.refresh_bars()

    def _follow(self) -> None:
        place: tuple[Run, str] | None = None
        lines: Iterator[list[str]] = iter(())
        begun = False
        while self._seen.wait() and not self._ended.is_set():
            run, source = self._run, self._source
            if run is None or self.message_queue_size > _BACKLOG:
                self._ended.wait(_POLL_S)
                continue
            if place != (run, source):
                place = (run, source)
                try:
                    self.owner.backend.open(run)
                except FinetuiError as error:
                    self.post_message(self.Grown(place, [f"✘ {error}"]))
                lines = event_lines(run.events_path) if source == "events" else file_lines(run.path / "log" / source)
                begun = False
            found = next(lines)
            if found or not begun:
                begun = True
                self.post_message(self.Grown(place, found[-KEPT:]))
            self._ended.wait(0.01 if found else _POLL_S)

    @on(Grown)
    def _grown(self, message: Grown) -> None:
        if message.place == (self._run, self._source):
            view = self.query_one(LogView)
            view.nothing = "nothing was printed yet"
            view.add(message.lines)

    def keys_shown(self) -> list[Key]:
        """Without a run there is nothing to do here; the next hit needs something to look for."""
        searching = bool(self.query_one(LogView).wanted)
        fitting = {"next(1)": searching}
        if self._run is None:
            return [key for key in super().keys_shown() if key.scope == "app" or key.action == "app.try_it"]
        fitting["app.try_it"] = False
        return [key for key in super().keys_shown() if fitting.get(key.action, True)]

    def status_line(self) -> Line:
        """Which log."""
        return [(f" {self._run.name}: {self._source}" if self._run else " no run", "")]

    # --- keys

    def action_source(self) -> None:
        """The next log of this run."""
        if self._run is None:
            return
        names = sources(self._run)
        at = names.index(self._source) if self._source in names else -1
        self._read(self._run, names[(at + 1) % len(names)])

    def action_follow(self) -> None:
        """Follow the end, or not."""
        view = self.query_one(LogView)
        if view.following:
            view.move(0)
        else:
            view.following = True
            view.redraw()

    def action_search(self) -> None:
        """Ask for a text, and go to the newest line that holds it."""
        view = self.query_one(LogView)

        def done(text: str | None) -> None:
            if text is None:
                return
            view.wanted = text
            view.redraw()
            self.refresh_bars()
            if text and not view.find(-1) and not view.find(1):
                self.notify(f"{text!r} is not in it.", severity="warning")

        self.app.push_screen(Editor("search", view.wanted, hint="Text to find, in any case"), done)

    def action_next(self, direction: int) -> None:
        """Go to the next line that holds what is searched for."""
        if not self.query_one(LogView).find(direction):
            self.notify("No more.", severity="information", timeout=2)

    def action_scroll(self, direction: int) -> None:
        """One line."""
        self.query_one(LogView).move(direction)

    def action_page(self, direction: int) -> None:
        """One page."""
        view = self.query_one(LogView)
        view.move(direction * max(view.rows - 1, 1))

    def action_end(self, direction: int) -> None:
        """To the first line, or the last."""
        self.query_one(LogView).move(direction * KEPT)
