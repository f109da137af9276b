"""GPUs: every offer for this plan: whether it fits, how fast, how long, for how much, and how old the price is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape
from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.containers import Horizontal, VerticalScroll
from textual.coordinate import Coordinate
from textual.message import Message
from textual.widgets import DataTable

from ...planner.errors import FinetuiError
from ...planner.plan import Plan
from .. import format  # noqa: A004
from ..columns import Column, fitting
from ..form import Tree, get, put, recipe_of
from ..keys import Key, bindings
from ..offers import SORTS, Alternative, OfferRow, alternatives, arranged, money, on_machine, price_age
from ..plan_view import verdict
from ..widgets.lines import Line
from ..widgets.offer_details import OfferDetails
from ..widgets.scatter import Scatter
from .base import BaseScreen
from .editor import Confirm, Editor
from .offers_compared import OffersCompared
from .told import Told

_COLUMNS = (
    Column(""),
    Column("GPU", least=14),
    Column("n", right=True),
    Column("memory", right=True, rank=3),
    Column("fit"),
    Column("tok/s", right=True),
    Column("time", right=True, rank=1),
    Column("$/h", right=True),
    Column("$ run", right=True),
    Column("provider", rank=2, least=10),
    Column("age", right=True, rank=4),
)
#: Cells of the table's border, padding and scrollbar.
_FRAME = 5
_ROLES = {"✔": "good", "!": "warn", "✘": "bad"}
#: What job files end with, and whose they are.
_SYSTEMS = {".sky.yaml": "SkyPilot", ".modal.py": "Modal", ".sbatch": "Slurm"}


def cells(row: OfferRow, marked: bool, now: float) -> dict[str, str]:
    """One offer as the text of its columns; ``now`` is what the age of its price is reckoned from."""
    plan = row.plan
    glyph, _ = verdict(plan)
    doubt = "!" if row.over else "?" if row.unproven else ""
    share = plan.memory.device_gib / max(plan.hardware.memory_gib, 1e-9)
    return {
        "": ("*" if marked else " ") + ("◆" if row.best else " "),
        "GPU": row.gpu,
        "n": str(row.count),
        "memory": f"{format.bare_gib(plan.memory.device_gib)}/{format.bare_gib(plan.hardware.memory_gib, 0)}",
        "fit": f"{glyph} {share:.0%}",
        "tok/s": format.rate(plan.speed.tokens_per_s) if plan.fits else "–",
        "time": format.duration(plan.time_s) if plan.fits else "–",
        "$/h": money(row, row.usd_per_h),
        "$ run": money(row, row.usd) + doubt if plan.fits else "–",
        "provider": row.provider,
        "age": "now" if row.local else price_age(row.as_of, now) + ("!" if row.stale else ""),
    }


def _heading(name: str) -> str:
    return format.memory_unit() if name == "memory" else name


class GpusScreen(BaseScreen):
    """The table, the offer under the cursor in words, and all of them by time and money."""

    SCOPE = "gpus"
    BINDINGS = bindings("gpus")

    @dataclass
    class Found(Message):
        """The offers for a draft, or why there are none."""

        draft: Tree
        rows: list[OfferRow]
        error: FinetuiError | None = None

    @dataclass
    class Weighed(Message):
        """What else could be done on one machine."""

        key: str
        others: list[Alternative]

    @dataclass
    class Wrote(Message):
        """A job file is written, with what there is to say about it; or why it is not."""

        target: Path
        lines: Sequence[str] = ()
        error: FinetuiError | None = None

    def __init__(self) -> None:
        super().__init__()
        self._asked: tuple[Tree, bool] | None = None
        self._rows: list[OfferRow] = []
        self._shown: list[OfferRow] = []
        self._others: dict[str, list[Alternative]] = {}
        self._marked: set[str] = set()
        self._widths: dict[str, int] = {}
        self._gap = 1
        self._sort, self._words = next(iter(SORTS)), ""
        self._everything = self._spot = self._only_marked = self._searching = False
        self._priced = ""
        self._error: FinetuiError | None = None

    def body(self) -> ComposeResult:
        """Table above; details and picture below."""
        table: DataTable[object] = DataTable(cursor_type="row", zebra_stripes=False, cell_padding=0, id="offers")
        yield table
        with Horizontal(id="below"):
            with VerticalScroll(id="offer", can_focus=False):
                yield OfferDetails()
            yield Scatter(id="scatter")

    def on_mount(self) -> None:
        """Lay out the columns for this width."""
        self._lay_out()
        self.query_one(DataTable).focus()

    def on_screen_resume(self) -> None:
        """The plan may be another one now."""
        super().on_screen_resume()
        self.query_one(DataTable).focus()
        preferred = repr((self.owner.preferences.prices, self.owner.preferences.providers))
        if preferred != self._priced:  # changed in the settings since
            self._priced, self._asked = preferred, None
            self._spot = self.owner.preferences.prices == "spot"
        self._ask()

    def on_resize(self) -> None:
        """Other columns may fit now."""
        self._fill()

    def _lay_out(self) -> None:
        """Lay the columns out anew if others fit or their widths have changed."""
        now = self.owner.backend.now()
        found, room = [cells(row, False, now) for row in self._rows], self.size.width - _FRAME
        whole = fitting(_COLUMNS, found, 1000)
        gap = 2 if sum(whole.values()) + 2 * len(whole) <= room else 1
        wanted = {name: width + gap for name, width in fitting(_COLUMNS, found, room - gap, gap).items()}
        if wanted == self._widths:
            return
        table = self.query_one(DataTable)
        table.clear(columns=True)
        self._widths, self._gap = wanted, gap
        for column in _COLUMNS:
            if (name := column.name) in wanted:
                table.add_column(self._padded(_heading(name), column), key=name or "marks", width=wanted[name])

    def _padded(self, text: str, column: Column) -> Text:
        """A cell with the space that stands between it and the one before."""
        shown = text if column.right else " " * self._gap + text
        return Text(shown, justify="right" if column.right else "left", no_wrap=True, overflow="ellipsis")

    # --- finding

    def _ask(self) -> None:
        wanted = (self.owner.draft, self._spot)
        if wanted != self._asked:
            self._asked, self._others, self._searching = wanted, {}, True
            self._find(*wanted)
            self._fill()

    @work(thread=True, exclusive=True, group="offers", exit_on_error=False)
    def _find(self, draft: Tree, spot: bool) -> None:
        try:
            rows, error = self.owner.backend.offers(recipe_of(draft), spot), None
        except FinetuiError as caught:
            rows, error = [], caught
        self.post_message(self.Found(draft, rows, error))

    @on(Found)
    def _found(self, message: Found) -> None:
        self._rows, self._error, self._searching = message.rows, message.error, False
        self._marked &= {row.key for row in self._rows}
        self._fill()

    @work(thread=True, exclusive=True, group="alternatives", exit_on_error=False)
    def _weigh(self, draft: Tree, row: OfferRow) -> None:
        def plan_of(tree: Tree) -> Plan:
            return self.owner.backend.plan(recipe_of(tree))

        self.post_message(self.Weighed(row.key, alternatives(draft, row, plan_of)))

    @on(Weighed)
    def _weighed(self, message: Weighed) -> None:
        self._others[message.key] = message.others
        self._show_offer()

    # --- showing

    def _fill(self) -> None:
        table: DataTable[object] = self.query_one(DataTable)
        at = self._current()
        self._lay_out()
        shown = arranged(self._rows, sort=self._sort, everything=self._everything, words=self._words)
        self._shown = [row for row in shown if row.key in self._marked] if self._only_marked else shown
        table.clear()
        for row in self._shown:
            table.add_row(*self._styled(row), key=row.key)
        keys = [row.key for row in self._shown]
        if at is not None and at.key in keys:
            table.move_cursor(row=keys.index(at.key))
        table.border_title = escape(self._title())
        self._show_offer()
        self.refresh_bars()

    def _title(self) -> str:
        if self._error is not None:
            return "offers: none, the plan is not right yet"
        if self._searching:
            return (
                f"offers: looking, these {len(self._rows)} are for the plan before" if self._rows else "offers: looking"
            )
        parts = [f"offers: {len(self._shown)} of {len(self._rows)}", f"by {self._sort}"]
        parts += ["spot prices"] * self._spot + ["marked"] * self._only_marked
        parts += [f"filter {self._words!r}"] * bool(self._words)
        fitting = sum(row.plan.fits for row in self._rows)
        parts += [f"{len(self._rows) - fitting} do not fit"] * (fitting < len(self._rows) and not self._everything)
        return ", ".join(parts)

    def _styled(self, row: OfferRow) -> list[Text]:
        texts, row_cells = [], cells(row, row.key in self._marked, self.owner.backend.now())
        for column in _COLUMNS:
            if (name := column.name) not in self._widths:
                continue
            text = self._padded(row_cells[name], column)
            if name == "fit":
                text.stylize(self.owner.role_style(_ROLES[row_cells[name][0]]))
            elif name == "":
                text.stylize(self.owner.role_style("accent"))
            elif row.stale and name == "age":
                text.stylize("dim")
            texts.append(text)
        return texts

    def _current(self) -> OfferRow | None:
        table = self.query_one(DataTable)
        if not table.row_count:
            return None
        key = table.coordinate_to_cell_key(Coordinate(table.cursor_row, 0)).row_key.value
        return next((row for row in self._shown if row.key == key), None)

    @on(DataTable.RowHighlighted)
    def _highlighted(self) -> None:
        self._show_offer()

    def _show_offer(self) -> None:
        row = self._current()
        others: Sequence[Alternative] = self._others.get(row.key, ()) if row else ()
        self.query_one(OfferDetails).show(row, others, self._nothing())
        self.query_one(Scatter).show(self._rows, row)
        panel = self.query_one("#offer")
        panel.border_title = f"{row.count} × {row.gpu}, {row.provider}" if row else "offer"
        if row is not None and row.key not in self._others and self._asked is not None:
            self._others[row.key] = []
            self._weigh(self._asked[0], row)

    def _nothing(self) -> str:
        """Why there is no offer to show."""
        if self._error is not None:
            return self._error.message
        if self._searching:
            return "planning for every offer…"
        return "no offers to show: f shows those that do not fit, / changes the filter"

    def keys_shown(self) -> list[Key]:
        """Without an offer there is none to use; what is marked can be compared, which comes first then."""
        found, marked = bool(self._shown), len(self._marked)
        fitting = {
            "use": found,
            "mark": found,
            "sort": found,
            "job": found,
            "compare": marked > 1,
            "marked": marked > 0,
        }
        keys = [key for key in super().keys_shown() if key.scope == "app" or fitting.get(key.action, True)]
        return sorted(keys, key=lambda key: key.action != "compare")

    def status_line(self) -> Line:
        """The best offer in one line."""
        row = next(iter(self._shown), None)
        if row is None:
            return [(" no offers", "dim")]
        figures = f"{money(row, row.usd)}, {format.duration(row.plan.time_s)}"
        return [(f" {row.count} × {row.gpu} at {row.provider}: {figures}", "")]

    # --- keys

    @on(DataTable.RowSelected)
    def action_use(self) -> None:
        """Plan for this machine."""
        if (row := self._current()) is not None:
            self._take(on_machine(self.owner.draft, row))

    def action_apply(self, number: int) -> None:
        """Take one of the alternatives, on this machine."""
        row = self._current()
        others = self._others.get(row.key, []) if row else []
        if row is not None and number < len(others):
            chosen = others[number]
            self._take(on_machine(put(self.owner.draft, chosen.key, chosen.value), row))

    def _take(self, draft: Tree) -> None:
        self.owner.edit(draft)
        self.owner.action_mode("plan")

    def action_job(self) -> None:
        """Ask for a file, and write the job that carries out the plan on such a machine into it."""
        row = self._current()
        if row is None:
            return
        endings = [ending for _, ending in self.owner.backend.systems(row.provider)]
        model = get(self.owner.draft, "model").rstrip("/").rpartition("/")[2]
        stem = re.sub(r"[^a-z0-9._]+", "-", f"{model}-{row.gpu}".lower())

        def stem_of(text: str) -> str:
            return next((text.removesuffix(ending) for ending in endings if text.endswith(ending)), text)

        def named(text: str) -> list[str]:
            return [f"{stem_of(text)}{ending}" for ending in endings] if text else []

        def done(text: str | None) -> None:
            target = self.path_of(text if stem_of(text) != text else named(text)[0]) if text else None
            if target is not None:
                self._write_over(target, row)

        nobody = f"SkyPilot and Modal don't rent at {row.provider}: for a Slurm cluster with such GPUs"
        hint = "The ending says what for: " + ", ".join(f"{end} {_SYSTEMS[end]}" for end in endings)
        hint = hint if len(endings) > 1 else nobody
        title = f"write a job for {row.count} × {row.gpu}"
        self.app.push_screen(Editor(title, f"{stem}{endings[0]}", hint=hint, options=named), done)

    def _write_over(self, target: Path, row: OfferRow) -> None:
        """Write a job, after a question where there is a file already."""

        def sure(yes: bool | None) -> None:
            if yes:
                self._write_job(self.owner.draft, row, self._spot, target)

        if target.exists():
            self.app.push_screen(Confirm("write a job", f"{target} is there already. Write over it?"), sure)
        else:
            sure(True)

    @work(thread=True, exclusive=True, group="job", exit_on_error=False)
    def _write_job(self, draft: Tree, row: OfferRow, spot: bool, target: Path) -> None:
        try:
            recipe = recipe_of(on_machine(draft, row))
            self.post_message(self.Wrote(target, self.owner.backend.job(recipe, row.provider, spot, target)))
        except FinetuiError as error:
            self.post_message(self.Wrote(target, error=error))

    @on(Wrote)
    def _wrote(self, message: Wrote) -> None:
        if message.error is not None:
            self.notify(str(message.error), title="no job was written", severity="error", timeout=12)
        else:
            self.app.push_screen(Told(f"written: {message.target}", message.lines))

    def action_sort(self) -> None:
        """Sort by the next figure."""
        names = list(SORTS)
        self._sort = names[(names.index(self._sort) + 1) % len(names)]
        self._fill()

    def action_everything(self) -> None:
        """Show those that do not fit, or hide them."""
        self._everything = not self._everything
        self._fill()

    def action_spot(self) -> None:
        """Interruptible prices, or those on demand."""
        self._spot = not self._spot
        self._ask()

    def action_mark(self) -> None:
        """Mark the offer, and go to the next."""
        if (row := self._current()) is not None:
            self._marked ^= {row.key}
            self._fill()
            self.action_move(1)

    def action_marked(self) -> None:
        """Only the marked offers, or all of them."""
        if not self._marked:
            self.notify("Mark some offers with space first.", severity="warning")
            return
        self._only_marked = not self._only_marked
        self._fill()

    def action_compare(self) -> None:
        """The marked offers side by side."""
        marked = [row for row in self._rows if row.key in self._marked]
        if len(marked) < 2:
            self.notify("Mark two offers or more with space first.", severity="warning")
            return
        marked = arranged(marked, sort=self._sort, everything=True)
        self.app.push_screen(OffersCompared(marked, self.owner.backend.now()))

    def action_filter(self) -> None:
        """Ask for words that provider or GPU must hold."""

        def done(text: str | None) -> None:
            if text is not None:
                self._words = text.strip()
                self._fill()

        self.app.push_screen(Editor("filter", self._words, hint="Words of provider or GPU; empty shows all"), done)

    def action_move(self, direction: int) -> None:
        """Move the cursor."""
        table = self.query_one(DataTable)
        table.move_cursor(row=table.cursor_row + direction)
