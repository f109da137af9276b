"""Settings: what one user wants of finetui whatever the recipe. Every change is kept at once, in a plain file."""

from __future__ import annotations

from dataclasses import replace

from rich.markup import escape
from textual import on
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.events import DescendantFocus

from ...planner.errors import SettingsError
from ...planner.preferences import DEFAULTS, SETTINGS, Setting, parsed, settings_path, shown, source
from .. import format  # noqa: A004
from ..form import FieldSpec, step
from ..keys import KEYS, Key, bindings, keys_of, rebound
from ..widgets.field import Field
from ..widgets.lines import Line
from ..widgets.text_block import TextBlock
from .base import BaseScreen
from .editor import Editor, complete_path

_RATES = ("0.1", "0.2", "0.5", "1", "2", "4")
#: What only a new start brings.
_LATER = ("charset", "mouse")


def _spec(setting: Setting) -> FieldSpec:
    steps = {"choice": setting.choices, "flag": ("true", "false"), "number": _RATES}.get(setting.kind, ())
    label = setting.name.replace("_", " ")
    return FieldSpec(setting.name, label, setting.help, steps, setting.kind in ("choice", "flag"))


class SettingsScreen(BaseScreen):
    """A row per setting above; what it means and where its value comes from below."""

    SCOPE = "settings"
    BINDINGS = bindings("settings")

    def __init__(self) -> None:
        super().__init__()
        self._problems: list[str] = []

    def body(self) -> ComposeResult:
        """Settings above, words below."""
        with VerticalScroll(id="settings", can_focus=False) as panel:
            panel.border_title = "settings"
            for setting in SETTINGS:
                yield Field(_spec(setting))
        with VerticalScroll(id="about", can_focus=False):
            yield TextBlock(id="about-text")

    def on_screen_resume(self) -> None:
        """Another window may have changed the file."""
        super().on_screen_resume()
        if self.focused is None:
            self.query(Field).first().focus()
        self.action_reread()

    @on(DescendantFocus)
    def _moved(self) -> None:
        """Say what this one is for."""
        self._show_about()
        self.refresh_bars()

    def keys_shown(self) -> list[Key]:
        """A field's keys, by what they do here."""
        field = [replace(key, label="Default") if key.action == "auto" else key for key in keys_of("field")]
        return [*field, *super().keys_shown()]

    def status_line(self) -> Line:
        """Where the file is."""
        return [(f" settings: {format.path(settings_path())}", "")]

    # --- showing

    def _show(self) -> None:
        for field in self.query(Field):
            value = shown(field.spec.key, getattr(self.owner.preferences, field.spec.key))
            where = source(field.spec.key, self.owner.preferences)
            field.show(value or "–", field.spec.help if where == "default" else where)
        self.query_one("#settings").border_subtitle = escape(format.path(settings_path()))
        self._show_about()
        self.refresh_bars()

    def _show_about(self) -> None:
        panel, text = self.query_one("#about"), self.query_one("#about-text", TextBlock)
        lines = [f"! {problem}" for problem in self._problems]
        if isinstance(self.focused, Field):
            setting = next(item for item in SETTINGS if item.name == self.focused.spec.key)
            panel.border_title = setting.name.replace("_", " ")
            lines += [f"{setting.help}.", *self._values(setting), *self._origin(setting)]
            if setting.name == "keys":
                own = rebound([key for key in KEYS if key.id in self.owner.own_keys], self.owner.own_keys)
                lines += [f"{key.all_shown}  {key.id}  {key.help}" for key in own]
        text.show("\n".join(lines))

    @staticmethod
    def _values(setting: Setting) -> list[str]:
        if setting.kind == "choice":
            return [f"One of {', '.join(setting.choices)}."]
        if setting.kind == "number":
            return [f"From {setting.low:g} to {setting.high:g}."]
        return []

    def _origin(self, setting: Setting) -> list[str]:
        where = source(setting.name, self.owner.preferences)
        told = [f"{where} is set and comes before the file."] if where.startswith("$") else []
        return told + ["Takes effect at the next start."] * (setting.name in _LATER)

    # --- changing

    def _prefer(self, name: str, text: str) -> None:
        try:
            self.owner.prefer(name, parsed(name, text))
        except SettingsError as error:
            self.notify(str(error), title="not kept", severity="error", timeout=12)
        self._problems = []
        self._show()

    @on(Field.Stepped)
    def _stepped(self, message: Field.Stepped) -> None:
        spec = message.field.spec
        value = shown(spec.key, getattr(self.owner.preferences, spec.key))
        new = step(spec, value, message.direction)
        if new != value:
            self._prefer(spec.key, new)

    @on(Field.Reset)
    def _reset(self, message: Field.Reset) -> None:
        name = message.field.spec.key
        self._prefer(name, shown(name, getattr(DEFAULTS, name)))

    @on(Field.EditRequested)
    def _edit(self, message: Field.EditRequested) -> None:
        spec = message.field.spec
        if spec.key == "keys":
            self._choose_command()
            return

        def done(text: str | None) -> None:
            if text is not None:
                self._prefer(spec.key, text)

        value = shown(spec.key, getattr(self.owner.preferences, spec.key))
        options = _folders if spec.key == "runs" else self._providers() if spec.key == "providers" else spec.steps
        self.app.push_screen(Editor(spec.label, value, hint=spec.help, options=options, closed=spec.closed), done)

    @staticmethod
    def _providers() -> list[str]:
        from ...planner.hardware import all_offers

        return sorted({offer.provider for offer in all_offers()})

    def _choose_command(self) -> None:
        rows = {f"{key.id}  {key.all_shown}  {key.help}": key for key in rebound(KEYS, self.owner.own_keys)}

        def chosen(text: str | None) -> None:
            if text is not None:
                self._ask_key(rows[text])

        hint = "Which command; type part of its name"
        self.app.push_screen(Editor("keys", "", hint=hint, options=list(rows), closed=True), chosen)

    def _ask_key(self, key: Key) -> None:
        def done(text: str | None) -> None:
            if text is None:
                return
            own = dict(self.owner.preferences.keys)
            own.pop(key.id, None)
            if text:
                own[key.id] = text.replace(" ", "")
            self._prefer("keys", shown("keys", own))

        hint = f"{key.help}. Several with commas; empty is the key it comes with"
        self.app.push_screen(Editor(key.id, self.owner.preferences.keys.get(key.id, ""), hint=hint), done)

    # --- keys

    def action_reread(self) -> None:
        """Read the file again."""
        self._problems = self.owner.reread_preferences()
        self._show()

    def action_copy(self) -> None:
        """Copy the file's path."""
        self.app.copy_to_clipboard(str(settings_path()))
        self.notify(str(settings_path()), title="copied")


def _folders(text: str) -> list[str]:
    return [path for path in complete_path(text) if path.endswith("/")]
