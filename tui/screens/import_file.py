"""ImportFile: another tool's training file, over the plan that it is to become: what became of each of its keys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from textual import work
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.screen import ModalScreen

from ...planner.errors import FinetuiError
from ..widgets.fate_list import FateList
from ..widgets.lines import Line

if TYPE_CHECKING:
    from ...planner.importers import Imported

#: Reads a file as one of a tool (None: by its keys), started on so many GPUs, for a command of TRL's (None: likewise).
Read = Callable[[Path, str | None, int, str | None], "Imported"]
_GPUS = (1, 2, 4, 8, 16, 32)
_KINDS = (None, "axolotl", "llamafactory", "torchtune", "trl")
_METHODS = (None, "sft", "dpo", "kto", "grpo", "rloo", "reward")


class ImportFile(ModalScreen["Imported | None"]):
    """Says what of a file was carried over, what not, and why; the recipe, if the user goes on with it.

    Args:
        path: the file.
        read: reads it, which may take a while and is done in a thread.
    """

    BINDINGS = [  # noqa: RUF012
        ("enter", "accept", "Plan it"),
        ("escape,q", "cancel", "Cancel"),
        ("g", "gpus", "GPUs"),
        ("f", "kind", "Tool"),
        ("c", "method", "Command"),
        ("j,down", "scroll_by(1)", "Down"),
        ("k,up", "scroll_by(-1)", "Up"),
    ]

    def __init__(self, path: Path, read: Read) -> None:
        super().__init__()
        self._path, self._read = path, read
        self._kind: str | None = None
        self._gpus = _GPUS[0]
        self._method: str | None = None
        self._found: Imported | None = None

    def compose(self) -> ComposeResult:
        """A box that scrolls."""
        with VerticalScroll(id="dialog") as dialog:
            dialog.border_title = escape(f"import {self._path.name}")
            dialog.border_subtitle = "enter plans it, j k scroll, esc cancels"
            yield FateList()

    def on_mount(self) -> None:
        """Read the file."""
        self._again()

    def _again(self) -> None:
        self._found = None
        self._import(self._kind, self._gpus, self._method)

    @work(thread=True, exclusive=True, exit_on_error=False)
    def _import(self, kind: str | None, gpus: int, method: str | None) -> None:
        found, words = None, ""
        try:
            found = self._read(self._path, kind, gpus, method)
        except FinetuiError as error:
            words = str(error)
        self.app.call_later(self._show, (kind, gpus, method), found, words)

    def _show(self, asked: tuple[str | None, int, str | None], found: Imported | None, words: str) -> None:
        if not self.is_attached or asked != (self._kind, self._gpus, self._method):  # closed or asked anew meanwhile
            return
        self._found = found
        self.query_one(FateList).show(found, self._questions(), words)

    @property
    def _of_trl(self) -> bool:
        """Whether the file is TRL's, or may be."""
        return (self._found.kind if self._found is not None else self._kind) in (None, "trl")

    def _questions(self) -> list[Line]:
        """What the file itself may not say, with the keys that say it."""
        tool = self._found.title if self._found is not None else self._kind or "–"
        asked = [
            ("g", "GPUs", str(self._gpus), "that it ran on: its batch is per GPU"),
            ("f", "file of", tool, "" if self._kind else "by its keys"),
        ]
        if self._of_trl:
            command = f"trl {self._method}" if self._method else "–"
            asked.append(("c", "command", command, "" if self._method else "by its keys"))
        return [
            [(f"{key}  ", "key"), (name.ljust(9), ""), (value.ljust(15), "accent"), (why, "dim")]
            for key, name, value, why in asked
        ]

    def action_accept(self) -> None:
        """Go on with the recipe."""
        if self._found is None:
            self.notify("There is no recipe to plan yet.", severity="warning")
            return
        self.dismiss(self._found)

    def action_cancel(self) -> None:
        """Leave the plan as it was."""
        self.dismiss(None)

    def action_gpus(self) -> None:
        """The next number of GPUs that it was started on."""
        self._gpus = _GPUS[(_GPUS.index(self._gpus) + 1) % len(_GPUS)]
        self._again()

    def action_kind(self) -> None:
        """The next tool whose file it could be."""
        self._kind = _KINDS[(_KINDS.index(self._kind) + 1) % len(_KINDS)]
        self._method = None
        self._again()

    def action_method(self) -> None:
        """The next command of TRL's that it could be for."""
        if self._of_trl:
            self._method = _METHODS[(_METHODS.index(self._method) + 1) % len(_METHODS)]
            self._again()

    def action_scroll_by(self, rows: int) -> None:
        """Scroll."""
        self.query_one(VerticalScroll).scroll_relative(y=rows * 2, animate=False)
