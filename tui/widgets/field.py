"""Field: one row of the plan's form. Left and right change it, enter edits it, ``a`` leaves it to the planner."""

from __future__ import annotations

from textual import on
from textual.events import Resize
from textual.message import Message

from ..form import FieldSpec
from ..keys import bindings
from .lines import Line, Lines, fitted, length, wrapped

#: Columns of the label.
LABEL_WIDTH = 15


class Field(Lines, can_focus=True):
    """A label, its value, what ``auto`` came to, and below it what is wrong with it."""

    BINDINGS = bindings("field")

    class Stepped(Message):
        """The value was moved on by ``direction``."""

        def __init__(self, field: Field, direction: int) -> None:
            super().__init__()
            self.field, self.direction = field, direction

    class EditRequested(Message):
        """The user wants to type a value."""

        def __init__(self, field: Field) -> None:
            super().__init__()
            self.field = field

    class Reset(Message):
        """The planner is to choose."""

        def __init__(self, field: Field) -> None:
            super().__init__()
            self.field = field

    def __init__(self, spec: FieldSpec, *, label_width: int = LABEL_WIDTH) -> None:
        super().__init__(id=f"field-{spec.key.replace('.', '-')}", classes="field")
        self.spec = spec
        self.value, self._note, self._below, self.error = "", "", "", ""
        self._label_width = label_width
        self._disabled_here = False

    def show(self, value: str, note: str = "", *, below: str = "", error: str = "", useless: bool = False) -> None:
        """Draw a value with a note beside it, a line below it, and an error below that.

        A ``useless`` field is dimmed and passed over.
        """
        rows = self.lines_needed(self.size.width)
        self.value, self._note, self._below, self.error = value, note, below, error
        self._disabled_here = useless
        self.can_focus = not useless
        if rows != self.lines_needed(self.size.width):
            self.refresh(layout=True)
        self.redraw()

    def draw(self, width: int, height: int) -> list[Line]:
        """See :class:`Lines`."""
        focused = self.has_focus
        mark = "✘" if self.error else "▸" if focused else " "
        label: Line = [(f"{mark} ", "bad" if self.error else "accent")]
        label.append(
            (self.spec.label.ljust(self._label_width), "dim" if self._disabled_here else "bold" if focused else "")
        )
        if self._disabled_here:
            return [fitted([*label, ("–", "dim")], width)]
        room = width - length(label)
        arrows = focused and bool(self.spec.steps)
        gap = " " if len(self.value) + 4 <= room else ""
        value = _shortened(self.value, room - 2 - 2 * len(gap) if arrows else room) if self.value else "press enter"
        role = "bad" if self.error else "dim" if value in ("auto", "press enter") else "accent"
        body: Line = [(f"‹{gap}" if arrows else "", "dim"), (value, role), (f"{gap}›" if arrows else "", "dim")]
        note = f"  {self._note}" if self._note else ""
        if note and length(body) + len(note) <= room:
            body.append((note, "" if value == "auto" else "dim"))
        lines = [fitted([*label, *body], width)]
        if self._below:
            lines.append(fitted([(f"  {self._below}", "dim")], width))
        if self.error:
            lines += wrapped(f"    {self.error}", width, "bad", indent="    ")[:4]
        return lines

    def watch_has_focus(self, focused: bool) -> None:
        """Show the cursor, or take it away."""
        super().watch_has_focus(focused)
        self.redraw()

    @on(Resize)
    def _grown(self) -> None:
        """What is wrong with it may be below what can be seen."""
        if self.error and self.has_focus:
            self.scroll_visible(animate=False)

    def on_click(self) -> None:
        """A click on the row that has the cursor edits it."""
        self.post_message(self.EditRequested(self))

    def action_step(self, direction: int) -> None:
        """Next or previous value."""
        self.post_message(self.Stepped(self, direction))

    def action_edit(self) -> None:
        """Type a value."""
        self.post_message(self.EditRequested(self))

    def action_auto(self) -> None:
        """Leave it to the planner."""
        self.post_message(self.Reset(self))


def _shortened(text: str, width: int) -> str:
    """The end of a long path says more than its start."""
    return text if len(text) <= width or width < 2 else f"…{text[-(width - 1) :]}"
