"""A program on a terminal of its own: a pty, a shell above it that can suspend it, and the screen that it draws."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from finetui.tests.bench.screen import ALTERNATE, CURSOR, FOCUS, MOUSE, PASTE, WRAP, Screen

#: What a shell does for a program: a process group of its own in the foreground of the terminal, so that the program
#: can be suspended; and it brings the terminal back to the foreground when the program stops or ends. Line by line it
#: tells the program's pid, ``stopped``, and the exit status with the processor seconds of the program's whole life.
_SHELL = """
import fcntl, os, resource, signal, sys, termios
tell, arguments, hup = int(sys.argv[1]), sys.argv[3:], sys.argv[2] == "hup"
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
before = termios.tcgetattr(0)
ready, go = os.pipe()
child = os.fork()
if child == 0:
    os.setpgid(0, 0)
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)
    if not hup:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.close(go); os.read(ready, 1)
    os.execvp(arguments[0], arguments)
os.setpgid(child, child)
os.tcsetpgrp(0, child)
os.close(go)
os.write(tell, b"%d\\n" % child)
signal.signal(signal.SIGHUP, signal.SIG_IGN)
while True:
    _, status = os.waitpid(child, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        modes = termios.tcgetattr(0)
        os.tcsetpgrp(0, os.getpgrp()); termios.tcsetattr(0, termios.TCSADRAIN, before)
        os.write(tell, b"stopped\\n")
        if sys.stdin.buffer.raw.readline().strip() == b"fg":
            os.tcsetpgrp(0, child); termios.tcsetattr(0, termios.TCSADRAIN, modes)
            os.killpg(child, signal.SIGCONT)
        continue
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    os.write(tell, b"%d %f\\n" % (os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime))
    break
"""


def environment(home: Path, **more: str) -> dict[str, str]:
    """The surroundings of a finetui of this source tree with an empty home; ``more`` on top, ``""`` takes away."""
    root = Path(sys.modules["finetui"].__path__[0])
    packages = [str(root.parent), *(entry for entry in sys.path if entry and Path(entry).resolve() != root.resolve())]
    environ = {
        "PATH": os.environ["PATH"], "HOME": str(home), "TERM": "xterm-256color", "COLORTERM": "truecolor",
        "LANG": "C.UTF-8", "TZ": "UTC", "PYTHONPATH": os.pathsep.join(packages), "OMP_WAIT_POLICY": "PASSIVE",
        "FINETUI_RUNS": str(home / "runs"), "XDG_STATE_HOME": str(home / "state"), **more,
    }  # fmt: skip
    return {key: value for key, value in environ.items() if value}


class Terminal:
    """A program and the terminal it runs on.

    Args:
        arguments: the program.
        environ: its environment.
        size: columns and rows.
        hup: whether the program hears of a hang-up; ``nohup`` is a program that does not.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        environ: Mapping[str, str],
        *,
        size: tuple[int, int] = (100, 30),
        hup: bool = True,
    ) -> None:
        self.screen = Screen(*size)
        self.ours, self.theirs = pty.openpty()
        self.resize(*size)
        self.modes_before = termios.tcgetattr(self.theirs)
        told, tell = os.pipe()
        self._shell = subprocess.Popen(
            [sys.executable, "-ISc", _SHELL, str(tell), "hup" if hup else "nohup", *arguments],
            stdin=self.theirs, stdout=self.theirs, stderr=self.theirs, env=dict(environ), pass_fds=[tell],
            start_new_session=True,
        )  # fmt: skip
        os.close(tell)
        self._told = os.fdopen(told, "rb")
        self.pid = int(self._told.readline())
        self.started = time.perf_counter()
        self.process = psutil.Process(self.pid)
        self.written = b""
        self.on_bytes: Callable[[bytes], object] = lambda data: None
        self.cpu_in_all = 0.0
        """Processor seconds of the program's whole life, once it has ended."""
        self._status: int | None = None

    def read(self, seconds: float, until: Callable[[], object] = lambda: False) -> int:
        """Take in what the program writes, for some seconds or until something is so; returns the bytes."""
        begun, end = len(self.written), time.monotonic() + seconds
        while not until() and (left := end - time.monotonic()) > 0:
            if self.ours < 0 or not select.select([self.ours], [], [], min(left, 0.05))[0]:
                if self.ours < 0:
                    time.sleep(0.02)
                continue
            try:
                data = os.read(self.ours, 65536)
            except OSError:  # nobody has this terminal open any more
                break
            self.written += data
            self.on_bytes(data)
            self.screen.feed(data)
        return len(self.written) - begun

    def wait_for(self, *words: str, seconds: float = 15.0) -> None:
        """Read until the screen shows all of these words.

        Raises:
            AssertionError: it does not; the message is the screen.
        """
        if not self.reads(*words, seconds=seconds):
            shown = f"{self.screen.text()}\nlast bytes: {self.written[-300:]!r}"
            raise AssertionError(f"{words} not on the screen:\n{shown}")

    def reads(self, *words: str, seconds: float) -> bool:
        """Whether the screen shows all of these words within some seconds."""
        self.read(seconds, lambda: all(word in self.screen.text() for word in words))
        return all(word in self.screen.text() for word in words)

    def settle(self, seconds: float = 1.0, within: float = 20.0) -> None:
        """Read until nothing has come for some seconds.

        Raises:
            AssertionError: something keeps moving.
        """
        end = time.monotonic() + within
        while self.read(seconds):
            if time.monotonic() > end:
                raise AssertionError(f"still moving after {within:.0f} s:\n{self.screen.text()}")

    def send(self, keys: str | bytes) -> None:
        """Type."""
        os.write(self.ours, keys.encode() if isinstance(keys, str) else keys)

    def resize(self, width: int, height: int) -> None:
        """Give the terminal another size, as dragging its window does."""
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        self.screen.resize(width, height)

    def hang_up(self) -> None:
        """Close the terminal under the program."""
        os.close(self.theirs)
        os.close(self.ours)
        self.ours = self.theirs = -1

    def suspended(self, seconds: float = 10.0) -> bool:
        """Whether the shell sees the program stop within some seconds."""
        return self._hear(seconds) == b"stopped\n"

    def foreground(self) -> None:
        """What ``fg`` does after the program was suspended."""
        self.send("fg\n")

    def wait(self, seconds: float = 10.0) -> int:
        """The exit status of the program; minus the number of the signal that ended it.

        Raises:
            TimeoutError: it goes on.
        """
        if self._status is None:
            told = self._hear(seconds).split()
            if len(told) != 2:
                raise TimeoutError(f"the program is still there ({told}):\n{self.screen.text()}")
            self._status, self.cpu_in_all = int(told[0]), float(told[1])
            self.read(0.2, lambda: not select.select([self.ours], [], [], 0)[0] if self.ours >= 0 else True)
        return self._status

    def _hear(self, seconds: float) -> bytes:
        self.read(seconds, lambda: select.select([self._told], [], [], 0)[0])
        return self._told.readline() if select.select([self._told], [], [], 0)[0] else b""

    @property
    def alive(self) -> bool:
        """Whether the program goes on."""
        return self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE

    @property
    def modes(self) -> list[Any]:
        """What ``stty`` shows now."""
        return termios.tcgetattr(self.theirs)

    def left_over(self) -> list[str]:
        """What the program has changed about the terminal and not put back; empty after a good exit."""
        screen = self.screen
        wrong = [] if self.modes == self.modes_before else ["stty"]
        wrong += [] if screen.modes.get(CURSOR) else ["cursor hidden"]
        wrong += [] if screen.modes.get(WRAP) else ["no line wrap"]
        wrong += [mode for mode in (ALTERNATE, PASTE, FOCUS, *MOUSE) if screen.modes.get(mode)]
        wrong += ["kitty keyboard"] if screen.keyboard else []
        return wrong

    def cpu_seconds(self) -> float:
        """Processor time the program has used so far, all threads."""
        times = self.process.cpu_times()
        return times.user + times.system

    def close(self) -> None:
        """End what still runs."""
        for process in (self.process, psutil.Process(self._shell.pid) if self._shell.poll() is None else None):
            if process is not None:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(signal.SIGKILL)
        self._shell.wait()
        self._told.close()
        for descriptor in (self.ours, self.theirs):
            if descriptor >= 0:
                os.close(descriptor)
        self.ours = self.theirs = -1

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
