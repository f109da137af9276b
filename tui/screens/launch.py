"""Launch: every check that can fail a run, the command that does the same, and the start."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from textual import on, work
from textual.app import ComposeResult
from textual.containers import Horizontal, VerticalScroll
from textual.events import DescendantFocus
from textual.message import Message

from ...engine.run import Run, suggest_name
from ...planner.errors import FinetuiError
from ...planner.plan import Plan
from ...planner.recipe import Recipe
from .. import (
    form,
    format,  # noqa: A004
)
from ..command_line import as_shell, command_for
from ..form import LAUNCH_FIELDS, FieldSpec, Tree
from ..keys import Key, bindings, key_of, keys_of
from ..plan_view import verdict
from ..planning import Planned
from ..recipe_changes import changes
from ..widgets.check_list import CheckList
from ..widgets.field import Field
from ..widgets.lines import Line
from ..widgets.recipe_view import RecipeView
from ..widgets.text_block import StartRow, TextBlock
from .base import BaseScreen
from .editor import Confirm, Editor, complete_path

if TYPE_CHECKING:
    from ...engine.check import Check

_NAME = FieldSpec("name", "name", "Letters, digits, '.', '_' and '-'; auto is model, tuning and date")
#: Columns of a label.
_LABEL = 14
_ROOT = FieldSpec("root", "folder", "The run gets a directory of its own in here", auto=False)


class Panel(VerticalScroll, inherit_bindings=False):
    """Scrolls to what has the focus inside it, and leaves all keys to that and to the screen."""


class LaunchScreen(BaseScreen):
    """Checks on the left, the run on the right, command and recipe below."""

    SCOPE = "launch"
    BINDINGS = bindings("launch")

    @dataclass
    class Checked(Message):
        """One more check was made, or all of them."""

        version: int
        check: Any = None
        done: bool = False
        error: FinetuiError | None = None

    @dataclass
    class Started(Message):
        """The run is at work, or why it is not."""

        run: Run | None = None
        error: FinetuiError | None = None

    def __init__(self) -> None:
        super().__init__()
        self._version = 0
        self._checks: list[Check] = []
        self._done = False
        self._starting = False
        self._run_name = ""
        self._root: Path | None = None
        self._checked: Plan | None = None
        self._planning = False
        self._error: FinetuiError | None = None

    def body(self) -> ComposeResult:
        """Checks, run, command, recipe."""
        with Horizontal(id="upper"):
            with VerticalScroll(id="checks") as panel:
                panel.border_title = "checks"
                yield CheckList()
            with Panel(id="run", can_focus=False) as panel:
                panel.border_title = "run"
                yield TextBlock(id="summary")
                yield StartRow()
                for spec in (_NAME, _ROOT, *LAUNCH_FIELDS):
                    yield Field(spec, label_width=_LABEL)
        with VerticalScroll(id="command", can_focus=False) as panel:
            panel.border_title = "the same from the command line"
            yield TextBlock(id="command-text")
        with VerticalScroll(id="recipe") as panel:
            panel.border_title = "recipe"
            yield RecipeView()

    def on_mount(self) -> None:
        """Enter starts unless the user goes elsewhere."""
        self.query_one(StartRow).focus()

    def on_screen_resume(self) -> None:
        """The plan may be another one now."""
        super().on_screen_resume()
        if not isinstance(self.focused, Field):  # a dialog that closes leaves the focus where it was
            self.query_one(StartRow).focus()
        self._show()
        self._error = None
        if self.owner.plan is None:
            self.plan_again()
        elif self.owner.plan is not self._checked:
            self.action_check()

    def plan_again(self, *, at_once: bool = True) -> None:
        """Plan the draft as it is now, then check."""
        self._planning = True
        self._plan_first(self.owner.draft)

    @work(thread=True, exclusive=True, group="plan", exit_on_error=False)
    def _plan_first(self, draft: Tree) -> None:
        self.app.call_later(self._take_plan, draft, self.owner.planner.plan(draft))

    def _take_plan(self, draft: Tree, result: Planned) -> None:
        if draft is not self.owner.draft:  # there was another edit meanwhile
            return
        self._planning, self._error = False, result.error
        self.owner.recipe, self.owner.plan = result.recipe, result.plan
        self.action_check()

    # --- checks

    def action_check(self) -> None:
        """Make all checks."""
        self._version += 1
        self._checks, self._done = [], False
        self._checked = self.owner.plan
        if self.owner.recipe is not None and self.owner.plan is not None:
            self._check(self.owner.recipe, self.owner.plan, self._version)
        self._show()

    @work(thread=True, exclusive=True, group="check", exit_on_error=False)
    def _check(self, recipe: Recipe, plan: Plan, version: int) -> None:
        error: FinetuiError | None = None
        try:
            for check in self.owner.backend.check(recipe, plan, self._folder()):
                self.post_message(self.Checked(version, check))
        except FinetuiError as caught:
            error = caught
        except Exception as caught:  # a mistake of ours is shown, and does not start a run unchecked
            error = FinetuiError(f"the checks failed ({type(caught).__name__}: {caught})")
        self.post_message(self.Checked(version, done=True, error=error))

    @on(Checked)
    def _one_checked(self, message: Checked) -> None:
        if message.version != self._version:
            return
        if message.check is not None:
            self._checks.append(message.check)
        self._done = message.done and message.error is None
        if message.error is not None:
            self.notify(str(message.error), title="checks", severity="error", timeout=12)
        self._show()

    # --- drawing

    def _folder(self) -> Path:
        return self._root or self.owner.backend.root()

    def _show(self) -> None:
        recipe, plan = self.owner.recipe, self.owner.plan
        failed = sum(check.status == "fail" for check in self._checks)
        warned = sum(check.status == "warn" for check in self._checks)
        waiting = plan is not None and not self._done
        self.query_one(CheckList).show(self._checks, "checking…" if waiting else "" if plan else "nothing to check yet")
        counts = [f"{failed} failed"] * bool(failed) + [f"{warned} to know"] * bool(warned)
        self.query_one("#checks").border_title = (
            f"checks: {', '.join(counts) or 'all passed'}" if self._done else "checks"
        )
        start = self.query_one(StartRow)
        self._show_fields()
        if recipe is None or plan is None:
            words = f"no plan to start yet: see Plan ({key_of('plan')})"
            start.show("planning…" if self._planning else words, "dim")
            for name in ("summary", "command-text"):
                self.query_one(f"#{name}", TextBlock).show("")
            self._show_recipe()
            self.refresh_bars()
            return
        self._field("name").show(self._run_name or suggest_name(recipe, plan), "" if self._run_name else "auto")
        self.query_one("#summary", TextBlock).show(self._summary(plan))
        if self._starting or self._planning:
            start.show("starting…" if self._starting else "planning…", "dim")
        elif failed:
            start.show(f"enter: start although {failed} failed", "bad")
        else:
            start.show("enter: start the run", "good" if self._done else "dim")
        self.query_one("#command-text", TextBlock).show(as_shell(self._command(recipe), max(self.size.width - 4, 40)))
        self._show_recipe()
        self.refresh_bars()

    def _show_fields(self) -> None:
        at = form.field_of(self._error.where) if self._error is not None else ""
        for spec in LAUNCH_FIELDS:
            value, note = form.shown(self.owner.draft, spec, self.owner.plan)
            error = f"{self._error.what}. {self._error.do}".rstrip() if self._error and at == spec.key else ""
            self._field(spec.key).show(value, note, error=error)
        self._field("root").show(str(self._folder()))

    def _show_recipe(self) -> None:
        """The recipe, and how it differs from the one that it came from."""
        recipe, panel = self.owner.recipe, self.query_one("#recipe")
        name, old = self.owner.origin or ("", None)
        marked = changes(recipe.to_dict() if recipe is not None else self.owner.draft, old)
        differ = sum(mark != " " for mark, _ in marked)
        lines = "1 line differs" if differ == 1 else f"{differ} lines differ"
        told = f": {lines} from {escape(name)}" if differ else f": as {escape(name)} says" if name else ""
        panel.border_title = escape(f"recipe{told}")
        self.query_one(RecipeView).show(marked)

    def _summary(self, plan: Plan) -> str:
        glyph, word = verdict(plan)
        hardware = plan.hardware
        place = f"{hardware.count} × {hardware.gpu}" if hardware.count > 1 else hardware.gpu
        return "\n".join(
            [
                f"  {glyph} {word}: {format.gib_of(plan.memory.device_gib, hardware.memory_gib)}",
                f"  on {place}",
                f"  {plan.resolved.steps:,} steps, {format.duration(plan.time_s)}, {format.usd(plan.cost.usd)}",
            ]
        )

    def _field(self, key: str) -> Field:
        return self.query_one(f"#field-{key.replace('.', '-')}", Field)

    def keys_shown(self) -> list[Key]:
        """A field's keys first."""
        if not isinstance(self.focused, Field):
            return super().keys_shown()
        return [*keys_of("field"), *(key for key in super().keys_shown() if key.action != "activate")]

    @on(DescendantFocus)
    def _moved(self) -> None:
        self.refresh_bars()
        words = self.focused.spec.help if isinstance(self.focused, Field) else ""
        panel = self.query_one("#run")
        panel.border_subtitle = words if len(words) <= panel.size.width - 4 else ""

    def _command(self, recipe: Recipe) -> list[str]:
        return command_for(recipe, name=self._run_name, root=self._root, path=self.owner.recipe_path)

    def status_line(self) -> Line:
        """How the checks went."""
        failed = sum(check.status == "fail" for check in self._checks)
        word = f"{failed} checks failed" if failed else "all checks passed" if self._done else "checking…"
        return [(f" {word}  enter starts", "bad" if failed else "")]

    # --- keys

    @on(Field.EditRequested)
    def _edit(self, message: Field.EditRequested) -> None:
        key = message.field.spec.key

        def done(text: str | None) -> None:
            if text is None:
                return
            if key == "name":
                self._run_name = "" if text == "auto" else text
            elif not text:
                self._root = None
            elif (root := self.path_of(text)) is not None:
                self._root = root.resolve()
            self.action_check()

        if key not in ("name", "root"):
            self._edit_limit(message.field.spec)
            return
        value = self._run_name if key == "name" else str(self._folder())
        folders = (lambda text: [path for path in complete_path(text) if path.endswith("/")]) if key == "root" else ()
        editor = Editor(message.field.spec.label, value, hint=message.field.spec.help, options=folders)
        self.app.push_screen(editor, done)

    @on(Field.Reset)
    def _reset(self, message: Field.Reset) -> None:
        spec = message.field.spec
        if spec.key == "name":
            self._run_name = ""
        elif spec.key == "root":
            self._root = None
        else:
            self._set(spec, "")
        self._show()

    # --- limits, which belong to the recipe

    def _set(self, spec: FieldSpec, text: str) -> None:
        """Change one limit, and plan and check again."""
        shown = self.owner.recipe, self.owner.plan
        self.owner.edit(form.put(self.owner.draft, spec.key, text))
        self.owner.recipe, self.owner.plan = shown  # until the next one is there
        self._error = None
        self.plan_again()
        self._show()

    def _edit_limit(self, spec: FieldSpec) -> None:
        def done(text: str | None) -> None:
            if text is not None and text != form.get(self.owner.draft, spec.key):
                self._set(spec, text)

        value = form.get(self.owner.draft, spec.key)
        self.app.push_screen(Editor(spec.label.strip(), value, hint=spec.help, options=list(spec.steps)), done)

    @on(Field.Stepped)
    def _stepped(self, message: Field.Stepped) -> None:
        spec = message.field.spec
        value = form.get(self.owner.draft, spec.key)
        new = form.step(spec, value, message.direction)
        if new != value:
            self._set(spec, new)

    def action_copy(self) -> None:
        """Copy the command."""
        if self.owner.recipe is not None:
            command = as_shell(self._command(self.owner.recipe), 10_000)
            self.app.copy_to_clipboard(command)
            self.notify(command, title="copied")

    def action_activate(self) -> None:
        """Start, after a question when a check failed or is not made yet."""
        recipe, plan = self.owner.recipe, self.owner.plan
        if recipe is None or plan is None or self._starting or self._planning:
            return
        failed = [check for check in self._checks if check.status == "fail"]
        if not failed and self._done:
            self._begin()
            return
        names = ", ".join(check.name for check in failed) if failed else "The checks are not all made"
        question = f"{names}: the run will probably fail.\nStart it anyway?" if failed else f"{names}.\nStart anyway?"

        def answered(yes: bool | None) -> None:
            if yes:
                self._begin()

        self.app.push_screen(Confirm("start", question), answered)

    def _begin(self) -> None:
        assert self.owner.recipe is not None
        assert self.owner.plan is not None
        self._starting = True
        self._show()
        self._start(self.owner.recipe, self.owner.plan, self._folder(), self._run_name or None)

    @work(thread=True, group="start", exit_on_error=False)
    def _start(self, recipe: Recipe, plan: Plan, root: Path, name: str | None) -> None:
        try:
            self.post_message(self.Started(self.owner.backend.start(recipe, plan, root, name)))
        except FinetuiError as error:
            self.post_message(self.Started(error=error))
        except Exception as error:  # shown, so that "starting…" never stays for ever
            self.post_message(self.Started(error=FinetuiError(f"the start failed ({type(error).__name__}: {error})")))

    @on(Started)
    def _is_started(self, message: Started) -> None:
        self._starting = False
        self._show()
        if message.run is None:
            self.notify(str(message.error), title="not started", severity="error", timeout=20)
            return
        self.owner.edited = False
        self._run_name = ""
        self.owner.watched = message.run
        self.notify(f"{message.run.name} runs on its own: leaving finetui does not end it.")
        self.owner.action_mode("monitor")
