"""One table of keys drives what a key does, what the bar at the foot shows and what the help screen lists.

Only letters, digits, tab, enter, escape and arrows: these alone come through tmux, mosh and web terminals unchanged.
Where there is a function key there is a letter too, and escape is never the only way out.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from textual.binding import Binding, BindingType
from textual.keys import KEY_NAME_REPLACEMENTS, key_to_character


@dataclass(frozen=True)
class Key:
    """One row of the table.

    ``keys`` are Textual's names, separated by commas, the one to show first; ``scope`` is the screen that listens,
    or ``app`` for all of them; ``label`` is for the bar, or empty to leave it out there; ``help`` says what happens.
    """

    keys: str
    action: str
    scope: str
    label: str
    help: str

    @property
    def id(self) -> str:
        """The row's name in a user's own table of keys: ``plan.save``, ``app.mode.gpus``, ``gpus.move.-1``."""
        name, _, argument = self.action.removeprefix("app.").partition("(")
        argument = argument.rstrip(")").strip("'")
        return ".".join([self.scope, name, *([argument] if argument else [])])

    @property
    def shown(self) -> str:
        """The first key as a reader would name it."""
        return key_name(self.keys.split(",")[0])

    @property
    def all_shown(self) -> str:
        """Every key as a reader would name it."""
        return " ".join(key_name(key) for key in self.keys.split(","))


_NAMES = {
    "question_mark": "?", "left": "←", "right": "→", "up": "↑", "down": "↓", "escape": "esc", "slash": "/",
    "plus": "+", "minus": "-", "comma": ",", "full_stop": ".", "at": "@", "underscore": "_", "backslash": "\\",
    "left_square_bracket": "[", "right_square_bracket": "]", "pageup": "pgup", "pagedown": "pgdn",
}  # fmt: skip

#: Title of each scope, in the order of the help screen.
SCOPES = {
    "app": "Everywhere",
    "plan": "Plan",
    "field": "A field of a form",
    "terms": "A figure of the plan",
    "gpus": "GPUs",
    "data": "Data",
    "launch": "Launch",
    "monitor": "Monitor",
    "runs": "Runs",
    "compare": "Compare",
    "logs": "Logs",
    "settings": "Settings",
}

KEYS: tuple[Key, ...] = (
    Key("1", "app.mode('plan')", "app", "", "Plan: what a run will need, take and cost"),
    Key("2", "app.mode('gpus')", "app", "", "GPUs: this plan on every machine for rent"),
    Key("3", "app.mode('data')", "app", "", "Data: what is trained on, token by token"),
    Key("4", "app.mode('launch')", "app", "", "Launch: check everything, then start the plan"),
    Key("5", "app.mode('monitor')", "app", "", "Monitor: watch one run"),
    Key("6", "app.mode('runs')", "app", "", "Runs: all runs of this machine"),
    Key("7", "app.mode('compare')", "app", "", "Compare: marked runs on one chart"),
    Key("8", "app.mode('logs')", "app", "", "Logs: what the ranks of a run print"),
    Key("9", "app.mode('settings')", "app", "", "Settings: theme, units, alerts, prices, keys, folders"),
    Key("tab", "app.focus_next", "app", "", "Go to the next field or pane"),
    Key("shift+tab", "app.focus_previous", "app", "", "Go to the previous field or pane"),
    Key("escape", "app.hush", "app", "", "Take the notices away; they go by themselves, too"),
    Key("question_mark,f1", "app.keys", "app", "Help", "This list"),
    Key("ctrl+p", "app.command_palette", "app", "", "Find any command by its name"),
    Key("q", "app.leave", "app", "Quit", "Leave finetui; runs go on without it"),
    Key("enter,space", "edit", "field", "Edit", "Type a value or choose one from the list"),
    Key("right,l", "step(1)", "field", "", "The next value"),
    Key("left,h", "step(-1)", "field", "", "The previous value"),
    Key("down,j", "app.focus_next", "field", "", "The field below"),
    Key("up,k", "app.focus_previous", "field", "", "The field above"),
    Key("a,backspace", "auto", "field", "Auto", "Let the planner choose; on Settings, the default"),
    Key("enter,space", "explain", "terms", "Formula", "How this figure is reckoned, with its numbers"),
    Key("down,j", "term(1)", "terms", "", "The figure below"),
    Key("up,k", "term(-1)", "terms", "", "The figure above"),
    Key("b", "browse", "plan", "Models", "All models on this GPU, by size, speed or memory, to choose one from"),
    Key("o", "open", "plan", "Open", "Open a recipe, a preset, or a training file of another tool"),
    Key("i", "import_", "plan", "Import", "Make a recipe of an Axolotl, LLaMA-Factory, torchtune or TRL file"),
    Key("s", "save", "plan", "Save", "Save this plan's recipe as a YAML file"),
    Key("m", "here", "plan", "This machine", "Plan for this machine again"),
    Key("right_square_bracket,pagedown", "scroll(1)", "plan", "", "Scroll the reasons down"),
    Key("left_square_bracket,pageup", "scroll(-1)", "plan", "", "Scroll the reasons up"),
    Key("enter", "use", "gpus", "Use", "Plan for this machine"),
    Key("s", "sort", "gpus", "Sort", "Sort by cost of the run, time, price per hour, memory"),
    Key("f", "everything", "gpus", "All", "Show machines that it does not fit on, or hide them"),
    Key("slash", "filter", "gpus", "Filter", "Only offers with these words in provider or GPU"),
    Key("i", "spot", "gpus", "Spot", "Interruptible prices, or those on demand"),
    Key("space", "mark", "gpus", "Mark", "Mark this offer"),
    Key("w", "job", "gpus", "Job", "Write a SkyPilot, Slurm or Modal job that carries out this plan there"),
    Key("t", "compare", "gpus", "Compare", "The marked offers side by side"),
    Key("v", "marked", "gpus", "Marked", "Only the marked offers, or all of them"),
    Key("a", "apply(0)", "gpus", "", "Take the first change that is offered, on this machine"),
    Key("b", "apply(1)", "gpus", "", "Take the second"),
    Key("c", "apply(2)", "gpus", "", "Take the third"),
    Key("down,j", "move(1)", "gpus", "", "The offer below"),
    Key("up,k", "move(-1)", "gpus", "", "The offer above"),
    Key("enter", "choose", "data", "Choose data", "Name the data in its field on Plan"),
    Key("n", "example(1)", "data", "Next", "The next example"),
    Key("p", "example(-1)", "data", "Previous", "The example before"),
    Key("m", "marks", "data", "Marks", "Trained tokens in [[ ]], or a bar between tokens"),
    Key("r", "again", "data", "Read again", "Read the data again"),
    Key("right_square_bracket", "scroll(1)", "data", "", "Scroll the facts down"),
    Key("left_square_bracket", "scroll(-1)", "data", "", "Scroll the facts up"),
    Key("enter", "activate", "launch", "Start", "Start the run, or edit the field with the cursor"),
    Key("y", "copy", "launch", "Copy command", "Copy the command that does the same"),
    Key("r", "check", "launch", "Check again", "Make all checks again"),
    Key("down,j", "app.focus_next", "launch", "", "The next field or pane"),
    Key("up,k", "app.focus_previous", "launch", "", "The previous field or pane"),
    Key("b", "app.try_it", "monitor", "First run", "Plan the shipped tiny model: a minute's work, anywhere"),
    Key("x", "stop", "monitor", "Stop", "Write a checkpoint, then end the run"),
    Key("w", "checkpoint", "monitor", "Checkpoint", "Write a checkpoint now and go on"),
    Key("r", "resume", "monitor", "Resume", "Go on from the last checkpoint"),
    Key("v", "view", "monitor", "View", "Log, answers, predicted beside measured, or memory of each rank"),
    Key("left,h", "read(-1)", "monitor", "Read", "Read all curves off at one step, from the newest one backwards"),
    Key("right,l", "read(1)", "monitor", "", "One column on; past the newest step the latest values stand there again"),
    Key("pageup,left_square_bracket", "read(-10)", "monitor", "", "Ten columns back"),
    Key("pagedown,right_square_bracket", "read(10)", "monitor", "", "Ten columns on"),
    Key("z", "zoom", "monitor", "Zoom", "All of the run in the charts, its newest quarter, or its newest sixteenth"),
    Key("s", "smooth", "monitor", "Smooth", "Smooth the loss more, less, or not at all"),
    Key("y", "log_scale", "monitor", "Log scale", "Draw the loss on a logarithmic axis, or a linear one"),
    Key("t", "figure(1)", "monitor", "Figures", "The next figure: rewards, KL, learning rate, GPU load, heat, memory"),
    Key("T", "figure(-1)", "monitor", "", "The figure before"),
    Key("g", "gpus", "monitor", "GPUs", "Memory and load of the GPUs, or their clocks, traffic and errors"),
    Key("e", "report", "monitor", "Report", "Write the run's report here: Markdown, CSV and SVG"),
    Key("n", "switch(1)", "monitor", "Next run", "Watch the next run"),
    Key("p", "switch(-1)", "monitor", "", "Watch the previous run"),
    Key("K", "kill", "monitor", "", "End the run's processes at once, without a checkpoint"),
    Key("d", "app.leave", "monitor", "Detach", "Leave finetui; the run goes on"),
    Key("enter", "watch", "runs", "Watch", "Open the run in Monitor"),
    Key("b", "app.try_it", "runs", "First run", "Plan the shipped tiny model: a minute's work, anywhere"),
    Key("x", "stop", "runs", "Stop", "Write a checkpoint, then end the run"),
    Key("r", "resume", "runs", "Resume", "Go on from the last checkpoint"),
    Key("space", "mark", "runs", "Mark", "Mark the run for comparison"),
    Key("c", "compare", "runs", "Compare", "Compare the marked runs"),
    Key("s", "sort", "runs", "Sort", "Newest first, or by held-out loss, loss, speed, cost, name"),
    Key("slash", "filter", "runs", "Filter", "Only runs with these words in name, state, model, tuning or GPU"),
    Key("l", "logs", "runs", "Logs", "Read the run's logs"),
    Key("e", "reuse", "runs", "Plan anew", "Open the run's recipe in Plan"),
    Key("y", "copy", "runs", "Copy path", "Copy the path of the run's directory"),
    Key("D", "delete", "runs", "Delete", "Delete the run's directory, after a question"),
    Key("down,j", "move(1)", "runs", "", "The run below"),
    Key("up,k", "move(-1)", "runs", "", "The run above"),
    Key("b", "app.try_it", "compare", "First run", "Plan the shipped tiny model: a minute's work, anywhere"),
    Key("t,m", "curve", "compare", "Figures", "The next figure: loss, its mean, held-out loss, gradient norm, …"),
    Key("z", "zoom", "compare", "Zoom", "All of the axis, its newest quarter, or its newest sixteenth"),
    Key("a", "axis", "compare", "Axis", "Over steps, tokens, time or money"),
    Key("y", "log_scale", "compare", "Log scale", "A logarithmic axis, or a linear one"),
    Key("left,h", "read(-1)", "compare", "Read", "Read all curves off at one place, from the newest one backwards"),
    Key("right,l", "read(1)", "compare", "", "One column on; past the newest the latest values stand there again"),
    Key("left_square_bracket", "read(-10)", "compare", "", "Ten columns back"),
    Key("right_square_bracket", "read(10)", "compare", "", "Ten columns on"),
    Key("b", "app.try_it", "logs", "First run", "Plan the shipped tiny model: a minute's work, anywhere"),
    Key("r", "source", "logs", "Rank", "The next rank's log, or the events"),
    Key("f", "follow", "logs", "Follow", "Stay at the end as it grows, or stay here"),
    Key("slash", "search", "logs", "Search", "Find text"),
    Key("n", "next(1)", "logs", "Next", "The next line that holds it"),
    Key("N", "next(-1)", "logs", "", "The line before that holds it"),
    Key("down,j", "scroll(1)", "logs", "", "One line down"),
    Key("up,k", "scroll(-1)", "logs", "", "One line up"),
    Key("pagedown,right_square_bracket", "page(1)", "logs", "", "One page down"),
    Key("pageup,left_square_bracket", "page(-1)", "logs", "", "One page up"),
    Key("g,home", "end(-1)", "logs", "", "To the first line that is kept"),
    Key("G,end", "end(1)", "logs", "", "To the last line"),
    Key("y", "copy", "settings", "Copy path", "Copy the path of the file that holds the settings"),
    Key("r", "reread", "settings", "Read again", "Read the file again"),
)  # fmt: skip


def key_name(key: str) -> str:
    """A Textual key name as a reader would write it: ``question_mark`` is ``?``, ``f1`` is ``F1``."""
    if key.startswith("f") and key[1:].isdigit():
        return key.upper()
    if key in _NAMES:
        return _NAMES[key]
    if "+" in key or key in _ALONE:
        return key.replace("ctrl+", "^")
    return key_to_character(key) or key


def key_of(mode: str) -> str:
    """The key that goes to a screen."""
    return next(key.keys for key in KEYS if key.action == f"app.mode('{mode}')")


def keys_of(scope: str) -> list[Key]:
    """The rows of one scope, in order."""
    return [key for key in KEYS if key.scope == scope]


def bindings(scope: str) -> list[BindingType]:
    """The rows of one scope as Textual bindings; their ids are those of a user's own table of keys."""
    return [
        Binding(key.keys, key.action, key.label or key.help, id=key.id, tooltip=key.help, show=False)
        for key in keys_of(scope)
    ]


# --- keys of the user's own

#: What tmux, screen, VS Code, terminals and Textual itself keep, which therefore never arrives.
TAKEN = frozenset({
    "ctrl+a", "ctrl+b", "ctrl+s", "ctrl+q", "ctrl+z", "ctrl+c", "ctrl+@", "ctrl+w", "ctrl+t", "ctrl+m", "ctrl+i",
    "ctrl+j", "ctrl+h", "ctrl+[",
})  # fmt: skip
_ALONE = frozenset({"space", "tab", "enter", "escape", "backspace", "delete", "home", "end", "up", "down", "left",
                    "right", "pageup", "pagedown", "insert"})  # fmt: skip


def normal(keys: str) -> str:
    """Keys as a user writes them (``S``, ``?``, ``^x, pgdn``) by Textual's names, separated by commas.

    Raises:
        ValueError: one of them is no key, or one that terminals keep; the message says which and why.
    """
    words = [word.strip() for word in keys.split(",")] if keys.strip() != "," else ["comma"]
    return ",".join(_normal(word) for word in words)


def _normal(word: str) -> str:
    name = {shown: key for key, shown in _NAMES.items()}.get(word, word)
    name = f"ctrl+{word[1:].lower()}" if len(word) > 1 and word[0] == "^" else name
    name = name.lower() if len(name) > 1 else name
    if len(name) == 1:
        return name if name.isalnum() else _spelt(name)
    if name in TAKEN or name.startswith(("alt+", "super+", "meta+", "shift+ctrl+")):
        raise ValueError(f"{word} never arrives: the terminal, tmux or screen keeps it")
    bare = name.removeprefix("ctrl+").removeprefix("shift+")
    known = bare in _ALONE or bare in _NAMES or (len(bare) == 1 and name.startswith("ctrl+") and bare.isalpha())
    if not known and not (bare[:1] == "f" and bare[1:].isdigit() and 1 <= int(bare[1:]) <= 12):
        raise ValueError(f"{word!r} is no key")
    return name


def _spelt(character: str) -> str:
    """Textual's name of a key that is neither letter nor digit."""
    name = unicodedata.name(character, "").lower().replace("-", "_").replace(" ", "_")
    if not name:
        raise ValueError(f"{character!r} is no key")
    return KEY_NAME_REPLACEMENTS.get(name, name)


def key_map(own: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """A user's own keys as they can be used, and what is wrong with the others, a sentence each.

    What would make one key mean two things on a screen is refused, all of it: half a table is worse than none.
    """
    rows = {key.id: key for key in KEYS}
    chosen: dict[str, str] = {}
    problems = []
    for name, keys in own.items():
        if name not in rows:
            near = difflib.get_close_matches(name, rows, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            problems.append(f"keys: there is no command {name!r}.{hint}")
            continue
        try:
            chosen[name] = normal(keys)
        except ValueError as error:
            problems.append(f"keys: {name}: {error}.")
    clashes = _clashes(rebound(KEYS, chosen), set(chosen))
    return ({} if clashes else chosen), [*problems, *clashes]


def rebound(keys: Iterable[Key], own: Mapping[str, str]) -> list[Key]:
    """Rows of the table with a user's own keys in them."""
    return [replace(key, keys=own[key.id]) if key.id in own else key for key in keys]


#: Scopes that listen at the same time as another one.
_WITHIN = {"field": ("plan", "launch", "settings"), "terms": ("plan",)}


def _clashes(keys: list[Key], changed: set[str]) -> list[str]:
    """Each key that would mean two things where a changed row listens."""
    found = []
    for key in keys:
        if key.id not in changed:
            continue
        for other in keys:
            together = (
                other.scope in (key.scope, "app") or key.scope == "app" or other.scope in _WITHIN.get(key.scope, ())
                or key.scope in _WITHIN.get(other.scope, ())
            )  # fmt: skip
            both = set(key.keys.split(",")) & set(other.keys.split(","))
            again = other.id in changed and other.id < key.id  # told already, the other way round
            if other.action != key.action and together and both and not again:
                names = " and ".join(sorted(key_name(name) for name in both))
                found.append(f"keys: {names} would be both {key.id} and {other.id}.")
    return found
