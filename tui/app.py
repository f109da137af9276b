"""FinetuiApp: nine screens over the same files that the command line reads and writes.

What the first picture does not need is imported later, in a worker: pydantic alone, for recipes, takes 0.1 s.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from rich.style import Style
from textual.app import App, SystemCommand
from textual.await_complete import AwaitComplete
from textual.filter import LineFilter
from textual.notifications import SeverityLevel
from textual.screen import Screen

from ..planner import preferences as settings
from ..planner.errors import FinetuiError, SettingsError, UserError
from ..planner.plan import Plan
from ..planner.preferences import Preferences, Value
from . import (
    format,  # noqa: A004
    terminal,
)
from .backend import Backend
from .form import Tree, get, put
from .keys import bindings, key_map, keys_of, rebound
from .planning import DraftPlanner
from .stylesheet import SteadyStylesheet
from .themes import THEMES, theme_named
from .widgets.lines import ROLES

if TYPE_CHECKING:
    from ..engine.run import Run
    from ..planner.importers import Imported
    from ..planner.recipe import Recipe

Mode = Literal["plan", "gpus", "data", "launch", "monitor", "runs", "compare", "logs", "settings"]

#: What is planned when nothing is asked for: a well-known model, on a GPU that many have.
FIRST_TREE: Tree = {"model": "Qwen/Qwen3-8B", "tuning": {"type": "qlora"}}
FIRST_GPU = "RTX-4090"


def _plan_screen() -> Screen[Any]:
    from .screens.plan import PlanScreen

    return PlanScreen()


def _gpus_screen() -> Screen[Any]:
    from .screens.gpus import GpusScreen

    return GpusScreen()


def _data_screen() -> Screen[Any]:
    from .screens.data import DataScreen

    return DataScreen()


def _launch_screen() -> Screen[Any]:
    from .screens.launch import LaunchScreen

    return LaunchScreen()


def _monitor_screen() -> Screen[Any]:
    from .screens.monitor import MonitorScreen

    return MonitorScreen()


def _runs_screen() -> Screen[Any]:
    from .screens.runs import RunsScreen

    return RunsScreen()


def _compare_screen() -> Screen[Any]:
    from .screens.compare import CompareScreen

    return CompareScreen()


def _logs_screen() -> Screen[Any]:
    from .screens.logs import LogsScreen

    return LogsScreen()


def _settings_screen() -> Screen[Any]:
    from .screens.settings import SettingsScreen

    return SettingsScreen()


class FinetuiApp(App[None]):
    """The app.

    Args:
        mode: the screen to begin with.
        run: the run that Monitor shows; the newest one if None.
        recipe: what Plan begins with; ``recipe_path`` is the file that holds exactly that, if one does.
        backend: what does the work; tests give their own.
        ascii_only: draw in ASCII.
        theme: a theme by Textual's name for it, for when the user's preferences name none.
        preferences: the user's; read from their file if None.
    """

    CSS_PATH = "theme.tcss"
    COMPONENT_CLASSES = {f"lines--{role}" for role in ROLES}  # noqa: RUF012
    TITLE = "finetui"
    BINDINGS = bindings("app")
    MODES: ClassVar[dict[str, str | Callable[[], Screen[Any]]]] = {
        "plan": _plan_screen,
        "gpus": _gpus_screen,
        "data": _data_screen,
        "launch": _launch_screen,
        "monitor": _monitor_screen,
        "runs": _runs_screen,
        "compare": _compare_screen,
        "logs": _logs_screen,
        "settings": _settings_screen,
    }
    PAUSE_GC_ON_SCROLL = True

    def __init__(
        self,
        mode: Mode = "plan",
        run: Run | None = None,
        recipe: Recipe | None = None,
        *,
        recipe_path: Path | None = None,
        backend: Backend | None = None,
        ascii_only: bool = False,
        theme: str = "finetui",
        preferences: Preferences | None = None,
        driver_class: Any = None,
    ) -> None:
        # The filter for NO_COLOR is chosen before the theme is: without this hint it would paint black on black.
        super().__init__(driver_class=driver_class, ansi_color=True if theme.startswith("ansi-") else None)
        self.stylesheet = SteadyStylesheet(variables=self.get_css_variables())
        self.preferences = preferences or settings.load()
        self.own_keys: dict[str, str] = {}
        self.backend = backend or Backend()
        self.planner = DraftPlanner(self.backend)
        self.watched = run
        self.marked: list[Run] = []
        """Runs that are compared; without any, the two newest."""
        self.draft: Tree = recipe.to_dict() if recipe is not None else dict(FIRST_TREE)
        self.recipe_path = recipe_path
        self.origin: tuple[str, Tree] | None = None
        """The recipe that the draft came from: what it is called, and what it said."""
        if recipe is not None and recipe_path is not None:
            self.origin = (recipe_path.name, recipe.to_dict())
        self.imported: Imported | None = None
        """The file of another tool that the draft came from."""
        self.recipe: Recipe | None = None
        self.plan: Plan | None = None
        self.edited = False
        self.machine = ""
        self._first_mode = mode
        self._untouched = recipe is None
        self._asked_to_leave = False
        self._ascii = ascii_only
        self.animation_level = "none"
        for known in THEMES:
            self.register_theme(known)
        self._automatic_theme = theme if theme in self.available_themes else "finetui"
        self._problems = [*self.preferences.problems, *self._apply_preferences()]

    def on_mount(self) -> None:
        """Open the first screen and look at this machine."""
        self.switch_mode(self._first_mode)
        if self._problems:
            self.notify("\n".join(self._problems), title="settings", severity="warning", timeout=20)
        self.call_after_refresh(  # the first picture comes first
            self.run_worker, self._look_around, thread=True, group="machine", exit_on_error=False
        )

    def get_line_filters(self) -> Sequence[LineFilter]:
        """Textual's filters, one for what a terminal would obey, and ASCII last where it has nothing else."""
        from .printable_filter import PrintableFilter

        filters = [*super().get_line_filters(), PrintableFilter()]
        if not self._ascii:
            return filters
        from .charset import AsciiFilter

        return [*filters, AsciiFilter()]

    def role_style(self, role: str) -> Style:
        """The colour of a role for widgets that are not :class:`Lines`."""
        names = {"good": "success", "warn": "warning", "bad": "error", "accent": "accent"}
        color = getattr(self.current_theme, names.get(role, ""), None) if role in names else None
        return Style.parse(color.removeprefix("ansi_")) if color else Style()

    def notify(
        self,
        message: str,
        *,
        title: str = "",
        severity: SeverityLevel = "information",
        timeout: float | None = None,
        markup: bool = False,
    ) -> None:
        """Tell the user something, as it is: paths and messages of other programs have brackets that are no markup."""
        super().notify(message, title=title, severity=severity, timeout=timeout, markup=False)

    # --- preferences

    def _apply_preferences(self) -> list[str]:
        """Do as the user prefers; gives back what is wrong with the user's keys."""
        self.theme = theme_named(self.preferences.theme, self._automatic_theme)
        format.use_memory_unit(self.preferences.memory_unit)
        self.own_keys, problems = key_map(self.preferences.keys)
        self.set_keymap(self.own_keys)
        return problems

    def prefer(self, name: str, value: Value) -> None:
        """Keep one setting, in the file and from now on.

        Raises:
            SettingsError: it can't have this value, a key would mean two things, or the file can't be written.
        """
        if name == "keys":
            _, problems = key_map(cast("Mapping[str, str]", value))
            if problems:
                raise SettingsError(problems[0].removeprefix("keys: "), where="keys", do="Choose another key.")
        self.preferences = settings.save(name, value)
        self._apply_preferences()

    def reread_preferences(self) -> list[str]:
        """Read the file of settings again; gives back what is wrong with it."""
        self.preferences = settings.load()
        return [*self.preferences.problems, *self._apply_preferences()]

    def _look_around(self) -> None:
        try:
            machine = self.backend.machine()
        except FinetuiError as error:
            machine = error.what
        self.call_later(self._take_machine, machine)

    def _take_machine(self, machine: str) -> None:
        self.machine = machine
        if machine == "CPU only" and self._untouched and not self.edited:
            self.draft = {**self.draft, "hardware": {"gpu": FIRST_GPU}}
            self.plan = self.recipe = None
        screen = self.screen_stack[0] if self.screen_stack else None
        if screen is not None and hasattr(screen, "refresh_bars"):
            screen.refresh_bars()
            if self.plan is None and hasattr(screen, "plan_again"):
                screen.plan_again(at_once=True)

    def open_recipe(self, path: Path) -> None:
        """Make a recipe file the one that is planned.

        Raises:
            RecipeError: the file can't be read or is not a recipe.
        """
        from ..planner.recipe import Recipe

        recipe = Recipe.load(path)
        self.draft, self.recipe_path, self.edited = recipe.to_dict(), path.resolve(), False
        self.origin = (_called(self.recipe_path), self.draft)
        self.recipe = self.plan = self.imported = None

    def take_imported(self, found: Imported) -> None:
        """Make what another tool's file says the one that is planned; no recipe holds it yet. Such a file names no GPU:
        that of the form stays."""
        self.edit(put(found.recipe.to_dict(), "hardware.gpu", get(self.draft, "hardware.gpu")))
        self.imported, self.origin = found, (Path(found.source).name, self.draft)

    def recipe_text(self, recipe: Recipe) -> str:
        """A recipe as YAML; one that came from another tool's file is headed by what it does not hold."""
        return recipe.to_yaml() if self.imported is None else replace(self.imported, recipe=recipe).to_yaml()

    def edit(self, draft: Tree) -> None:
        """Make a draft the one that is planned; it is not what any file holds."""
        self.draft, self.recipe_path, self.edited = draft, None, True
        self.recipe = self.plan = None

    # --- keys

    def action_mode(self, mode: Mode) -> None:
        """Go to a screen; dialogs stay in front of theirs."""
        if len(self.screen_stack) == 1 and self.current_mode != mode:
            self.switch_mode(mode)

    def pop_screen(self) -> AwaitComplete:
        """Close the dialog in front. Of two keys on their way that close it, the second finds it closed."""
        return super().pop_screen() if len(self.screen_stack) > 1 else AwaitComplete.nothing()

    def action_keys(self) -> None:
        """List all keys."""
        from .screens.help import Help

        if len(self.screen_stack) == 1:
            self.push_screen(Help(str(self.current_mode), self.own_keys))

    def action_try_it(self) -> None:
        """Without any run: plan the shipped model and data, on this machine, and go to where they are started."""
        from ..planner.hardware import PRESETS
        from .screens.base import BaseScreen

        offered = self.screen.keys_shown() if isinstance(self.screen, BaseScreen) else []
        if not any(key.action == "app.try_it" for key in offered):
            self.notify("This is for a first run, and there are runs. o on Plan opens another recipe.")
            return
        if self.edited:
            self.notify("This plan is not saved yet. s on Plan saves it.", severity="warning")
            return
        self.open_recipe(PRESETS / "quickstart.yaml")
        self.action_mode("launch")

    def choose_data(self) -> None:
        """Go to the plan's field for data, and ask there."""
        self.action_mode("plan")
        self.call_later(self._begin_edit, "data")

    def _begin_edit(self, key: str) -> None:
        if hasattr(self.screen, "begin_edit"):
            self.screen.begin_edit(key)

    def _refresh_notifications(self) -> None:
        """Show the notices, no more of them than leave the screen readable; see :func:`spare`."""
        from .notices import spare

        for notice in spare(list(self._notifications), self.size.height):
            del self._notifications[notice]
        super()._refresh_notifications()

    def action_hush(self) -> None:
        """Take the notices away."""
        self.clear_notifications()

    def action_leave(self) -> None:
        """Leave; a recipe that was edited and not saved is worth a second press."""
        if self.edited and self.current_mode in ("plan", "launch") and not self._asked_to_leave:
            self._asked_to_leave = True
            how = "s saves it" if self.current_mode == "plan" else "s on Plan saves it"
            self.notify(f"This plan is not saved. {how}, q again leaves.", severity="warning")
            self.set_timer(6, self._forget_question)
            return
        self.exit()

    def _forget_question(self) -> None:
        self._asked_to_leave = False

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        """Every key of the table by what it does, for the command palette."""
        scope = str(self.current_mode)
        for key in rebound([*keys_of(scope), *keys_of("app")], self.own_keys):
            name, _, argument = key.action.partition("(")
            target = self if name.startswith("app.") else screen
            act = getattr(target, f"action_{name.removeprefix('app.')}", None)
            if act is None or name in ("app.command_palette",):
                continue
            value = argument.rstrip(")")
            arguments = [value.strip("'")] if value.startswith("'") else [int(value)] if value else []
            title = f"{scope if target is screen else 'finetui'}: {key.label or key.help}"
            yield SystemCommand(
                title, f"{key.help} ({key.shown})", lambda act=act, arguments=arguments: act(*arguments)
            )


def _called(path: Path) -> str:
    """A recipe by the name that tells it from others: that of its run where it is a run's."""
    return f"{path.parent.name}'s recipe" if (path.parent / "run.json").is_file() else path.name


def run_app(
    *,
    mode: Mode | None = None,
    run: Run | None = None,
    recipe: Recipe | None = None,
    recipe_path: Path | None = None,
    backend: Backend | None = None,
) -> None:
    """Open the app on this terminal; returns when the user leaves.

    Args:
        mode: the screen to begin with; None is Monitor for a run, else Plan.
        run: the run to watch.
        recipe: what to plan, and ``recipe_path`` its file.
        backend: what does the work; runs of another machine have their own.

    Raises:
        UserError: this terminal can't show it; the message names what to use instead.
        SystemExit: a signal or a mistake of ours has ended it.
    """
    from .console import Console
    from .driver import ForgivingDriver

    # Textual draws on standard error and reads standard input.
    tty = all(stream is not None and stream.isatty() for stream in (sys.__stdin__, sys.__stdout__, sys.__stderr__))
    browser = "TEXTUAL_DRIVER" in os.environ  # textual-serve brings its own, on pipes
    if not browser and (why := terminal.refusal(os.environ, tty=tty)):
        raise UserError(why, do="Use a verb instead, such as: finetui plan, finetui runs or finetui attach RUN")
    os.environ.setdefault("TEXTUAL_SMOOTH_SCROLL", "0")
    preferences = settings.load()
    charset = {"FINETUI_CHARSET": preferences.charset, **terminal.surroundings()}
    chosen = "NO_COLOR" not in os.environ and "TEXTUAL_THEME" not in os.environ
    app = FinetuiApp(
        mode or ("monitor" if run is not None else "plan"),
        run,
        recipe,
        recipe_path=recipe_path,
        backend=backend,
        ascii_only=not browser and terminal.wants_ascii(charset),
        preferences=preferences if chosen else replace(preferences, theme="auto"),
        theme="finetui" if browser else terminal.theme_for(os.environ),
        driver_class=None if browser else ForgivingDriver,
    )
    app.error_console = Console(markup=False, highlight=False, stderr=True)
    terminal.watch_for_hangup()
    app.run(mouse=os.environ.get("FINETUI_MOUSE", "1" if preferences.mouse else "0") != "0")
    watched = app.watched
    if watched is not None and backend is None and watched.path.is_dir() and watched.live:
        print(f"{watched.name} goes on. Watch it again with: finetui attach {watched.name}", file=sys.stderr)
    if app.return_code:
        raise SystemExit(app.return_code)
