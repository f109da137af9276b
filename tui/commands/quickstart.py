"""``finetui quickstart``: the whole job on the shipped model and data, on whatever is here."""

from __future__ import annotations

import json
import math
import sys

import typer

from ...engine.planning import plan_for
from ...engine.run import Run
from ...planner.recipe import Recipe
from ..watch import history_of, watch
from .options import JsonFlag, find_recipe
from .run import NameFlag, launch


def quickstart(name: NameFlag = None, as_json: JsonFlag = False) -> None:
    """Plan and train the shipped tiny model in about a minute. A CPU will do."""
    path = find_recipe("quickstart")
    assert path is not None, "presets/quickstart.yaml is part of the package"
    recipe = Recipe.load(path)
    plan = plan_for(recipe)
    if not as_json:
        from ..console import Console
        from ..plan_view import print_plan

        print_plan(plan, Console(stderr=True, highlight=False))
        print(file=sys.stderr)
    run = launch(recipe, plan, name=name)
    code = watch(run, after=False)
    if as_json:
        first, last = _held_out(run)
        answer = {
            "run": run.name,
            "path": str(run.path),
            "state": run.status.state,
            "eval_loss_first": first,
            "eval_loss_last": last,
        }
        print(json.dumps(answer, indent=2))
    elif code == 0 and run.status.state == "finished":
        _tell(run)
    raise typer.Exit(code)


def _held_out(run: Run) -> tuple[float, float]:
    """Held-out loss before the first step and after the last."""
    buckets = history_of(run).evaluation.buckets
    return (buckets[0].end, buckets[-1].end) if buckets else (math.nan, math.nan)


def _tell(run: Run) -> None:
    """What was won: losses and answers before and after, where it lies, and what to do next."""
    first, last = _held_out(run)
    print(f"\nheld-out loss  {first:.3f} before, {last:.3f} after")
    for answer in history_of(run).answers.values():
        print(f"\nasked   {answer.prompt}\nbefore  {_short(answer.before)}\nafter   {_short(answer.after)}")
    print(f"\nThe run lies in {run.path}, the tuned model in {run.output_path}.\n\nNext:")
    for command, what in (
        (f"finetui chat {run.name}", "talk to it"),
        (f"finetui attach {run.name}", "see its curves"),
        ("finetui plan Qwen/Qwen3-8B --tuning qlora --gpu RTX4090", "plan a real one"),
        ("finetui run recipe.yaml", "carry out your own recipe"),
    ):
        print(f"  {command:58} {what}")


def _short(text: str, width: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"
