"""``finetui resume``: continue a run from its last complete checkpoint."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from ...engine.checkpoints.continuation import before_resuming
from ...engine.launcher import resume as restart
from ...engine.run import Run
from ...planner.errors import RecipeError
from .options import JsonFlag, RunArgument, parse_gpus
from .run import DetachFlag

GpusOption = Annotated[
    str | None, typer.Option("--gpus", help="Go on with other GPUs: how many (2) or which (0,1).", show_default=False)
]


def resume(run: RunArgument, gpus: GpusOption = None, detach: DetachFlag = False, as_json: JsonFlag = False) -> None:
    """Continue a stopped, failed or lost run at its last checkpoint."""
    found = Run.open(run)
    if gpus is not None:
        from ...engine.supervision.spread import spread

        wanted = parse_gpus(gpus)
        if isinstance(wanted, str):
            do = "Give a count (2) or indices (0,1)."
            raise RecipeError(f"{wanted!r} names no GPUs for a run that has begun", where="--gpus", do=do)
        spread(found, wanted)
    for change in before_resuming(found):
        print(f"changed since its checkpoint: {change}", file=sys.stderr)
    restart(found)
    if as_json:
        print(json.dumps({"run": found.name, "path": str(found.path)}))
    if detach or as_json:
        print(f"{found.name} runs again; watch it with: finetui attach {found.name}", file=sys.stderr)
        return
    from ..watch import watch

    raise typer.Exit(watch(found))
