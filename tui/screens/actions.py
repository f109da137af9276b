"""What can be done to a run, from Monitor and from Runs: asked first where it can't be undone, done in a thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ...engine.run import Run
from ...planner.errors import FinetuiError
from .editor import Confirm

if TYPE_CHECKING:
    from ..app import FinetuiApp


def stop(app: FinetuiApp, run: Run) -> None:
    """Ask, then write a checkpoint and end."""
    question = f"Stop {run.name}?\nIt writes a checkpoint first and can be resumed."
    _ask(app, "stop", question, lambda: app.backend.stop(run), f"{run.name} stops after its checkpoint.")


def kill(app: FinetuiApp, run: Run) -> None:
    """Ask, then end the processes at once."""
    pid = run.recorded.pid
    question = f"Kill {run.name} (process {pid} and its ranks)?\nThe steps since the last checkpoint are lost."
    _ask(app, "kill", question, lambda: app.backend.kill(run), f"{run.name} was killed.")


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
