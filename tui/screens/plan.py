"""Plan: one live form. Every edit plans anew and shows memory, speed, time, cost and the reasons."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from textual import on, work
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.events import DescendantFocus
from textual.message import Message
from textual.timer import Timer

from ...planner.errors import FinetuiError, RecipeError
from ...planner.hardware import PRESETS
from ...planner.plan import Plan
from .. import (
    form,
    format,  # noqa: A004
)
from ..form import CPU, FIELDS, THIS_MACHINE, FieldSpec, Tree
from ..keys import Key, bindings, keys_of
from ..plan_view import verdict
from ..planning import Planned
from ..widgets.facts import Facts, Reasons
from ..widgets.field import Field
from ..widgets.lines import Line
from ..widgets.memory_bar import MemoryBar
from ..widgets.term_rows import TermRows
from .base import BaseScreen
from .editor import Editor, complete_path
from .formula import Formula
from .import_file import ImportFile

if TYPE_CHECKING:
    from ...planner.importers import Imported
    from ..model_list import ModelList, ModelRow

#: Seconds without an edit before planning: holding an arrow key down plans once.
DEBOUNCE_S = 0.05
_DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
_RECIPE_SUFFIXES = (".yaml", ".yml")


class PlanScreen(BaseScreen):
    """The form, the verdict and the reasons."""

    SCOPE = "plan"
    BINDINGS = bindings("plan")

    @dataclass
    class Ready(Message):
        """A plan is ready, or why there is none. ``version`` is the edit that it answers."""

        version: int
        result: Planned

    def __init__(self) -> None:
        super().__init__()
        self._version = 0
        self._edited = 0.0
        self._timer: Timer | None = None
        self._error: FinetuiError | None = None
        self._data_note = ""
        self._gpus: list[str] = [THIS_MACHINE, CPU]
        self._models: list[str] = []

    def body(self) -> ComposeResult:
        """Form and verdict side by side, reasons below."""
        with Horizontal(id="upper"):
            with VerticalScroll(id="form", can_focus=False) as panel:
                panel.border_title = "plan"
                for spec in FIELDS:
                    yield Field(spec)
            with Vertical(id="verdict") as panel:
                panel.border_title = "verdict"
                yield MemoryBar()
                yield Facts()
        with VerticalScroll(id="reasons") as panel:
            panel.border_title = "why"
            yield Reasons()

    def on_mount(self) -> None:
        """Plan what is there, and learn which models and GPUs can be chosen."""
        self._field("model").focus()
        self._show_fields()
        self.call_after_refresh(self._load_choices)

    def on_screen_resume(self) -> None:
        """The recipe may be another one now."""
        super().on_screen_resume()
        self._show_fields()
        if self.owner.plan is None or self._version == 0:
            self.call_after_refresh(self.plan_again, at_once=True)

    @on(DescendantFocus)
    def _moved(self) -> None:
        """The keys differ between a field and the reasons."""
        self.refresh_bars()
        if isinstance(self.focused, Field):
            spec, form_panel = self.focused.spec, self.query_one("#form")
            beside = len(spec.help) <= form_panel.size.width - 4
            form_panel.border_subtitle = spec.help if beside else ""
            self.query_one("#reasons").border_subtitle = "" if beside else f"{spec.label.strip()}: {spec.help}"

    def on_resize(self) -> None:
        """A field's words may fit now, or no longer."""
        self.call_after_refresh(self._moved)

    def keys_shown(self) -> list[Key]:
        """A field's keys first."""
        inside = "field" if isinstance(self.focused, Field) else "terms" if isinstance(self.focused, TermRows) else ""
        return [*keys_of(inside), *super().keys_shown()]

    def status_line(self) -> Line:
        """The verdict in one line."""
        plan = self.owner.plan
        if self._error is not None:
            return [(f" ✘ {self._error.what}", "bad")]
        if plan is None:
            return [(" planning…", "dim")]
        glyph, word = verdict(plan)
        return [
            (f" {glyph} {word}  ", "bold"),
            (format.gib_of(plan.memory.device_gib, plan.hardware.memory_gib), ""),
        ]

    # --- planning

    def plan_again(self, tree: Tree | None = None, *, at_once: bool = False) -> None:
        """Plan ``tree``, or the form as it stands: at once, or in a series of edits once none has come for a moment."""
        self._version += 1
        if self._timer is not None:
            self._timer.stop()
        version, wanted = self._version, self.owner.draft if tree is None else tree
        now, last = time.monotonic(), self._edited
        self._edited = now
        alone = at_once or now - last > 4 * DEBOUNCE_S
        self._timer = self.set_timer(0.001 if alone else DEBOUNCE_S, lambda: self._compute(wanted, version))

    @work(thread=True, exclusive=True, group="plan", exit_on_error=False)
    def _compute(self, tree: Tree, version: int) -> None:
        self.post_message(self.Ready(version, self.owner.planner.plan(tree)))

    @on(Ready)
    def _planned(self, message: Ready) -> None:
        if message.version != self._version:  # there was another edit meanwhile
            return
        result = message.result
        self._error, self._data_note = result.error, result.data
        self.owner.recipe, self.owner.plan = result.recipe, result.plan
        self._show_plan()

    def _show_plan(self) -> None:
        plan, error = self.owner.plan, self._error
        self.query_one(Facts).show(plan)
        on_field = form.field_of(error.where) if error is not None else ""
        told = (error.message.removesuffix(error.do), error.do) if error and not on_field else None
        self.query_one(Reasons).show(plan, told)
        self.query_one(MemoryBar).show(plan, f"✘ no plan: see {on_field or 'below'}" if error else "planning…")
        panel = self.query_one("#verdict")
        simulated = "" if plan is None or plan.hardware.local else " [reverse] SIM [/]"
        panel.border_title = f"verdict: {escape(self._place(plan))}{simulated}" if plan else "verdict"
        panel.border_subtitle = self._basis(plan) if plan else ""
        panel.set_class(plan is None, "-none")
        warnings = f", {len(plan.warnings)} warnings" if plan and plan.warnings else ""
        self.query_one("#reasons").border_title = f"why: {len(plan.reasons)} choices{warnings}" if plan else "why"
        self._show_fields()
        self.refresh_bars()

    def _basis(self, plan: Plan) -> str:
        peak = f", peak in the {plan.memory.moment}" if self.size.width >= 120 else ""
        return f"by {plan.basis}, data {plan.workload.basis}{peak}"

    @staticmethod
    def _place(plan: Plan) -> str:
        hardware = plan.hardware
        return f"{hardware.count} × {hardware.gpu}" if hardware.count > 1 else hardware.gpu

    def _show_fields(self) -> None:
        tree, plan = self.owner.draft, self.owner.plan
        at = form.field_of(self._error.where) if self._error else ""
        for field in self.query(Field):
            value, note = form.shown(tree, field.spec, plan)
            below = self._data_line(plan) if field.spec.key == "data" else ""
            error = ""
            if self._error is not None and at == field.spec.key:
                error = f"{self._error.what}. {self._error.do}".rstrip()
            useless = form.disabled(tree, field.spec.key)
            field.display = not (useless and field.spec.hides)
            field.show(value, note, below=below, error=error, useless=useless)

    def _data_line(self, plan: Plan | None) -> str:
        if plan is None or not self._data_note:
            return ""
        return f"{self._data_note}, {format.count(plan.workload.tokens)} tok"

    @on(TermRows.Asked)
    def _explain(self, message: TermRows.Asked) -> None:
        recipe, plan = self.owner.recipe, self.owner.plan
        if recipe is not None and plan is not None:
            explain = self.owner.backend.explain
            self.app.push_screen(Formula(message.name, plan.basis, lambda: explain(recipe)))

    # --- editing

    def _field(self, key: str) -> Field:
        return self.query_one(f"#field-{key.replace('.', '-')}", Field)

    def set_value(self, key: str, text: str) -> None:
        """Change one field and plan again."""
        self._take_draft(form.put(self.owner.draft, key, text))

    def _take_draft(self, draft: Tree) -> None:
        shown = self.owner.recipe, self.owner.plan
        self.owner.edit(draft)
        self.owner.recipe, self.owner.plan = shown  # until the next one is there
        self._show_fields()
        self.plan_again()

    def _steps(self, spec: FieldSpec) -> list[str]:
        return self._gpus if spec.key == "hardware.gpu" else list(spec.steps)

    @on(Field.Stepped)
    def _stepped(self, message: Field.Stepped) -> None:
        spec = message.field.spec
        value = form.get(self.owner.draft, spec.key)
        new = form.step(spec, value, message.direction, self._steps(spec))
        if new != value:
            self.set_value(spec.key, new)

    @on(Field.Reset)
    def _reset(self, message: Field.Reset) -> None:
        spec = message.field.spec
        if spec.auto:
            self.set_value(spec.key, "auto")
        elif spec.key == "hardware.gpu":
            self.set_value(spec.key, THIS_MACHINE)

    @on(Field.EditRequested)
    def _edit(self, message: Field.EditRequested) -> None:
        self.begin_edit(message.field.spec.key)

    def begin_edit(self, key: str) -> None:
        """Go to a field, and ask for its value."""
        field, tree = self._field(key), self.owner.draft
        field.focus()
        spec = field.spec

        def done(text: str | None) -> None:
            if text is None or text == form.get(tree, spec.key):
                self.plan_again(at_once=True)
            else:
                self.set_value(spec.key, text)

        def typing(text: str) -> None:
            self.plan_again(form.put(tree, spec.key, text))

        options = self._steps(spec)
        editor = Editor(
            spec.label.strip(),
            form.get(tree, spec.key),
            hint=spec.help,
            options=self._known_models if spec.key == "model" else _data_files if spec.key == "data" else options,
            search=self.owner.backend.search_hub if spec.key == "model" else None,
            place="Hub",
            closed=spec.closed,
            on_change=None if spec.key in ("model", "data") else typing,
        )
        self.app.push_screen(editor, done)

    def _known_models(self, text: str) -> list[str]:
        """Models for what was typed; all of them where that is the model that stands there."""
        from ...planner.hub_search import folders, matching

        return folders(text) or matching(self._models, "" if text == form.get(self.owner.draft, "model") else text)

    @work(thread=True, group="choices", exit_on_error=False)
    def _load_choices(self) -> None:
        backend = self.owner.backend
        gpus, models = backend.gpus(), backend.models()
        self.app.call_later(self._take_choices, gpus, models)

    def _take_choices(self, gpus: list[str], models: list[str]) -> None:
        self._gpus = [THIS_MACHINE, CPU, *gpus]
        self._models = models

    # --- keys

    def action_scroll(self, direction: int) -> None:
        """Scroll the reasons."""
        pane = self.query_one("#reasons", VerticalScroll)
        pane.scroll_relative(y=direction * max(pane.size.height - 1, 1), animate=False)

    def action_here(self) -> None:
        """Plan for this machine."""
        self.set_value("hardware.gpu", THIS_MACHINE)

    def action_browse(self) -> None:
        """List the models on this GPU, and plan the one that is chosen."""
        from ..model_list import length_of, on_model
        from .models import Models

        draft = self.owner.draft
        # What else is wrong with the draft is no matter here.
        where = {key: value for key, value in draft.items() if key == "hardware"}

        def find() -> ModelList:
            return self.owner.backend.models_on(form.recipe_of(where), length_of(draft))

        def done(row: ModelRow | None) -> None:
            if row is not None:
                self._take_draft(on_model(draft, row))

        self.app.push_screen(Models(find, form.get(draft, "tuning.type")), done)

    def action_open(self) -> None:
        """Ask for a recipe and open it."""

        def done(text: str | None) -> None:
            if not text:
                return
            path = self.path_of(text)
            if path is None:
                return
            path = _preset(text, path) or path
            try:
                self.owner.open_recipe(path)
            except RecipeError as error:
                if self.owner.backend.tool_of(path):
                    self._import(path)
                    return
                self.notify(str(error), title="not opened", severity="error", timeout=12)
                return
            self._show_fields()
            self.plan_again(at_once=True)

        self.app.push_screen(
            Editor("open a recipe", "", hint="A preset, a recipe, or another tool's training file", options=_recipes),
            done,
        )

    def action_import_(self) -> None:
        """Ask for another tool's training file, and make a recipe of it."""

        def done(text: str | None) -> None:
            path = self.path_of(text) if text else None
            if path is not None:
                self._import(path)

        hint = "A YAML file of Axolotl, LLaMA-Factory, torchtune or TRL"
        self.app.push_screen(Editor("import a training file", "", hint=hint, options=_training_files), done)

    def _import(self, path: Path) -> None:
        def done(found: Imported | None) -> None:
            if found is None:
                return
            self.owner.take_imported(found)
            self._show_fields()
            self.plan_again(at_once=True)
            self.notify(f"{path.name} is planned. s saves it as a recipe.", title="imported")

        self.app.push_screen(ImportFile(path, self.owner.backend.import_file), done)

    def action_save(self) -> None:
        """Ask where to, and save the recipe."""
        recipe = self.owner.recipe
        if recipe is None:
            self.notify("There is nothing to save until the form is right.", severity="warning")
            return

        def done(text: str | None) -> None:
            path = self.path_of(text) if text else None
            if path is None:
                return
            path = path.resolve()
            try:
                path.write_text(self.owner.recipe_text(recipe), encoding="utf-8")
            except OSError as error:
                self.notify(f"{path}: {error.strerror}", title="not saved", severity="error", timeout=12)
                return
            self.owner.recipe_path, self.owner.edited = path, False
            self.owner.origin = (path.name, recipe.to_dict())
            self.notify(f"finetui run {path}", title=f"saved as {path.name}")

        path = self.owner.recipe_path
        start = "recipe.yaml" if path is None or path.parent == PRESETS else str(path)
        self.app.push_screen(Editor("save as", start, hint="A file that is there already is replaced"), done)


def _data_files(text: str) -> list[str]:
    return complete_path(text, suffixes=_DATA_SUFFIXES)


def _recipes(text: str) -> list[str]:
    """Presets by their names, then files."""
    presets = sorted(path.stem for path in PRESETS.glob("*.yaml") if path.stem.startswith(text))
    return [*presets, *complete_path(text, suffixes=_RECIPE_SUFFIXES)]


def _training_files(text: str) -> list[str]:
    return complete_path(text, suffixes=(*_RECIPE_SUFFIXES, ".json"))


def _preset(text: str, path: Path) -> Path | None:
    """The preset of that name, where no file is called so."""
    preset = PRESETS / f"{text}.yaml"
    return preset if "/" not in text and not path.exists() and preset in PRESETS.glob("*.yaml") else None
