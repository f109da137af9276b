"""A thread that writes to disk while training goes on: one piece of work at a time, and no error gets lost."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Writer:
    """Carries out work in the background.

    An error of it is kept and raised by the next call of :meth:`submit` or :meth:`wait`; :attr:`failed` tells of it
    without raising, so that several ranks can agree on it first.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether work is being carried out."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether an error is waiting to be raised."""
        return self._error is not None

    def submit(self, work: Callable[[], object]) -> None:
        """Carry out ``work`` in the background, once what was submitted before is done.

        Raises:
            BaseException: what the work before ended with; this work is not carried out then.
        """
        self.wait()

        def carry_out() -> None:
            try:
                work()
            except BaseException as error:  # told to whoever asks next
                self._error = error

        # No daemon: an interpreter that ends in an orderly way waits for the checkpoint in progress.
        self._thread = threading.Thread(target=carry_out, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is being carried out any more.

        Raises:
            BaseException: what the work ended with.
        """
        self.settle()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def settle(self) -> None:
        """As :meth:`wait`, but an error stays where it is."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
