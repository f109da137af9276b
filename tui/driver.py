"""The driver of the app on a terminal: Textual's, made to end and to pause in every way without leaving a mess.

Measured on Textual 8.2.8: SIGTERM leaves the terminal without echo and on the alternate screen; SIGCONT without a
SIGTSTP before it (``kill -STOP``) starts a second thread that reads keys, and on leaving the terminal stays raw; bytes
that are not UTF-8, such as the mouse reports that tmux sends on reattach, end the app. SIGTSTP takes locks that the
code it interrupts may hold (textual#6333); here all signals wait their turn in the event loop.
"""

from __future__ import annotations

import asyncio
import codecs
import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from textual.drivers import linux_driver
from textual.drivers.linux_driver import LinuxDriver

#: Signals that ask a program to end.
ENDINGS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)
#: Seconds that the app has for leaving in good order after one of them.
_PATIENCE_S = 5.0


def _forgiving_decoder(encoding: str) -> Callable[..., Any]:
    return partial(codecs.getincrementaldecoder(encoding), errors="replace")


class ForgivingDriver(LinuxDriver):
    """Reads any bytes, leaves the terminal as it was found whatever ends the app, and survives being stopped."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._stopped = False
        self._listening = False

    def start_application_mode(self) -> None:
        """See :class:`textual.driver.Driver`."""
        linux_driver.getincrementaldecoder = _forgiving_decoder
        if not self._listening:
            self._listening = True
            loop = asyncio.get_running_loop()
            for number in ENDINGS:
                loop.add_signal_handler(number, self._end, number)
            loop.add_signal_handler(signal.SIGTSTP, self._pause)
            loop.add_signal_handler(signal.SIGCONT, self._go_on)
        super().start_application_mode()

    def _end(self, number: int) -> None:
        """Leave as if the user had asked to; the exit status says which signal it was."""
        watch = threading.Timer(_PATIENCE_S, os._exit, [128 + number])
        watch.daemon = True
        watch.start()
        self._app.exit(return_code=128 + number)

    def _pause(self) -> None:
        """Give the terminal back and stop, as the shell's ctrl+z wants it."""
        if self._auto_restart:
            self.suspend_application_mode()
            self._stopped = self._must_signal_resume = True
        os.kill(os.getpid(), signal.SIGSTOP)

    def _go_on(self) -> None:
        """Take the terminal back; after a stop that came without warning, from whatever state it is in."""
        if not self._auto_restart:
            return
        if not self._stopped:
            self.suspend_application_mode()
            self._must_signal_resume = True
        self.resume_application_mode()
        # Textual does not start in the background: the next SIGCONT tries again.
        self._stopped = self._writer_thread is None or not self._writer_thread.is_alive()
        if not self._stopped:
            self._app.call_later(self._repaint)

    def _repaint(self) -> None:
        self._app.screen.refresh(layout=True)
