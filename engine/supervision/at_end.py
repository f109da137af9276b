"""What happens once a run has ended by itself: nothing, a command of the user, or the machine is shut down.

Nothing happens when the user ended the run, who is there and may want the machine, nor when the machine is taken away
anyway. It is not shut down under another run, and in a minute, so that whoever is logged in can prevent it
(``shutdown -c``).
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

from ...planner.limits import AtEnd
from ..events import LogLine, Payload, Warn
from ..modes import FILE
from ..run import Run, list_runs
from .outcome import EndReason, Outcome

#: Seconds that the user's command may take: it costs money while it hangs.
COMMAND_S = 600.0
_OFF = ("shutdown", "-h", "+1", "finetui: the run has ended")


def act(run: Run, wish: AtEnd, outcome: Outcome, reason: EndReason | None) -> None:
    """Carry out what the recipe wants, and say in the events what was done; failures are said there too."""
    by_user = outcome.state == "stopped" and reason != "hours"
    if wish.do == "nothing" or by_user or reason == "preempted":
        return
    if wish.do == "command":
        _command(run, wish.command, outcome)
        return
    here = [other for other in list_runs(run.path.parent) if other.recorded.host == socket.gethostname()]
    others = [other.name for other in here if other.path != run.path and other.live]
    if others:
        what = f"the machine is not shut down: {', '.join(others[:3])} is at work"
        _say(run, Warn(what, where="limits.at_end", do="Shut it down by hand, or when that one ends."))
        return
    prefix = way_to_shut_down()
    if prefix is None:
        _say(run, Warn(f"the machine is not shut down: {cannot()}", where="limits.at_end", do="Shut it down by hand."))
        return
    _say(run, LogLine(0, "limits.at_end: the machine is shut down in a minute (prevent it with: shutdown -c)"))
    done = subprocess.run([*prefix, *_OFF], capture_output=True, text=True, timeout=60.0, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        do = "Shut it down by hand: it goes on costing."
        _say(run, Warn(f"shutdown failed: {said[-1] if said else done.returncode}", where="limits.at_end", do=do))


def way_to_shut_down(systemd: Path = Path("/run/systemd/system")) -> list[str] | None:
    """What must stand before ``shutdown`` so that this user may do it; None where it can't be done."""
    if cannot(systemd):
        return None
    return [] if os.geteuid() == 0 else ["sudo", "-n"]


def cannot(systemd: Path = Path("/run/systemd/system")) -> str:
    """Why this machine can't be shut down from here; empty if it can."""
    if not systemd.is_dir() or shutil.which("shutdown") is None:
        return "this is a container, and what costs is the machine around it"
    if os.geteuid() == 0:
        return ""
    if shutil.which("sudo") is None:
        return "only root may do that"
    try:
        allowed = subprocess.run(["sudo", "-n", "-l", "shutdown"], capture_output=True, timeout=10.0, check=False)
    except subprocess.TimeoutExpired:
        return "sudo does not answer"
    return "" if allowed.returncode == 0 else "only root may do that, and sudo asks for a password"


def _command(run: Run, command: str, outcome: Outcome) -> None:
    """The user's line for the shell; what it prints goes to ``log/at_end.log``."""
    told = {"FINETUI_RUN": str(run.path), "FINETUI_STATE": outcome.state, "FINETUI_CAUSE": outcome.cause or ""}
    log = _log_of(run)
    try:
        process = subprocess.Popen(
            ["/bin/sh", "-c", command], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            cwd=run.path if run.path.is_dir() else "/", env={**os.environ, **told}, start_new_session=True,
        )  # fmt: skip
        code: int | None = process.wait(COMMAND_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        code = None
    finally:
        os.close(log)
    if code == 0:
        _say(run, LogLine(0, "limits.at_end: the command is done"))
        return
    how = f"took more than {COMMAND_S:.0f} s and was ended" if code is None else f"ended with exit code {code}"
    _say(run, Warn(f"the command {how}", where="limits.at_end", do="What it said is in log/at_end.log."))


def _log_of(run: Run) -> int:
    try:
        return os.open(run.path / "log" / "at_end.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, FILE)
    except OSError:  # the run may have ended because its folder can't be written
        return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)


def _say(run: Run, payload: Payload) -> None:
    """Append an event, or print it where that can't be done: what is to happen happens all the same."""
    try:
        run.append(payload)
    except OSError as error:
        print(f"{payload} (not among the events: {error})", flush=True)
