"""Locks on files, on file systems that have none."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from finetui.engine import filelock
from finetui.engine.events import EventLog, LogLine, read_events
from finetui.engine.filelock import FileLock
from finetui.engine.run import Run
from finetui.planner.errors import RunError

#: Appends to an event log on a file system without locks.
WRITER = """
import errno, fcntl, os, sys
from finetui.engine import events, filelock
flock = fcntl.flock
def refuse(fd, how):
    if "finetui-locks" not in os.readlink(f"/proc/self/fd/{fd}"):
        raise OSError(errno.ENOLCK, "No locks available")
    return flock(fd, how)
fcntl.flock = refuse
with events.EventLog(sys.argv[1]) as log:
    for number in range(60):
        log.append(events.LogLine(0, f"{sys.argv[2]} {number}"))
"""


@pytest.fixture
def no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that knows no ``flock``, as NFS without its lock service."""
    real = fcntl.flock
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def refuse(fd: int, how: int) -> None:
        if "finetui-locks" not in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(errno.ENOLCK, "No locks available")
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_a_run_has_one_supervisor_without_locks_too(no_locks: None, make_run: Callable[..., Run]) -> None:
    run = make_run()
    held = run.claim()
    with pytest.raises(RunError, match="another process"):
        Run(run.path).claim()
    os.close(held)
    os.close(run.claim())


def test_events_of_two_processes_are_numbered_in_order_without_locks_too(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    writers = [
        subprocess.Popen([sys.executable, "-P", "-c", WRITER, str(path), name], env=environment) for name in ("a", "b")
    ]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    assert [event.seq for event in read_events(path)] == list(range(1, 121))


def test_the_stand_in_is_this_users_own(no_locks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with EventLog(tmp_path / "events.jsonl") as log:
        log.append(LogLine(0, "here"))
    folder = tmp_path / f"finetui-locks-{os.geteuid()}"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (tmp_path / "file").touch()
    fd = os.open(tmp_path / "file", os.O_RDWR)
    monkeypatch.setattr(filelock.os, "geteuid", lambda: 4242)
    folder.rename(tmp_path / "finetui-locks-4242")
    with pytest.raises(PermissionError, match="somebody else"):
        FileLock(fd, tmp_path / "file").acquire()
    os.close(fd)
