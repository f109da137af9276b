"""One run per GPU: a file for each GPU in use, with the process that uses it.

The files lie in a folder of this machine that all users share, ``/tmp/finetui-gpus`` (``FINETUI_GPU_LOCKS`` names
another one), never in a home that may be a network drive. Each is the user's own, so that nobody needs rights to
another's. A file whose process has ended is stale, whatever ended it, and is replaced. Containers that do not share
``/tmp`` do not see one another: there preflight asks the driver who is on a GPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...planner.errors import RunError
from ..durable import write_atomically
from ..process import Identity, this_process
from ..run import Run

#: Seconds after which of two that take a GPU in the same moment both have seen the other.
_SETTLE_S = 0.05


@dataclass(frozen=True)
class Holder:
    """Who uses a GPU."""

    gpu: int
    run: str
    user: str
    process: Identity
    taken: float
    """When, in seconds since boot."""

    def __str__(self) -> str:
        return f"GPU {self.gpu} is in use by the run {self.run} of {self.user} (process {self.process.pid})"


def folder() -> Path:
    """Where the files lie."""
    return Path(os.environ.get("FINETUI_GPU_LOCKS") or "/tmp/finetui-gpus")


def holders(gpus: Sequence[int]) -> list[Holder]:
    """Who is at work on some GPUs (NVML indices), as far as files of living processes say."""
    found = [_read(path) for gpu in gpus for path in sorted(folder().glob(f"gpu{gpu}.*.json"))]
    return [holder for holder in found if holder is not None and holder.process.lives]


@contextlib.contextmanager
def held(gpus: Sequence[int], run: Run, *, shared: bool = False) -> Iterator[None]:
    """Hold GPUs for this process.

    Args:
        shared: other runs may be at work on them.

    Raises:
        RunError: another run is at work on one of them.
    """
    mine: list[Path] = []
    try:
        if gpus and _prepared():
            now = time.clock_gettime(time.CLOCK_BOOTTIME)
            mine = [_take(gpu, run, now) for gpu in gpus]
            time.sleep(_SETTLE_S)
            now_held = holders(gpus)
            taken = max(holder.taken for holder in now_held if holder.process.pid == os.getpid())
            # Of two that take a GPU in the same moment, the later one yields.
            others = [h for h in now_held if (h.taken, h.process.pid) < (taken, os.getpid())]
            if others and not shared:
                do = "Wait for it, choose others with hardware.gpus, or set hardware.shared: true."
                raise RunError(str(others[0]), where=run.name, do=do)
        yield
    finally:
        for path in mine:
            path.unlink(missing_ok=True)


def _prepared() -> bool:
    """Whether the folder is there and can be trusted as far as a folder of all users can."""
    place = folder()
    try:
        with contextlib.suppress(FileExistsError):
            place.mkdir(parents=True)
            place.chmod(0o1777)
        found = place.lstat()
        if stat.S_ISDIR(found.st_mode) and os.access(place, os.W_OK | os.X_OK):
            return True
        print(f"GPUs are not locked: {place} can't be used", file=sys.stderr)
    except OSError as error:
        print(f"GPUs are not locked: {error}", file=sys.stderr)
    return False


def _take(gpu: int, run: Run, now: float) -> Path:
    """Write a file of this process; one user's runs that share a GPU have one each."""
    me = this_process()
    path = folder() / f"gpu{gpu}.{os.geteuid()}.{me.pid}.json"
    place = {"gpu": gpu, "run": run.name, "user": _user(), "taken": now}
    tree = {**place, "pid": me.pid, "ticks": me.ticks, "boot": me.boot}
    _sweep(gpu)
    write_atomically(path, json.dumps(tree))
    path.chmod(0o644)  # for the other users of this machine
    return path


def _sweep(gpu: int) -> None:
    """Remove this user's stale files; those of others are theirs."""
    for path in folder().glob(f"gpu{gpu}.{os.geteuid()}.*.json"):
        holder = _read(path)
        if holder is None or not holder.process.lives:
            path.unlink(missing_ok=True)


def _read(path: Path) -> Holder | None:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        process = Identity(int(tree["pid"]), int(tree["ticks"]), str(tree["boot"]))
        return Holder(int(tree["gpu"]), str(tree["run"])[:100], str(tree["user"])[:40], process, float(tree["taken"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a container's user without an entry
        return str(os.geteuid())
