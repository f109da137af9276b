"""The small screens that ask one thing: a value, a choice, a yes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from textual import on, work
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.timer import Timer
from textual.widgets import Input, OptionList, Static

from ...planner.errors import FinetuiError

#: Seconds without a key before another place is asked, and letters that it is asked with at least.
SEARCH_S = 0.3
_LEAST = 3
#: Options listed at a time; more are found by typing.
_SHOWN = 200


class Editor(ModalScreen[str | None]):
    """Types a value over the field that it belongs to, with suggestions below; None when the user thinks again.

    Args:
        title: what is asked for.
        value: what stands there now.
        options: suggestions, filtered by what is typed; or a function from what is typed to suggestions.
        closed: only a suggestion is accepted.
        on_change: told of every keystroke.
        search: further suggestions for what is typed, from a place that takes its time; asked in a thread once no key
            has come for a moment. A :class:`FinetuiError` is told below the suggestions.
        place: what that place is called.
    """

    BINDINGS = [  # noqa: RUF012
        ("escape", "cancel", "Cancel"),
        ("down", "move(1)", "Next suggestion"),
        ("up", "move(-1)", "Previous suggestion"),
        ("tab", "accept", "Accept"),
    ]

    def __init__(
        self,
        title: str,
        value: str,
        *,
        options: Sequence[str] | Callable[[str], Sequence[str]] = (),
        closed: bool = False,
        on_change: Callable[[str], None] | None = None,
        search: Callable[[str], Sequence[str]] | None = None,
        place: str = "",
        hint: str = "",
    ) -> None:
        super().__init__()
        self._search, self._place = search, place
        self._asking: Timer | None = None
        self._heading, self._value, self._hint = title, value, hint
        self._options, self._choice_only, self._on_change = options, closed, on_change
        self._typed = False

    def compose(self) -> ComposeResult:
        """One line to type on, suggestions, and what the keys do."""
        with Vertical(id="dialog") as dialog:
            dialog.border_title = self._heading
            if self._hint:
                yield Static(self._hint, classes="hint", markup=False)
            yield Input(self._value, compact=True, select_on_focus=True)
            if self._options:
                yield OptionList(compact=True, markup=False)
            if self._search:
                yield Static("", id="place", classes="hint", markup=False)
            keys = "enter accept   esc cancel" + ("   ↑↓ choose" if self._options else "")
            yield Static(keys, classes="hint", markup=False)

    def on_mount(self) -> None:
        """Start with the whole list, at the current value."""
        self.query_one(Input).cursor_blink = False
        if self._options:
            self._fill(self._suggestions("" if not callable(self._options) else self._value), self._value)

    def _suggestions(self, text: str) -> list[str]:
        if callable(self._options):
            return list(self._options(text))[:_SHOWN]
        words = text.lower().split()
        return [option for option in self._options if all(word in option.lower() for word in words)][:_SHOWN]

    def _fill(self, suggestions: Sequence[str], current: str) -> None:
        options = self.query_one(OptionList)
        options.set_options(suggestions)
        options.can_focus = False
        options.display = bool(suggestions)
        if current in suggestions:
            options.highlighted = list(suggestions).index(current)
        elif suggestions and self._choice_only:
            options.highlighted = 0

    @on(Input.Changed)
    def _changed(self, event: Input.Changed) -> None:
        if event.value == self._value and not self._typed:
            return
        self._typed = True
        if self._options:
            self._fill(self._suggestions(event.value), event.value)
        if self._on_change is not None and not self._choice_only:
            self._on_change(event.value)
        self._ask_later(event.value.strip())

    # --- suggestions from elsewhere

    def _ask_later(self, text: str) -> None:
        if self._asking is not None:
            self._asking.stop()
        if self._search is None:
            return
        path = text.startswith(("/", ".", "~"))
        if path or len(text) < _LEAST:
            self._tell("" if path else f"{self._place}: type {_LEAST} letters or more")
            return
        self._tell(f"{self._place}: searching…")
        self._asking = self.set_timer(SEARCH_S, lambda: self._ask(text))

    @work(thread=True, exclusive=True, exit_on_error=False)
    def _ask(self, text: str) -> None:
        assert self._search is not None
        try:
            found, words = list(self._search(text)), ""
        except FinetuiError as error:
            found, words = [], f"{self._place}: {error.what}"
        except Exception as error:  # whatever the network brings costs suggestions, not the form
            found, words = [], f"{self._place}: no answer ({type(error).__name__})"
        self.app.call_later(self._found, text, found, words)

    def _found(self, text: str, found: list[str], words: str) -> None:
        if not self.is_attached or self.query_one(Input).value.strip() != text:  # the user typed on
            return
        own = self._suggestions(text)
        more = [name for name in found if name not in own]
        highlighted = self.query_one(OptionList).highlighted
        self._fill([*own, *more], text)
        self.query_one(OptionList).highlighted = highlighted
        self._tell(words or f"{self._place}: {len(more)} more" if words or found else f"{self._place}: none")

    def _tell(self, words: str) -> None:
        self.query_one("#place", Static).update(words)

    @on(Input.Submitted)
    def _submitted(self) -> None:
        self.action_accept()

    @on(OptionList.OptionSelected)
    def _selected(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(str(event.option.prompt))

    def action_move(self, direction: int) -> None:
        """Go through the suggestions."""
        if not self._options:
            return
        options = self.query_one(OptionList)
        if not options.option_count:
            return
        at = options.highlighted
        options.highlighted = (
            (0 if direction > 0 else options.option_count - 1)
            if at is None
            else ((at + direction) % options.option_count)
        )

    def action_accept(self) -> None:
        """Take the highlighted suggestion, or what was typed."""
        text = self.query_one(Input).value.strip()
        highlighted = self.query_one(OptionList).highlighted_option if self._options else None
        if highlighted is not None:
            self.dismiss(str(highlighted.prompt))
        elif self._choice_only:
            self.notify("Choose one from the list.", severity="warning")
        else:
            self.dismiss(text)

    def action_cancel(self) -> None:
        """Leave the value as it was."""
        self.dismiss(None)


class Confirm(ModalScreen[bool]):
    """Asks before something that can't be taken back. Only ``y`` says yes; enter says no."""

    BINDINGS = [("y", "yes", "Yes"), ("n,escape,enter,q", "no", "No")]  # noqa: RUF012

    def __init__(self, title: str, question: str) -> None:
        super().__init__()
        self._heading, self._question = title, question

    def compose(self) -> ComposeResult:
        """The question and its two keys."""
        with Vertical(id="dialog") as dialog:
            dialog.border_title = self._heading
            yield Static(self._question, markup=False)
            yield Static("y yes   n no", classes="hint", markup=False)

    def action_yes(self) -> None:
        """Do it."""
        self.dismiss(True)

    def action_no(self) -> None:
        """Leave it."""
        self.dismiss(False)


def complete_path(text: str, *, suffixes: Sequence[str] = ()) -> list[str]:
    """Folders and files that begin with what was typed; of files only those with one of ``suffixes``."""
    try:
        typed = Path(text).expanduser() if text else Path()
        folder, prefix = (typed, "") if not text or text.endswith("/") else (typed.parent, typed.name)
        entries = sorted(folder.iterdir(), key=lambda entry: entry.name.lower())
    except (OSError, RuntimeError):  # the latter of a ~ that names nobody
        return []
    found = []
    for entry in entries:
        if entry.name.startswith(".") or not entry.name.lower().startswith(prefix.lower()):
            continue
        if entry.is_dir():
            found.append(f"{entry}/")
        elif not suffixes or entry.name.lower().endswith(tuple(suffixes)):
            found.append(str(entry))
    return found
