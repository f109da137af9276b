"""Runs: every run of this machine and this user, live ones included, and why each one ended."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

from rich.markup import escape
from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.coordinate import Coordinate
from textual.message import Message
from textual.widgets import DataTable

from ...planner.errors import FinetuiError, RecipeError
from .. import format  # noqa: A004
from ..keys import Key, bindings
from ..run_table import SORTS, RunRow, RunScanner, arranged
from ..widgets.lines import Line
from ..widgets.run_details import RunDetails
from ..widgets.run_header import STATE_ROLES, state_span
from . import actions
from .base import BaseScreen
from .editor import Editor

#: States from which a run can go on.
RESUMABLE = ("stopped", "failed", "lost")
#: Seconds between scans.
SCAN_S = 1.0

#: Heading, whether right-aligned, and the least width of the terminal at which the column is shown.
_COLUMNS = (
    ("state", False, 0),
    ("name", False, 0),
    ("step", True, 0),
    ("loss", True, 0),
    ("held-out", True, 68),
    ("tok/s", True, 112),
    ("time", True, 96),
    ("cost", True, 96),
    ("on", False, 140),
    ("when", True, 122),
)
#: Cells of each column; the name takes what is left.
_WIDTHS = {
    "state": 15, "step": 11, "loss": 6, "held-out": 8, "tok/s": 7, "time": 10, "cost": 6, "on": 14, "when": 8,
}  # fmt: skip


def cells(row: RunRow, now: float, marked: bool = False) -> dict[str, str]:
    """One run as the text of its columns."""
    state, _ = state_span(row.state, row.cause)
    when = "now" if row.live else format.ago(row.when, now).removesuffix(" ago")
    return {
        "state": state,
        "name": f"* {row.run.name}" if marked else row.run.name,
        "step": f"{row.step:,}/{row.steps:,}" if row.steps else f"{row.step:,}",
        "loss": format.loss(row.loss) if row.step else "–",
        "held-out": _figure(row.best, "{:.4f}".format),
        "tok/s": _figure(row.tokens_per_s, format.rate),
        "time": format.duration(row.elapsed_s) if row.elapsed_s else "–",
        "cost": format.usd(row.cost_usd),
        "on": row.place,
        "when": when,
    }


def _figure(value: float, show: object) -> str:
    return show(value) if math.isfinite(value) else "–"  # type: ignore[operator]


class RunsScreen(BaseScreen):
    """The table and the details of the run under the cursor."""

    SCOPE = "runs"
    BINDINGS = bindings("runs")

    @dataclass
    class Scanned(Message):
        """The runs as they are now."""

        rows: list[RunRow]

    def __init__(self) -> None:
        super().__init__()
        self._rows: dict[str, RunRow] = {}
        self._shown: dict[str, dict[str, str]] = {}
        self._sort, self._words = next(iter(SORTS)), ""
        self._columns: list[str] = []
        self._laid_out: dict[str, int] = {}
        self._ended, self._seen = threading.Event(), threading.Event()

    def body(self) -> ComposeResult:
        """Table above, details below."""
        table: DataTable[str] = DataTable(cursor_type="row", zebra_stripes=False, id="runs")
        table.border_title = "runs"
        yield table
        with VerticalScroll(id="details", can_focus=False) as panel:
            panel.border_title = "details"
            yield RunDetails()

    def on_mount(self) -> None:
        """Lay out the columns for this width, and begin to look for runs."""
        self._lay_out()
        self.query_one(DataTable).focus()
        threading.Thread(target=self._scan, daemon=True, name="scan runs").start()

    def on_screen_resume(self) -> None:
        """Look for runs again, and keep looking."""
        super().on_screen_resume()
        self._seen.set()

    def on_screen_suspend(self) -> None:
        """Nobody looks: stop looking for runs."""
        self._seen.clear()

    def on_unmount(self) -> None:
        """End the scanning thread."""
        self._ended.set()
        self._seen.set()

    def _scan(self) -> None:
        scanner = RunScanner(self.owner.backend.runs, self.owner.backend.now)
        told = ""
        while self._seen.wait() and not self._ended.is_set():
            try:
                self.post_message(self.Scanned(scanner.scan()))
                told = ""
            except FinetuiError as error:  # another machine that can't be reached now
                if told != str(error):
                    told = str(error)
                    self.owner.notify(told, severity="error")
            self._ended.wait(SCAN_S / self.owner.preferences.refresh_hz)

    def on_resize(self) -> None:
        """Other columns may fit now, and more of a name; the cursor stays on its run."""
        columns = [name for name, _, least in _COLUMNS if self.size.width >= least]
        if columns != self._columns or self._widths() != self._laid_out:
            at = self._current_key()
            self._lay_out()
            self._fill()
            if at in self._shown:
                self.query_one(DataTable).move_cursor(row=list(self._shown).index(at))

    def _lay_out(self) -> None:
        table = self.query_one(DataTable)
        table.clear(columns=True)
        self._shown.clear()
        self._columns = [name for name, _, least in _COLUMNS if self.size.width >= least]
        self._laid_out = self._widths()
        for name, right, least in _COLUMNS:
            if self.size.width >= least:
                heading = Text(name, justify="right" if right else "left")
                table.add_column(heading, key=name, width=self._widths()[name])

    def _widths(self) -> dict[str, int]:
        used = 2 + sum(width + 2 for name, width in _WIDTHS.items() if name in self._columns)
        return {**_WIDTHS, "name": min(max(self.size.width - 5 - used, 12), 44)}

    @on(Scanned)
    def _scanned(self, message: Scanned) -> None:
        self._rows = {str(row.run.path): row for row in message.rows}
        self._fill()

    def _fill(self) -> None:
        """Bring the table up to date: only cells that differ are touched."""
        table: DataTable[object] = self.query_one(DataTable)
        now = self.owner.backend.now()
        marked = {str(run.path) for run in self.owner.marked}
        chosen = [str(row.run.path) for row in arranged(self._rows.values(), sort=self._sort, words=self._words)]
        wanted = {key: cells(self._rows[key], now, key in marked) for key in chosen}
        order, at = list(wanted), self._current_key()
        for key in [key for key in self._shown if key not in wanted]:
            table.remove_row(key)
            del self._shown[key]
        if list(self._shown) != order:  # a new run belongs on top, and rows can only be added below
            self._shown.clear()
            table.clear()
        for key in [key for key in order if key not in self._shown]:
            table.add_row(*(self._styled(wanted[key], name, self._rows[key]) for name in self._columns), key=key)
            self._shown[key] = wanted[key]
        if at in order and self._current_key() != at:
            table.move_cursor(row=order.index(at))
        for key, row in wanted.items():
            for name in self._columns:
                if self._shown[key].get(name) != row[name]:
                    table.update_cell(key, name, self._styled(row, name, self._rows[key]))
            self._shown[key] = row
        table.border_title = escape(self._title())
        self._show_details()

    def _title(self) -> str:
        if not self._rows:
            return "runs"
        number, live = len(self._rows), sum(row.live for row in self._rows.values())
        parts = [f"runs: {len(self._shown)} of {number}" if self._words else f"runs: {number}", f"{live} live"]
        parts += [f"by {self._sort}"] * (self._sort != next(iter(SORTS)))
        return ", ".join([*parts, *([f"filter {self._words!r}"] if self._words else [])])

    def _styled(self, row: dict[str, str], name: str, source: RunRow) -> object:
        right = next(align for column, align, _ in _COLUMNS if column == name)
        text = Text(row[name], justify="right" if right else "left", no_wrap=True, overflow="ellipsis")
        if name == "state":
            text.stylize(self.owner.role_style(STATE_ROLES.get(source.state, "")))
        return text

    def _current_key(self) -> str | None:
        table = self.query_one(DataTable)
        if not table.row_count:
            return None
        return str(table.coordinate_to_cell_key(Coordinate(table.cursor_row, 0)).row_key.value)

    def _current(self) -> RunRow | None:
        key = self._current_key()
        return self._rows.get(key) if key else None

    @on(DataTable.RowHighlighted)
    def _show_details(self) -> None:
        row = self._current()
        hidden = f"no run has {self._words!r} in it: / changes the filter" if self._rows and row is None else ""
        self.query_one(RunDetails).show(row, self.owner.backend.now(), hidden)
        self.query_one("#details").border_title = f"details: {row.run.name}" if row else "details"
        self.refresh_bars()

    def keys_shown(self) -> list[Key]:
        """What can be done depends on the run under the cursor, and on whether there are others."""
        row, several = self._current(), len(self._rows) > 1
        live = row is not None and row.live
        fitting = {"stop": live, "resume": row is not None and row.state in RESUMABLE, "delete": not live}
        fitting |= {"mark": several, "compare": several, "sort": several, "filter": several}
        fitting["app.try_it"] = not self._rows
        keys = [key for key in super().keys_shown() if key.scope == "app" or fitting.get(key.action, True)]
        return keys if row is not None else [key for key in keys if key.scope == "app" or key.action in self._always()]

    def _always(self) -> tuple[str, ...]:
        """Keys that mean something where no run is under the cursor."""
        return ("filter",) if self._rows else ("app.try_it",)

    def status_line(self) -> Line:
        """How many runs, how many live."""
        live = [row for row in self._rows.values() if row.live]
        names = ", ".join(f"{row.run.name} {row.step:,}/{row.steps:,}" for row in live)
        return [(f" {len(self._rows)} runs, {len(live)} live  {names}", "")]

    # --- keys

    @on(DataTable.RowSelected)
    def action_watch(self) -> None:
        """Open the run in Monitor."""
        row = self._current()
        if row is not None:
            self.owner.watched = row.run
            self.owner.action_mode("monitor")

    def action_move(self, direction: int) -> None:
        """Move the cursor."""
        table = self.query_one(DataTable)
        table.move_cursor(row=table.cursor_row + direction)

    def action_mark(self) -> None:
        """Mark the run, or not, and go to the next."""
        if (row := self._current()) is None:
            return
        path, marked = row.run.path, self.owner.marked
        kept = [run for run in marked if run.path != path]
        self.owner.marked = kept if len(kept) < len(marked) else [*marked, row.run]
        self._fill()
        self.action_move(1)

    def action_compare(self) -> None:
        """Compare the marked runs."""
        if len(self.owner.marked) == 1 and (row := self._current()) is not None:
            self.owner.marked = [*self.owner.marked, *([row.run] if row.run.path != self.owner.marked[0].path else [])]
        self.owner.action_mode("compare")

    def action_sort(self) -> None:
        """Sort by the next figure."""
        names = list(SORTS)
        self._sort = names[(names.index(self._sort) + 1) % len(names)]
        self._fill()

    def action_filter(self) -> None:
        """Ask for words that a run must have."""

        def done(text: str | None) -> None:
            if text is not None:
                self._words = text.strip()
                self._fill()

        hint = "Words of name, state, model, tuning or GPU; empty shows all"
        self.app.push_screen(Editor("filter", self._words, hint=hint), done)

    def action_logs(self) -> None:
        """Read the run's logs."""
        if (row := self._current()) is not None:
            self.owner.watched = row.run
            self.owner.action_mode("logs")

    def action_stop(self) -> None:
        """Write a checkpoint and end the run."""
        if (row := self._current()) is not None:
            actions.stop(self.owner, row.run)

    def action_resume(self) -> None:
        """Go on from the last checkpoint."""
        if (row := self._current()) is not None:
            actions.resume(self.owner, row.run)

    def action_delete(self) -> None:
        """Delete the run."""
        if (row := self._current()) is None:
            return
        if row.live:
            self.notify("The run is at work: stop it first.", title="not deleted", severity="warning")
            return
        actions.delete(self.owner, row.run)

    def action_copy(self) -> None:
        """Copy the run's path."""
        if (row := self._current()) is not None:
            self.app.copy_to_clipboard(str(row.run.path))
            self.notify(str(row.run.path), title="copied")

    def action_reuse(self) -> None:
        """Plan the run's recipe again."""
        if (row := self._current()) is None:
            return
        try:
            self.owner.open_recipe(row.run.path / "recipe.yaml")
        except RecipeError as error:
            self.notify(str(error), title="not opened", severity="error")
            return
        self.owner.recipe_path = None
        self.owner.action_mode("plan")
