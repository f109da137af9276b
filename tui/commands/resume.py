"""``finetui resume``: continue a run from its last complete checkpoint."""

from __future__ import annotations

import json
import sys

import typer

from ...engine.launcher import resume as restart
from ...engine.run import Run
from .options import JsonFlag, RunArgument
from .run import DetachFlag


def resume(run: RunArgument, detach: DetachFlag = False, as_json: JsonFlag = False) -> None:
    """Continue a stopped, failed or lost run where its last checkpoint left it."""
    found = Run.open(run)
    restart(found)
    if as_json:
        print(json.dumps({"run": found.name, "path": str(found.path)}))
    if detach or as_json:
        print(f"{found.name} runs again; watch it with: finetui attach {found.name}", file=sys.stderr)
        return
    from ..watch import watch

    raise typer.Exit(watch(found))
