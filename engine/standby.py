"""A run's processes, started while the command that wants them is still making its plan.

A rank needs longer to import PyTorch than a command needs from its first line to the run that it starts. So the command
begins with two processes that know nothing yet: one that will become the supervisor, and below it a rank, which has
all the time until then for its imports. Neither touches a GPU or a file before it is told what for:

    finetui run recipe.yaml      makes the plan and the run directory, then says which
    └ worker --waiting           becomes the supervisor by exec: same process, same children
      └ worker --waiting         its fork; imports, then reads which run, and carries it out

What waits reads from a pipe, and ends when nobody is left at the other end: a command that is refused, interrupted or
killed leaves no process behind. A run that needs something else (several ranks, stages) is started as ever, and so is
every one whose processes did not come this far: what was begun here is thrown away, and nothing of it is missed.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from . import bytecode, cuda_context
from .children import import_environment, rank_environment
from .modes import FILE

_PACKAGE = (__package__ or "finetui.engine").partition(".")[0]

#: What a rank is called with in place of a run directory.
WAITING = "--waiting"
#: The variable by which a supervisor learns of its waiting rank: the pid, and the descriptor that it is told through.
VARIABLE = "FINETUI_WAITING_RANK"
#: Exit code of a waiting rank that could not import what it needs, so that one that begins anew can say why.
UNFIT = 75
#: What an order adds to the environment, there from the start: the driver and PyTorch read the environment in threads
#: of their own, and a name that is added meanwhile moves what they read (setenv(3)). A value is exchanged in its place.
_ORDERED = {"RANK": "", "WORLD_SIZE": "", "CUDA_DEVICE_ORDER": "", "CUDA_VISIBLE_DEVICES": "",
            cuda_context.LOADING: "LAZY"}  # fmt: skip


# --- the command's side


class Standby:
    """Processes that wait; they are :meth:`dismissed <dismiss>`, or become those of a run."""

    def __init__(self) -> None:
        reading, self._orders = os.pipe()
        self._answers, self.answer_fd = os.pipe()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", f"{_PACKAGE}.engine.worker", WAITING, str(self.answer_fd)],
                stdin=reading, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
                pass_fds=(self.answer_fd,), cwd=os.sep,
                env={**os.environ, **import_environment(), **bytecode.environment(os.environ)},
            )  # fmt: skip
        except OSError:
            os.close(self._orders)
            os.close(self._answers)
            raise
        finally:
            os.close(reading)
            os.close(self.answer_fd)

    def become(self, arguments: Sequence[str], log: Path, folder: Path, environment: Mapping[str, str]) -> int:
        """Have the upper process go on as ``python ARGUMENTS``.

        Args:
            arguments: may name :attr:`answer_fd`.
            log: takes what it prints from then on.

        Returns:
            The descriptor to read its answer from, which ends without one if it did not come to that.
        """
        order = {"arguments": [*arguments], "log": str(log), "folder": str(folder), "environment": dict(environment)}
        with contextlib.suppress(BrokenPipeError), open(self._orders, "w", encoding="ascii") as pipe:
            pipe.write(json.dumps(order) + "\n")
        return self._answers

    def dismiss(self) -> None:
        """End what waits: it has nothing to lose."""
        self.process.kill()
        self.process.wait()
        os.close(self._orders)
        os.close(self._answers)


_one: Standby | None = None


@contextlib.contextmanager
def standing_by() -> Iterator[None]:
    """Within, processes wait for the run that this command may start, where a run can be started at all."""
    global _one
    if hasattr(os, "memfd_create") and importlib.util.find_spec("torch") is not None:  # Linux
        with contextlib.suppress(OSError):  # a machine that has no room for a process says so when it has to
            _one = Standby()
    try:
        yield
    finally:
        if (left := take()) is not None:
            left.dismiss()


def take() -> Standby | None:
    """The processes that wait, if some do: from now on the caller's to use or dismiss."""
    global _one
    taken, _one = _one, None
    return taken


# --- the process that divides


def divide(answer_fd: int) -> None:
    """Make a child that is to be a rank, and return in it alone: this process waits for an order to be a supervisor.

    Neither needs Python to start anew, and both need what is imported by now.
    """
    reading, orders = os.pipe()
    rank = os.fork()
    if rank:
        os.close(reading)
        _wait_to_supervise(rank, orders, answer_fd)
    os.setsid()
    os.dup2(reading, 0)
    for descriptor in (reading, orders, answer_fd):
        os.close(descriptor)
    os.environ.update(rank_environment(os.environ, world=1, cuda=True))


def _wait_to_supervise(rank: int, orders: int, answer_fd: int) -> NoReturn:
    line = sys.stdin.buffer.readline()
    if not line.endswith(b"\n"):  # the command is gone
        os.kill(rank, signal.SIGKILL)
        os.waitpid(rank, 0)
        os._exit(0)
    order = json.loads(line)
    os.chdir(order["folder"])
    _open_as(0, os.devnull, os.O_RDONLY)
    _open_as(1, order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(1, 2)
    os.set_inheritable(orders, True)
    environment = {**order["environment"], VARIABLE: f"{rank} {orders}"}
    os.execve(sys.executable, [sys.executable, *order["arguments"]], environment)


# --- the supervisor's side


@dataclass
class WaitingRank:
    """A child of this process that waits for its run."""

    pid: int
    orders: int
    waits: bool = True

    @classmethod
    def inherited(cls) -> WaitingRank | None:
        """The rank that this process has brought along from before it became a supervisor."""
        told = os.environ.pop(VARIABLE, None)
        if told is None:
            return None
        pid, orders = map(int, told.split())
        os.set_inheritable(orders, False)
        return cls(pid, orders)

    def train(self, run: Path, environment: Mapping[str, str]) -> int | None:
        """Have it carry out a run to its end; the exit code (negative: a signal), or None if it is no use."""
        self.waits = False
        ended = os.waitpid(self.pid, os.WNOHANG) != (0, 0)
        order = "" if ended else json.dumps({"run": str(run), "environment": dict(environment)}) + "\n"
        with contextlib.suppress(BrokenPipeError), open(self.orders, "w", encoding="ascii") as pipe:
            pipe.write(order)
        if ended:
            return None
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return None if code == UNFIT else code

    def dismiss(self) -> None:
        """End it, if it still waits."""
        if self.waits:
            self.waits = False
            os.kill(self.pid, signal.SIGKILL)  # a child that nobody has waited for: the number is its own
            os.waitpid(self.pid, 0)
            os.close(self.orders)


# --- the rank's side


def wait() -> tuple[str, str]:
    """Import what every rank needs, then wait for a run; the environment becomes the one that comes with it.

    The process ends here if nobody is left who could want it.

    Returns:
        The run's directory, and what was printed until then.
    """
    words = os.memfd_create("finetui-words")
    os.dup2(words, 1)
    os.dup2(words, 2)
    told: list[dict[str, Any]] = []
    for name, value in _ORDERED.items():
        os.environ.setdefault(name, value)
    listener = threading.Thread(target=_listen, args=(told,), name="orders", daemon=True)
    listener.start()
    gc.disable()
    try:
        import torch  # noqa: F401
    except Exception:
        os._exit(UNFIT)
    listener.join()
    (order,) = told
    environment = {cuda_context.LOADING: "LAZY", **order["environment"]}
    os.environ.update((name, value) for name, value in environment.items() if os.environ.get(name) != value)
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.chdir(order["run"])
    _open_as(0, os.devnull, os.O_RDONLY)
    sys.stdout.flush()
    sys.stderr.flush()
    said = os.pread(words, 1 << 20, 0).decode(errors="replace")
    os.close(words)
    return order["run"], said


def _listen(told: list[dict[str, Any]]) -> None:
    """Take the order; its GPU is made ready while the imports go on."""
    line = sys.stdin.buffer.readline()
    if not line.endswith(b"\n"):
        os._exit(0)
    told.append(json.loads(line))
    of_cuda = {name: value for name, value in told[0]["environment"].items() if name.startswith("CUDA_")}
    if of_cuda.get("CUDA_VISIBLE_DEVICES"):
        os.environ.update(of_cuda)
        cuda_context.begin(0)


def _open_as(descriptor: int, path: str, flags: int) -> None:
    opened = os.open(path, flags, FILE)
    os.dup2(opened, descriptor)
    os.close(opened)
