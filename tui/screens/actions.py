"""What can be done to a run, from Monitor and from Runs: asked first where it can't be undone, done in a thread."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ...engine.run import Run
from ...planner.errors import FinetuiError
from .. import format  # noqa: A004
from ..alerts import GRAVE, STATES, Alert, sound
from ..processes import family
from .editor import Confirm

if TYPE_CHECKING:
    from ..app import FinetuiApp

#: Processes named in a question; more of them are too many to read.
_NAMED = 12


def stop(app: FinetuiApp, run: Run) -> None:
    """Ask, then write a checkpoint and end."""
    question = f"Stop {run.name}?\nIt writes a checkpoint first and can be resumed."
    _ask(app, "stop", question, lambda: app.backend.stop(run), f"{run.name} stops after its checkpoint.")


def kill(app: FinetuiApp, run: Run) -> None:
    """Ask, naming the processes, then end them at once."""
    named = "\n".join(f"  {process}" for process in family(run)[:_NAMED]) or f"  process {run.recorded.pid}"
    question = f"Kill {run.name}?\n{named}\nThe steps since the last checkpoint are lost."
    _ask(app, "kill", question, lambda: app.backend.kill(run), f"{run.name} was killed.")


def announce(app: FinetuiApp, alert: Alert, run: str, *, seen: bool) -> None:
    """Tell an alert on the screen, unless what is in front tells it (``seen``), and outside as the user wants it."""
    if not (seen and alert.kind in STATES):
        app.notify(alert.text, title=alert.kind, severity="error" if alert.kind in GRAVE else "information", timeout=30)
    sequence = sound(alert, run, app.preferences)
    if sequence and app._driver is not None and not app.is_web:  # Textual has a bell, but no desktop notifications
        app._driver.write(sequence)


def resume(app: FinetuiApp, run: Run) -> None:
    """Go on from the last checkpoint."""
    _do(app, "resume", lambda: app.backend.resume(run), f"{run.name} goes on.")


def checkpoint(app: FinetuiApp, run: Run) -> None:
    """Write a checkpoint now."""
    _do(app, "checkpoint", lambda: app.backend.checkpoint(run), "A checkpoint follows the current step.")


def delete(app: FinetuiApp, run: Run) -> None:
    """Ask, then delete the directory."""
    question = f"Delete {run.path}?\nIts checkpoints and its output go with it."
    _ask(app, "delete", question, lambda: app.backend.delete(run), f"{run.name} was deleted.")


def report(app: FinetuiApp, run: Run) -> None:
    """Write the run's report into the current folder: a summary, its steps, its loss."""
    files = [Path(f"{run.name}.{ending}").resolve() for ending in ("md", "csv", "svg")]

    def write() -> None:
        from ..report import write_files

        write_files(run, *files)

    _do(app, "report", write, "\n".join(format.path(file) for file in files))


def _ask(app: FinetuiApp, title: str, question: str, act: Callable[[], None], done: str) -> None:
    def answered(yes: bool | None) -> None:
        if yes:
            _do(app, title, act, done)

    app.push_screen(Confirm(title, question), answered)


def _do(app: FinetuiApp, title: str, act: Callable[[], None], done: str) -> None:
    def work() -> None:
        try:
            act()
        except FinetuiError as error:
            app.notify(str(error), title=f"{title}: not done", severity="error", timeout=12)
        else:
            app.notify(done)

    app.run_worker(work, thread=True, group="runs", exit_on_error=False)
