"""One table of keys drives what a key does, what the bar at the foot shows and what the help screen lists.

Only letters, digits, tab, enter, escape and arrows: these alone come through tmux, mosh and web terminals unchanged.
Where there is a function key there is a letter too, and escape is never the only way out.
"""

from __future__ import annotations

from dataclasses import dataclass

from textual.binding import Binding, BindingType


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
    def shown(self) -> str:
        """The first key as a reader would name it."""
        return key_name(self.keys.split(",")[0])

    @property
    def all_shown(self) -> str:
        """Every key as a reader would name it."""
        return " ".join(key_name(key) for key in self.keys.split(","))


_NAMES = {
    "question_mark": "?", "left": "←", "right": "→", "up": "↑", "down": "↓", "escape": "esc", "slash": "/",
    "left_square_bracket": "[", "right_square_bracket": "]", "pageup": "pgup", "pagedown": "pgdn",
}  # fmt: skip

#: Title of each scope, in the order of the help screen.
SCOPES = {
    "app": "Everywhere",
    "plan": "Plan",
    "field": "A field of the plan",
    "gpus": "GPUs",
    "data": "Data",
    "launch": "Launch",
    "monitor": "Monitor",
    "runs": "Runs",
    "compare": "Compare",
    "logs": "Logs",
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
    Key("tab", "app.focus_next", "app", "", "Go to the next field or pane"),
    Key("shift+tab", "app.focus_previous", "app", "", "Go to the previous field or pane"),
    Key("question_mark,f1", "app.keys", "app", "Help", "This list"),
    Key("ctrl+p", "app.command_palette", "app", "", "Find any command by its name"),
    Key("q", "app.leave", "app", "Quit", "Leave finetui; runs go on without it"),
    Key("enter,space", "edit", "field", "Edit", "Type a value or choose one from the list"),
    Key("right,l", "step(1)", "field", "", "The next value"),
    Key("left,h", "step(-1)", "field", "", "The previous value"),
    Key("down,j", "app.focus_next", "field", "", "The field below"),
    Key("up,k", "app.focus_previous", "field", "", "The field above"),
    Key("a,backspace", "auto", "field", "Auto", "Let the planner choose this value"),
    Key("o", "open", "plan", "Open", "Open a recipe"),
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
    Key("v", "marked", "gpus", "Marked", "Only the marked offers, or all of them"),
    Key("a", "apply(0)", "gpus", "", "Take the first change that is offered, on this machine"),
    Key("b", "apply(1)", "gpus", "", "Take the second"),
    Key("c", "apply(2)", "gpus", "", "Take the third"),
    Key("down,j", "move(1)", "gpus", "", "The offer below"),
    Key("up,k", "move(-1)", "gpus", "", "The offer above"),
    Key("n", "example(1)", "data", "Next", "The next example"),
    Key("p", "example(-1)", "data", "Previous", "The example before"),
    Key("r", "again", "data", "Read again", "Read the data again"),
    Key("right_square_bracket", "scroll(1)", "data", "", "Scroll the facts down"),
    Key("left_square_bracket", "scroll(-1)", "data", "", "Scroll the facts up"),
    Key("enter", "activate", "launch", "Start", "Start the run, or edit the field with the cursor"),
    Key("y", "copy", "launch", "Copy command", "Copy the command that does the same"),
    Key("r", "check", "launch", "Check again", "Make all checks again"),
    Key("down,j", "app.focus_next", "launch", "", "The next field or pane"),
    Key("up,k", "app.focus_previous", "launch", "", "The previous field or pane"),
    Key("x", "stop", "monitor", "Stop", "Write a checkpoint, then end the run"),
    Key("w", "checkpoint", "monitor", "Checkpoint", "Write a checkpoint now and go on"),
    Key("r", "resume", "monitor", "Resume", "Go on from the last checkpoint"),
    Key("y", "log_scale", "monitor", "Log scale", "Draw the loss on a logarithmic axis, or a linear one"),
    Key("t", "figure", "monitor", "Figures", "The next figure: rewards, margins, KL, learning rate"),
    Key("v", "view", "monitor", "View", "Log, answers, or predicted beside measured"),
    Key("n", "switch(1)", "monitor", "Next run", "Watch the next run"),
    Key("p", "switch(-1)", "monitor", "", "Watch the previous run"),
    Key("K", "kill", "monitor", "", "End the run's processes at once, without a checkpoint"),
    Key("d", "app.leave", "monitor", "Detach", "Leave finetui; the run goes on"),
    Key("enter", "watch", "runs", "Watch", "Open the run in Monitor"),
    Key("x", "stop", "runs", "Stop", "Write a checkpoint, then end the run"),
    Key("r", "resume", "runs", "Resume", "Go on from the last checkpoint"),
    Key("e", "reuse", "runs", "Plan anew", "Open the run's recipe in Plan"),
    Key("y", "copy", "runs", "Copy path", "Copy the path of the run's directory"),
    Key("D", "delete", "runs", "Delete", "Delete the run's directory, after a question"),
    Key("space", "mark", "runs", "Mark", "Mark the run for comparison"),
    Key("c", "compare", "runs", "Compare", "Compare the marked runs"),
    Key("l", "logs", "runs", "Logs", "Read the run's logs"),
    Key("down,j", "move(1)", "runs", "", "The run below"),
    Key("up,k", "move(-1)", "runs", "", "The run above"),
    Key("m", "curve", "compare", "Figure", "Loss, held-out loss, gradient norm or speed"),
    Key("a", "axis", "compare", "Axis", "Over steps, tokens, time or money"),
    Key("y", "log_scale", "compare", "Log scale", "A logarithmic axis, or a linear one"),
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
)  # fmt: skip


def key_name(key: str) -> str:
    """A Textual key name as a reader would write it: ``question_mark`` is ``?``, ``f1`` is ``F1``."""
    if key.startswith("f") and key[1:].isdigit():
        return key.upper()
    return _NAMES.get(key, key.replace("ctrl+", "^"))


def key_of(mode: str) -> str:
    """The key that goes to a screen."""
    return next(key.keys for key in KEYS if key.action == f"app.mode('{mode}')")


def keys_of(scope: str) -> list[Key]:
    """The rows of one scope, in order."""
    return [key for key in KEYS if key.scope == scope]


def bindings(scope: str) -> list[BindingType]:
    """The rows of one scope as Textual bindings."""
    return [
        Binding(key.keys, key.action, key.label or key.help, id=f"{scope}.{number}", tooltip=key.help, show=False)
        for number, key in enumerate(keys_of(scope))
    ]
