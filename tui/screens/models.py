"""Models: what can be tuned on the GPU that is planned for, to choose a model from."""

from __future__ import annotations

from collections.abc import Callable

from rich.markup import escape
from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import DataTable, Static

from ...planner.errors import FinetuiError
from ...planner.fit import TUNINGS
from .. import format  # noqa: A004
from ..columns import Column, fitting
from ..model_list import SORTS, ModelList, ModelRow, count_fitting, glyph, listed
from ..widgets.lines import Line, Lines
from .editor import Editor

_COLUMNS = (
    Column("model", least=30), Column("size", right=True), *(Column(tuning, right=True) for tuning in TUNINGS),
    Column("tok/s", right=True, rank=1), Column("rows to", right=True, rank=2),
)  # fmt: skip
_ROLES = {"✔": "good", "!": "warn", "✘": "bad"}
#: Cells of the dialog's border, padding and scrollbar, and between two columns.
_FRAME, _GAP = 6, 2


def cells(row: ModelRow, tuning: str) -> dict[str, str]:
    """One model as the text of its columns: the GiB of each tuning that fits, and the speed of the one to be taken."""
    best = row.best(tuning)
    figures = {
        name: f"{glyph(fit)} {format.bare_gib(fit.device_gib)}" if fit is not None and fit.fits else "–"
        for name, fit in ((name, row.fits.get(name)) for name in TUNINGS)
    }
    return {
        "model": row.name,
        "size": format.count(row.parameters),
        **figures,
        "tok/s": format.rate(best.tokens_per_s) if best else "–",
        "rows to": f"{row.longest:,}" if row.longest else "–",
    }


class ModelFacts(Lines):
    """The model under the cursor in two lines."""

    def __init__(self) -> None:
        super().__init__(id="model-facts")
        self._row: ModelRow | None = None
        self._memory_gib, self._tuning = 0.0, ""

    def show(self, row: ModelRow | None, memory_gib: float, tuning: str) -> None:
        """Draw a model on a GPU of so much memory."""
        self._row, self._memory_gib, self._tuning = row, memory_gib, tuning
        self.redraw()

    def draw(self, width: int, height: int) -> list[Line]:
        """See :class:`Lines`."""
        row = self._row
        if row is None:
            return []
        active = f", {format.count(row.active)} at work per token" if row.active < row.parameters else ""
        head: Line = [(row.name, "bold"), (f"  {format.count(row.parameters)} parameters{active}", "dim")]
        fit = row.best(self._tuning)
        if fit is None:
            least = min((one.device_gib for one in row.fits.values()), default=0.0)
            return [head, [(f"✘ needs {format.gib_of(least, self._memory_gib)} at least", "bad")]]
        taken = f"{glyph(fit)} {fit.tuning}  "
        words = [format.gib_of(fit.device_gib, self._memory_gib), fit.optimizer, f"checkpointing {fit.checkpointing}"]
        if (price := fit.usd_per_million_tokens) is not None:
            words.append(f"${price:.3f}/M tokens")
        for least in words[2:0:-1]:  # rather than cut what comes last
            if len(taken) + len(", ".join(words)) > width:
                words.remove(least)
        return [head, [(taken, _ROLES[glyph(fit)]), (", ".join(words), "")]]


class Models(ModalScreen[ModelRow | None]):
    """The list in a box; gives back the model that was chosen.

    Args:
        find: makes the list, in a thread.
        tuning: that of the draft.
    """

    BINDINGS = [  # noqa: RUF012
        ("escape,q,b", "dismiss(None)", "Close"),
        ("s", "sort", "Sort"),
        ("f", "everything", "All"),
        ("slash", "filter", "Filter"),
        ("j", "move(1)", "Down"),
        ("k", "move(-1)", "Up"),
    ]

    def __init__(self, find: Callable[[], ModelList], tuning: str) -> None:
        super().__init__()
        self._find, self._tuning = find, tuning
        self._list: ModelList | None = None
        self._shown: list[ModelRow] = []
        self._sort, self._everything, self._words = next(iter(SORTS)), False, ""

    def compose(self) -> ComposeResult:
        """Table, the model under the cursor, keys."""
        with Vertical(id="dialog") as dialog:
            dialog.border_title = "models"
            yield DataTable(cursor_type="row", zebra_stripes=False, cell_padding=0, id="models")
            yield ModelFacts()
            yield Static(
                "enter plan   s sort   f all   / filter   esc close", id="model-keys", classes="hint", markup=False
            )

    def on_mount(self) -> None:
        """Begin to look."""
        self.query_one(DataTable).focus()
        self._look()

    @work(thread=True, exclusive=True, group="models", exit_on_error=False)
    def _look(self) -> None:
        try:
            found = self._find()
        except FinetuiError as error:
            self.app.call_later(self._fail, error)
            return
        self.app.call_later(self._take, found)

    def _fail(self, error: FinetuiError) -> None:
        self.app.notify(str(error), title="no models", severity="error", timeout=12)
        if self.is_current:
            self.dismiss(None)

    def _take(self, found: ModelList) -> None:
        self._list = found
        if self.is_attached:
            self._fill()

    def on_resize(self) -> None:
        """Other columns may fit now."""
        if self._list is not None:
            self.call_after_refresh(self._fill)

    # --- showing

    def _fill(self, *, top: bool = False) -> None:
        if self._list is None:
            return
        at, table = None if top else self._current(), self.query_one(DataTable)
        self._shown = listed(
            self._list.rows, sort=self._sort, everything=self._everything, words=self._words, tuning=self._tuning
        )
        texts = [cells(row, self._tuning) for row in self._shown]
        widths = fitting(_COLUMNS, texts, self.query_one("#dialog").size.width - _FRAME, _GAP)
        table.clear(columns=True)
        for column in _COLUMNS:
            if (name := column.name) in widths:
                table.add_column(_cell(name, column, "dim"), key=name, width=widths[name] + _GAP)
        for row, line in zip(self._shown, texts, strict=True):
            table.add_row(*self._styled(row, line, widths), key=row.name)
        if at in self._shown:
            table.move_cursor(row=self._shown.index(at))
        dialog, found = self.query_one("#dialog"), self._list
        parts = [f"models: {count_fitting(found.rows)} of {len(found.rows)} fit on one {found.gpu}"]
        parts += [f"by {self._sort}", *([f"filter {self._words!r}"] if self._words else [])]
        dialog.border_title = escape(", ".join(parts))
        dialog.border_subtitle = f"{format.memory_unit()} at micro batch 1, rows of {found.length:,} tokens"
        self._tell()

    def _styled(self, row: ModelRow, line: dict[str, str], widths: dict[str, int]) -> list[Text]:
        best = row.best(self._tuning)
        styled = []
        for column in _COLUMNS:
            if (name := column.name) not in widths:
                continue
            text = _cell(line[name], column)
            if name in TUNINGS:
                role = _ROLES.get(line[name][0])
                text.stylize(self.app.role_style(role) if role else "dim")  # type: ignore[attr-defined]
                if best is not None and best.tuning == name:
                    text.stylize("bold")
            styled.append(text)
        return styled

    def _current(self) -> ModelRow | None:
        table = self.query_one(DataTable)
        at = table.cursor_row
        return self._shown[at] if 0 <= at < len(self._shown) else None

    @on(DataTable.RowHighlighted)
    def _tell(self) -> None:
        memory = self._list.memory_gib if self._list is not None else 0.0
        self.query_one(ModelFacts).show(self._current(), memory, self._tuning)

    # --- keys

    @on(DataTable.RowSelected)
    def _choose(self) -> None:
        if (row := self._current()) is not None:
            self.dismiss(row)

    def action_sort(self) -> None:
        """Sort by the next figure."""
        names = list(SORTS)
        self._sort = names[(names.index(self._sort) + 1) % len(names)]
        self._fill(top=True)

    def action_everything(self) -> None:
        """Show those that do not fit, or hide them."""
        self._everything = not self._everything
        self._fill()

    def action_filter(self) -> None:
        """Ask for words that a name must hold."""

        def done(text: str | None) -> None:
            if text is not None:
                self._words = text.strip()
                self._fill()

        self.app.push_screen(Editor("filter", self._words, hint="Words of a model's name; empty shows all"), done)

    def action_move(self, direction: int) -> None:
        """Move the cursor."""
        table = self.query_one(DataTable)
        table.move_cursor(row=table.cursor_row + direction)


def _cell(text: str, column: Column, style: str = "") -> Text:
    """A cell with the space that stands between it and the next."""
    shown = f"{text}{' ' * _GAP}" if column.right else text
    return Text(shown, style=style, justify="right" if column.right else "left", no_wrap=True, overflow="ellipsis")
