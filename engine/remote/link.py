"""Link: follows one run of another machine through one ssh process, and takes up again where it broke off."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time

from ...planner.errors import RunError
from .machine import LONG_BYTES, MirroredRun, frames, take
from .scripts import FOLLOW

#: Seconds before a connection that broke is tried again: the first, and the longest.
_RETRY_S, _RETRY_MOST_S = 2.0, 30.0


class Link:
    """Keeps a run's mirror up to date in a thread until :meth:`close`.

    Attributes:
        caught_up: set when all there is was read for the first time.
        gone: why the run can't be followed any more; empty while it can.
    """

    def __init__(self, run: MirroredRun, *, long_bytes: int = LONG_BYTES, retry_s: float = _RETRY_S) -> None:
        self.run = run
        self.caught_up = threading.Event()
        self.gone = ""
        self._offset, self._long, self._retry_s = 0, long_bytes, retry_s
        self._ended = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._follow, name=f"link {run.name}", daemon=True)
        run.host.links[run.remote] = self
        for log in (run.path / "log").glob("*.log"):
            log.unlink()
        self._begun = False
        self._thread.start()

    def wait(self, timeout_s: float = 60.0) -> None:
        """Wait until all there is was read.

        Raises:
            RunError: the run can't be read, or the machine does not answer.
        """
        if not self.caught_up.wait(timeout_s) or self.gone:
            what = self.gone or self.run.trouble or "it does not answer"
            do = f"Look whether this works: ssh {self.run.host.address} finetui runs"
            raise RunError(what, where=f"{self.run.host.address}:{self.run.remote}", do=do)

    def close(self) -> None:
        """End, without waiting for it."""
        self._ended.set()
        self.run.host.links.pop(self.run.remote, None)
        self._end_process()

    def _end_process(self) -> None:
        if self._process is not None:
            with contextlib.suppress(OSError):
                self._process.kill()

    def _follow(self) -> None:
        pause = self._retry_s
        while not self._ended.is_set() and not self.gone:
            began = time.monotonic()
            why = self._read()
            if self._ended.is_set() or self.gone:
                break
            self.run.trouble = f"no connection to {self.run.host.address}: {why}"
            pause = self._retry_s if time.monotonic() - began > _RETRY_MOST_S else min(pause * 2, _RETRY_MOST_S)
            self._ended.wait(pause)
        self.caught_up.set()  # nobody waits for more

    def _read(self) -> str:
        """Follow over one connection; why it ended."""
        try:
            self._process = process = self.run.host.start(
                FOLLOW, RUN=self.run.remote, OFFSET=self._offset, LONG=self._long
            )
        except RunError as error:
            return error.what
        assert process.stdout is not None
        for frame in frames(process.stdout):  # type: ignore[arg-type]
            if frame.kind == "X":
                self.gone = self.run.trouble = frame.text
            elif frame.kind == "S":
                self.run.trouble = ""
                self.run.host.set_clock(float(frame.text))
                self.caught_up.set()
            else:
                events = frame.kind in ("C", "E")
                take(self.run, frame, anew=events and not self._begun)  # what a listing left there comes again, whole
                if events:
                    self._begun, self._offset = True, int(frame.text)
        process.kill()
        process.wait()
        return self.run.host.complaint() or "it ended"
