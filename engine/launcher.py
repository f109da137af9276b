"""Start, stop, end and resume runs, from any process: the command line, the app, a script.

What is started here outlives whoever started it: the supervisor has its own session and no terminal, so closing the
terminal, SIGHUP or the death of the caller never reach it. All that follows goes through the run directory.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from ..planner.errors import RunError
from . import bytecode
from .checkpoints.continuation import before_resuming
from .modes import FILE
from .run import Run
from .status import LIVE_STATES

_PACKAGE = (__package__ or "finetui.engine").partition(".")[0]

#: What a rank runs, as arguments of Python; the run directory follows.
WORKER: tuple[str, ...] = ("-P", "-m", f"{_PACKAGE}.engine.worker")
#: The same for a run with stages, which has this one process.
STAGES: tuple[str, ...] = ("-P", "-m", f"{_PACKAGE}.engine.stages")


def start(run: Run, *, worker: Sequence[str] | None = None) -> int:
    """Start a run in the background; return its supervisor's pid once it is at work.

    Args:
        worker: what each rank runs, as arguments of Python before the run directory; by default :data:`WORKER`, or
            :data:`STAGES` for a run with stages.

    Raises:
        RunError: the run is at work already, or has finished, or its supervisor could not start.
    """
    status = run.status
    if status.state in LIVE_STATES and status.pid:
        raise RunError("is at work already", where=run.name, do=f"Watch it with: finetui attach {run.name}")
    if status.state == "finished":
        raise RunError("has finished already", where=run.name, do="Start a new run with: finetui run RECIPE")
    worker = worker or (STAGES if run.plan.stages else WORKER)
    ready, told = os.pipe()
    try:
        with open(run.path / "log" / "supervisor.log", "ab", opener=_private) as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", f"{_PACKAGE}.engine.supervisor", "--ready-fd", str(told),
                 str(run.path.resolve()), "--", *worker],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, pass_fds=(told,),
                env={**os.environ, **import_environment(), **bytecode.environment(os.environ)}, cwd=run.path,
            )  # fmt: skip
    except OSError as error:
        os.close(ready)
        raise RunError(f"the run can't be started ({error.strerror})", where=str(run.path)) from error
    finally:
        os.close(told)
    # Somebody must wait for a child, or it stays behind as a zombie for as long as this process lives.
    threading.Thread(target=process.wait, name=f"wait-{run.name}", daemon=True).start()
    with open(ready, encoding="utf-8") as pipe:
        answer = pipe.read()
    if answer.strip() == "ready":
        return process.pid
    try:
        error_parts = json.loads(answer)
    except ValueError:
        last = _last_line(run.path / "log" / "supervisor.log")
        raise RunError(
            f"the run could not be started{f' ({last})' if last else ''}",
            where=run.name,
            do=f"See {run.path / 'log' / 'supervisor.log'}",
        ) from None
    raise RunError(error_parts["what"], where=error_parts["where"], do=error_parts["do"])


def stop(run: Run) -> None:
    """Ask a run to write a checkpoint and end. Asking twice does no harm.

    Raises:
        RunError: the run is not at work.
    """
    _require_live(run)
    run.request("stop")


def checkpoint_now(run: Run) -> None:
    """Ask a run to write a checkpoint after the step it is at.

    Raises:
        RunError: the run is not at work, or is ending (which writes one anyway).
    """
    if _require_live(run) == "stopping":
        raise RunError("is stopping, which writes a checkpoint", where=run.name)
    run.request("checkpoint")


def kill(run: Run, *, grace_s: float = 15.0) -> None:
    """End a run at once, without a checkpoint; returns when nothing of it is left.

    The supervisor is asked first (SIGQUIT): it ends its ranks with TERM, then KILL, and records the state. If it does
    not answer within ``grace_s`` seconds it is killed itself, and its ranks with it.

    Raises:
        RunError: the run is not at work, or is so on another machine.
    """
    _require_live(run)
    status = run.recorded
    if status.host != socket.gethostname():
        raise RunError(f"runs on {status.host}", where=run.name, do="Run this command there, or use: finetui stop")
    try:
        supervisor = psutil.Process(status.pid)
        family = [supervisor, *supervisor.children(recursive=True)]
        supervisor.send_signal(signal.SIGQUIT)
        with contextlib.suppress(psutil.TimeoutExpired):
            supervisor.wait(grace_s)
    except psutil.Error:
        family = []
    for process in family:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(family, timeout=5.0)
    if run.status.state == "lost":
        message = "killed on request, without a checkpoint"
        do = f"Continue from the last checkpoint with: finetui resume {run.name}"
        run.update(state="stopped", cause=None, message=message, do=do, ended=time.time())


def resume(run: Run, *, worker: Sequence[str] | None = None) -> int:
    """Continue a run that has ended from its latest complete checkpoint; return its supervisor's pid.

    Without a checkpoint the run starts from its beginning, and a warning event says so.

    Raises:
        RunError: the run is at work, or has finished, or could not be started, or recipe or plan have changed in a way
            that its checkpoint can't go on with.
    """
    status = run.status
    if status.state in LIVE_STATES:
        raise RunError("is at work", where=run.name, do=f"Watch it with: finetui attach {run.name}")
    if status.state == "finished":
        raise RunError(
            "has finished: there is nothing to resume",
            where=run.name,
            do="To train further, start a new run with more epochs.",
        )
    before_resuming(run)
    run.withdraw("stop")
    run.withdraw("checkpoint")
    return start(run, worker=worker)


def import_environment() -> dict[str, str]:
    """What a child process needs in its environment to import this very package: PYTHONPATH, or nothing.

    Children run with ``-P`` and in another folder, so a package found through the current folder, or through a
    PYTHONPATH that was relative, would be out of their reach.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return {}
    folder = Path(os.path.abspath(next(iter(spec.submodule_search_locations))))  # keeps a symlink's own name
    entry = str(folder.parent)
    if folder.name != _PACKAGE or entry in _site_folders():
        return {}  # installed, or editable: an import hook finds it
    paths = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {"PYTHONPATH": os.pathsep.join([entry, *(path for path in paths if path != entry)])}


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, FILE)


def _site_folders() -> set[str]:
    return {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}


def _require_live(run: Run) -> str:
    status = run.status
    if status.state in LIVE_STATES:
        return status.state
    how = {"finished": "has finished", "stopped": "has stopped", "failed": "has failed", "lost": "is lost"}
    raise RunError(f"is not at work: it {how[status.state]}", where=run.name, do=status.do)


def _last_line(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
