"""Orders: what a supervisor was told to do, by signals, by limits or by whoever owns the machine."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

from .outcome import EndReason


@dataclass
class Orders:
    """When and why the ranks shall end, as far as somebody wants that."""

    reason: EndReason | None = None
    deadline: float | None = None
    forced: bool = False
    grace_s: float = 20.0
    """Seconds that ranks get for a checkpoint after SIGTERM."""

    def end(self, reason: EndReason, within_s: float) -> None:
        """Note that the ranks shall end; the sooner deadline counts."""
        deadline = time.monotonic() + within_s
        if self.deadline is None or deadline < self.deadline:
            self.reason, self.deadline = reason, deadline


@contextlib.contextmanager
def signals(orders: Orders) -> Iterator[None]:
    """Within it, signals to this process become orders; as the head of ``supervisor.py`` lists them."""

    def preempt(number: int, frame: FrameType | None) -> None:
        orders.end("preempted", orders.grace_s)

    def quit_now(number: int, frame: FrameType | None) -> None:
        orders.end("quit", 0.0)

    handlers: dict[signal.Signals, Callable[[int, FrameType | None], None] | signal.Handlers] = {
        signal.SIGTERM: preempt,
        signal.SIGQUIT: quit_now,
        signal.SIGHUP: signal.SIG_IGN,
        signal.SIGINT: signal.SIG_IGN,
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
