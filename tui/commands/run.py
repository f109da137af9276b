"""``finetui run``: carry out a recipe, detached from this terminal, and watch it."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ...engine.check import Check
from ...engine.launcher import start
from ...engine.planning import plan_for
from ...engine.preflight import at_end, preflight
from ...engine.run import Run, check_name
from ...planner.errors import HardwareError
from ...planner.plan import Plan
from ...planner.recipe import Recipe
from ..command_line import as_shell, command_for
from ..format import CHECK_GLYPHS, sentence
from ..watch import watch
from .options import JsonFlag, takes_recipe

NameFlag = Annotated[str | None, typer.Option("--name", help="Name of the run; a telling one is made up otherwise.")]
OutFlag = Annotated[
    Path | None, typer.Option("--out", help="Folder that holds runs (default: $FINETUI_RUNS or ./runs).")
]
DetachFlag = Annotated[bool, typer.Option("--detach", "-d", help="Return at once instead of watching.")]
CheckFlag = Annotated[
    bool, typer.Option("--check", help="Make every check, show the command that starts it, and start nothing.")
]
ForceFlag = Annotated[bool, typer.Option("--force", help="Start although the plan does not fit or a check failed.")]


@takes_recipe(without={"gpu"})
def run(
    recipe: Recipe,
    name: NameFlag = None,
    out: OutFlag = None,
    detach: DetachFlag = False,
    force: ForceFlag = False,
    check: CheckFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Start a run that outlives this terminal, and watch it. Ctrl-C stops only the watching."""
    if check:
        check_name(name)
        found = checks(recipe, plan_for(recipe), out)
        command = as_shell(command_for(recipe, name=name or "", root=out), width=sys.maxsize)
        _print_checks(found, command, as_json=as_json)
        raise typer.Exit(2 if any(one.status == "fail" for one in found) else 0)
    started = launch(recipe, plan_for(recipe), name=name, out=out, force=force)
    if as_json:
        print(json.dumps({"run": started.name, "path": str(started.path)}))
    if detach or as_json:
        print(f"{started.name} runs in {started.path}; watch it with: finetui attach {started.name}", file=sys.stderr)
        return
    raise typer.Exit(watch(started))


def launch(recipe: Recipe, plan: Plan, *, name: str | None = None, out: Path | None = None, force: bool = False) -> Run:
    """Check everything that can be checked, make the run directory and start the run.

    Raises:
        HardwareError: the plan does not fit, or a check failed, and ``force`` is not set.
    """
    bad = [check for check in checks(recipe, plan, out) if check.status == "fail"]
    if bad and not force:
        raise _refusal(bad)
    started = Run.create(recipe, plan, root=out.resolve() if out else None, name=name)
    start(started)
    return started


def checks(recipe: Recipe, plan: Plan, root: Path | None = None) -> list[Check]:
    """Every check before a run, of each stage if it has some."""
    if not recipe.stages:
        return preflight(recipe, plan, root=root)
    from ...planner.stages import expand

    found: list[Check] = at_end(recipe)
    for step in expand(recipe):
        if step.recipe is not None:
            found += [
                dataclasses.replace(check, name=f"{step.name}: {check.name}")
                for check in preflight(step.recipe, plan_for(step.recipe), root=root)
            ]
    return found


def _print_checks(found: list[Check], command: str, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"checks": [dataclasses.asdict(one) for one in found], "command": command}, indent=2))
        return
    for one in found:
        print(sentence(f"{CHECK_GLYPHS[one.status]} {one.name}: {one.detail}".rstrip(": ")))
        if one.do and one.status != "ok":
            print(sentence(f"  {one.do}"))
    print(command)


def _refusal(bad: list[Check]) -> HardwareError:
    first, *rest = bad
    more = "".join(f"\n{check.name}: {check.detail}. {check.do}" for check in rest)
    return HardwareError(f"{first.name}: {first.detail}", do=first.do + more)
