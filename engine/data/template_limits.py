"""Chat templates come with models and are programs: sandboxed ones that can still loop for ever or ask for all memory.

A template is first rendered in a copy of this process with limits on its time, memory and output; only one that ends
well there is rendered here, and each conversation has a time limit too. The sandbox itself is Jinja's
(https://jinja.palletsprojects.com/en/stable/sandbox/), as transformers sets it up.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from ...planner.errors import DataError

#: Seconds and bytes that a template gets for a short conversation, beyond what the process has already, and the
#: longest text that it may make of one.
SECONDS, MEMORY, OUTPUT = 5, 1 << 30, 1 << 20
#: Seconds that one conversation of a dataset may take.
ROW_S = 20.0
_DO = "Look at the template, or set chat_template: chatml."


def prove(render: Callable[[], int], where: str) -> None:
    """Carry ``render`` out in a copy of this process, and raise unless it ends within the limits.

    Args:
        render: makes texts and returns their length; what it raises is of no interest.

    Raises:
        DataError: it takes too long, too much memory, or makes too long a text.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _alone(render, writing)
    os.close(writing)
    try:
        deadline = time.monotonic() + 4 * SECONDS  # of the clock: the machine may be busy
        told = b""
        while not told and (left := deadline - time.monotonic()) > 0 and select.select([reading], [], [], left)[0]:
            told = os.read(reading, 64) or b"killed"
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if not told or told == b"killed":
        raise DataError(f"the chat template does not end within {SECONDS} s", where=where, do=_DO)
    if told == b"memory":
        raise DataError(f"the chat template needs more than {MEMORY >> 20} MiB", where=where, do=_DO)
    if int(told) > OUTPUT:
        raise DataError(f"the chat template makes {int(told):,} characters of a few words", where=where, do=_DO)


def _alone(render: Callable[[], int], writing: int) -> None:
    """The copy: whatever happens, it never returns, and cleans up nothing that belongs to the original."""
    told = b"0"
    try:
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        spent = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])  # a copy begins at 0, but not on every kernel
        for kind, limit in ((resource.RLIMIT_AS, used + MEMORY), (resource.RLIMIT_CPU, int(spent) + SECONDS)):
            hard = resource.getrlimit(kind)[1]
            soft = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(kind, (soft, hard))
        told = str(render()).encode()
    except MemoryError:
        told = b"memory"
    except BaseException:  # raised again by the original, in words
        told = b"0"
    finally:
        with contextlib.suppress(OSError):
            os.write(writing, told)
        os._exit(0)


@contextlib.contextmanager
def within(seconds: float, where: str) -> Iterator[None]:
    """End what is inside after so long, where this is the main thread and nothing else uses its alarm.

    Raises:
        DataError: the time is over.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def over(number: int, frame: FrameType | None) -> None:
        raise DataError(f"the chat template takes longer than {seconds:g} s for this row", where=where, do=_DO)

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
