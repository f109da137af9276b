"""Start, stop, end and resume runs, from any process: the command line, the app, a script.

What is started here outlives whoever started it: the supervisor has its own session and no terminal, so closing the
terminal, SIGHUP or the death of the caller never reach it. All that follows goes through the run directory.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from ..planner.errors import RunError
from . import bytecode, standby
from .checkpoints.continuation import before_resuming
from .children import import_environment
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
    alone = worker is None and not run.plan.stages and run.plan.resolved.world_size == 1
    worker = worker or (STAGES if run.plan.stages else WORKER)
    waiting = standby.take()
    if waiting is not None and not alone:
        waiting.dismiss()
        waiting = None
    try:
        process, answer = (None, "") if waiting is None else _go_on(waiting, run, worker)
        if process is None or not answer:  # what waited has ended, for whatever reason: all begins anew
            process, answer = _begin(run, worker)
    except OSError as error:
        what, do = f"the run can't be started ({error.strerror})", f"When that is mended: finetui resume {run.name}"
        raise RunError(what, where=str(run.path), do=do) from error
    if answer.strip() == "ready":
        return process.pid
    try:
        error_parts = json.loads(answer)
    except ValueError:
        last = _last_line(_log(run))
        raise RunError(
            f"the run could not be started{f' ({last})' if last else ''}",
            where=run.name,
            do=f"See {_log(run)}",
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
        do = f"Watch it with: finetui attach {run.name}"
        raise RunError("is stopping, which writes a checkpoint", where=run.name, do=do)
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


def _go_on(waiting: standby.Standby, run: Run, worker: Sequence[str]) -> tuple[subprocess.Popen[bytes], str]:
    """The supervisor made of processes that wait, and what it answers: nothing if they have ended."""
    arguments = _supervisor(run, worker, waiting.answer_fd)
    log, folder = _log(run).resolve(), run.path.resolve()
    return waiting.process, _answer(run, waiting.process, waiting.become(arguments, log, folder, _environment()))


def _begin(run: Run, worker: Sequence[str]) -> tuple[subprocess.Popen[bytes], str]:
    """A new supervisor, and what it answers."""
    answers, told = os.pipe()
    try:
        with open(_log(run), "ab", opener=_private) as log:
            process = subprocess.Popen(
                [sys.executable, *_supervisor(run, worker, told)], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, pass_fds=(told,), env=_environment(), cwd=run.path,
            )  # fmt: skip
    except OSError:
        os.close(answers)
        raise
    finally:
        os.close(told)
    return process, _answer(run, process, answers)


def _supervisor(run: Run, worker: Sequence[str], answer_fd: int) -> list[str]:
    """What a supervisor runs, as arguments of Python."""
    module = f"{_PACKAGE}.engine.supervisor"
    return ["-P", "-m", module, "--ready-fd", str(answer_fd), str(run.path.resolve()), "--", *worker]


def _answer(run: Run, process: subprocess.Popen[bytes], answers: int) -> str:
    # Somebody must wait for a child, or it stays behind as a zombie for as long as this process lives.
    threading.Thread(target=process.wait, name=f"wait-{run.name}", daemon=True).start()
    with open(answers, encoding="utf-8") as pipe:
        return pipe.read()


def _environment() -> dict[str, str]:
    return {**os.environ, **import_environment(), **bytecode.environment(os.environ)}


def _log(run: Run) -> Path:
    return run.path / "log" / "supervisor.log"


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, FILE)


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
