"""Data: what will be trained on, token by token, and what is wrong with it, before a GPU-hour is spent."""

from __future__ import annotations

from dataclasses import dataclass

from rich.markup import escape
from textual import on, work
from textual.app import ComposeResult
from textual.containers import Horizontal, VerticalScroll
from textual.message import Message

from ...planner.errors import FinetuiError
from ..data_look import DataLook
from ..form import Tree, recipe_of
from ..keys import Key, bindings
from ..widgets.data_facts import DataFacts, LengthHistogram
from ..widgets.lines import Line
from ..widgets.sample_view import MARKS, Marks, SampleView
from .base import BaseScreen

#: Keys of a draft that decide what its data becomes.
_RELEVANT = ("model", "method", "data", "sequence_length", "train_on", "chat_template", "packing")


class DataScreen(BaseScreen):
    """Facts and lengths above, one example below."""

    SCOPE = "data"
    BINDINGS = bindings("data")

    @dataclass
    class Looked(Message):
        """What there is, or why nothing can be shown."""

        key: str
        look: DataLook | None = None
        error: FinetuiError | None = None

    def __init__(self) -> None:
        super().__init__()
        self._key = ""
        self._look: DataLook | None = None
        self._error: FinetuiError | None = None
        self._at = 0
        self._marks: Marks = ""

    def body(self) -> ComposeResult:
        """Facts, histogram, example."""
        with Horizontal(id="upper"):
            with VerticalScroll(id="facts", can_focus=False) as panel:
                panel.border_title = "data"
                yield DataFacts()
            yield LengthHistogram()
        with VerticalScroll(id="sample") as panel:
            panel.border_title = "example"
            yield SampleView()

    def on_screen_resume(self) -> None:
        """The recipe may be another one now."""
        super().on_screen_resume()
        self.query_one("#sample").focus()
        self._ask()

    def _ask(self, *, again: bool = False) -> None:
        draft = self.owner.draft
        key = repr({name: draft.get(name) for name in _RELEVANT})
        if key == self._key and not again:
            return
        self._key, self._look, self._error, self._at = key, None, None, 0
        self._show()
        if draft.get("data"):
            self._read(draft, key)

    @work(thread=True, exclusive=True, group="look", exit_on_error=False)
    def _read(self, draft: Tree, key: str) -> None:
        try:
            self.post_message(self.Looked(key, self.owner.backend.look(recipe_of(draft))))
        except FinetuiError as error:
            self.post_message(self.Looked(key, error=error))

    @on(Looked)
    def _looked(self, message: Looked) -> None:
        if message.key == self._key:
            self._look, self._error = message.look, message.error
            self._show()

    def _show(self) -> None:
        facts = self.query_one(DataFacts)
        if self._error is not None:
            facts.show(None, str(self._error), "bad")
        elif self._look is None:
            nothing = "the plan names no data yet: enter chooses a file, a folder or a hub dataset"
            words = "reading…" if self.owner.draft.get("data") else nothing
            facts.show(None, words)
        else:
            facts.show(self._look)
        self.query_one(LengthHistogram).show(self._look)
        self._show_sample()
        self.refresh_bars()

    def _show_sample(self) -> None:
        panel, view = self.query_one("#sample", VerticalScroll), self.query_one(SampleView)
        samples = self._look.samples if self._look else ()
        if not samples:
            panel.border_title = "example"
            view.show(None, "its rows stand here one by one, trained tokens underlined")
            return
        sample = samples[self._at]
        part = f" ({sample.part})" if sample.part else ""
        cut = f", {sample.cut} cut off" if sample.cut else ""
        panel.border_title = (
            f"example {self._at + 1} of {len(samples)}: {escape(sample.where)}{part}, "
            f"{len(sample.pieces)} tokens, {sample.trained} trained{cut}"
        )
        view.show(sample, marks=self._marks)
        panel.scroll_home(animate=False)

    def keys_shown(self) -> list[Key]:
        """A next example only where there are several, and nothing to mark or to read again without data."""
        samples, named = self._look.samples if self._look else (), bool(self.owner.draft.get("data"))
        several = len(samples) > 1
        fitting = {"example(1)": several, "example(-1)": several, "marks": bool(samples), "again": named}
        fitting["choose"] = not named or self._error is not None
        return [key for key in super().keys_shown() if fitting.get(key.action, True)]

    def status_line(self) -> Line:
        """The counts in one line."""
        report = self._look.report if self._look else None
        if report is None:
            return [(" data", "dim")]
        return [(f" {report.examples:,} examples, {report.tokens:,} tokens, {report.trained_share:.0%} trained", "")]

    # --- keys

    def action_choose(self) -> None:
        """Name the data on Plan."""
        self.owner.choose_data()

    def action_example(self, direction: int) -> None:
        """The next example, or the one before."""
        if self._look is not None and self._look.samples:
            self._at = (self._at + direction) % len(self._look.samples)
            self._show_sample()

    def action_marks(self) -> None:
        """The next way to mark tokens."""
        self._marks = MARKS[(MARKS.index(self._marks) + 1) % len(MARKS)]
        self._show_sample()

    def action_again(self) -> None:
        """Read the data again."""
        self._ask(again=True)

    def action_scroll(self, direction: int) -> None:
        """Scroll the facts."""
        pane = self.query_one("#facts", VerticalScroll)
        pane.scroll_relative(y=direction * max(pane.size.height - 1, 1), animate=False)
