"""``finetui stop``: write a checkpoint, then end a run."""

from __future__ import annotations

import json
import sys
import time
from typing import Annotated

import typer

from ...engine.launcher import kill
from ...engine.launcher import stop as request_stop
from ...engine.remote.machine import MirroredRun
from ...engine.run import Run
from ...engine.status import LIVE_STATES
from .options import JsonFlag, RunArgument
from .places import HostFlag, the_run

WaitFlag = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it has ended.")]
KillFlag = Annotated[bool, typer.Option("--kill", help="End it at once, without a checkpoint.")]


def stop(run: RunArgument, wait: WaitFlag = True, now: KillFlag = False, host: HostFlag = None,
         as_json: JsonFlag = False) -> None:  # fmt: skip
    """Ask a run to write a checkpoint and end; it can be resumed."""
    with the_run(run, host) as found:
        _stop(found, wait, now, as_json)


def _stop(found: Run, wait: bool, now: bool, as_json: bool) -> None:
    if now:
        found.host.kill(found) if isinstance(found, MirroredRun) else kill(found)
    else:
        request_stop(found)
        if wait or not as_json:  # which has the name
            patience = " Ctrl-C stops the waiting." if wait else ""
            print(f"{found.name} writes a checkpoint and ends.{patience}", file=sys.stderr)
    while wait and found.status.state in LIVE_STATES:
        time.sleep(0.2)
    status = found.status
    if as_json:
        print(json.dumps({"run": found.name, "state": status.state}))
    elif status.state not in LIVE_STATES:
        print(f"{found.name} is {status.state}. Continue it with: finetui resume {found.name}", file=sys.stderr)
