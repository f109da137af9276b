"""The app and the verbs on runs of another machine."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, NoReturn, cast

from ..engine.remote.link import Link
from ..engine.remote.machine import Host, MirroredRun
from ..planner.errors import RunError
from .backend import Backend

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..engine.run import Run

#: Seconds that a list of runs is good for: each asks the other machine to look through its folders.
_LIST_S = 5.0


class RemoteRuns:
    """The runs of one machine, each followed from when it is first looked at closely."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self._links: dict[str, Link] = {}
        self._listed: list[Run] = []
        self._listed_at = -_LIST_S

    def runs(self) -> list[Run]:
        """The runs there, newest first; a list of a few seconds ago will do. Raises as :meth:`Host.runs`."""
        if time.monotonic() - self._listed_at >= _LIST_S:
            self._listed = self.host.runs()
            self._listed_at = time.monotonic()
        return self._listed

    def open(self, run: Run) -> Run:
        """Follow a run; returns when all there is was read. Raises as :meth:`Link.wait`."""
        mirrored = cast("MirroredRun", run)
        if mirrored.remote not in self._links:
            self._links[mirrored.remote] = Link(mirrored)
        self._links[mirrored.remote].wait()
        return run

    def close(self) -> None:
        """End all following and forget what was read."""
        for link in self._links.values():
            link.close()
        self.host.close()

    def backend(self) -> Backend:
        """What the app asks, with the runs of this machine in place of those here."""
        host = self.host

        def elsewhere(*_: object) -> NoReturn:
            raise RunError(f"the runs here are those of {host.address}", do="Do it there, over ssh.")

        def on_mirror(act: Callable[[MirroredRun], None]) -> Callable[[Run], None]:
            return lambda run: act(cast("MirroredRun", run))

        return dataclasses.replace(
            Backend(),
            runs=self.runs,
            open=self.open,
            stop=lambda run: run.request("stop"),
            checkpoint=lambda run: run.request("checkpoint"),
            kill=on_mirror(host.kill),
            resume=on_mirror(host.resume),
            start=elsewhere,
            delete=elsewhere,
            machine=lambda: f"runs of {host.address}",
            now=host.now,
        )
