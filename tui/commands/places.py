"""Which run a verb is about, on this machine or over ssh on another one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from ...engine.run import Run, list_runs
from ...planner.errors import RunError

if TYPE_CHECKING:
    from ..remote import RemoteRuns

HostFlag = Annotated[str | None, typer.Option("--host", metavar="USER@BOX", help="Of another machine, over plain ssh.")]


@contextlib.contextmanager
def runs_of(address: str) -> Iterator[RemoteRuns]:
    """The runs of another machine; the connection ends with the block.

    Raises:
        RunError: the address is none.
    """
    from ...engine.remote.machine import Host
    from ..remote import RemoteRuns

    remote = RemoteRuns(Host(address))
    try:
        yield remote
    finally:
        remote.close()


@contextlib.contextmanager
def the_run(name: str | None, host: str | None) -> Iterator[Run]:
    """A run by its name or directory, the newest if None; of another machine, read up to now and followed.

    Raises:
        RunError: there is none, or the other machine can't be reached.
    """
    if host is None:
        yield latest() if name is None else Run.open(name)
        return
    with runs_of(host) as remote:
        yield remote.open(remote.host.open(name))


@contextlib.contextmanager
def the_runs(names: list[str] | None, host: str | None, newest: int | None = None) -> Iterator[list[Run]]:
    """Runs by their names, or without any the newest ones.

    Raises:
        RunError: one is not there, or the other machine can't be reached.
    """
    if host is None:
        yield [Run.open(name) for name in names] if names else list_runs()[:newest]
        return
    with runs_of(host) as remote:
        found = [remote.host.open(name) for name in names] if names else remote.runs()[:newest]
        yield [remote.open(run) for run in found] if names or newest else found


def latest() -> Run:
    """The newest run.

    Raises:
        RunError: there is none.
    """
    runs = list_runs()
    if not runs:
        raise RunError("there are no runs", do="Start one with: finetui quickstart")
    return runs[0]
