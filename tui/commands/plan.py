"""``finetui plan``: what a fine-tune will need, take and cost, with the terms and the reasons."""

from __future__ import annotations

from typing import Annotated

import typer

from ...engine.planning import plan_for
from ...planner.recipe import Recipe
from .options import JsonFlag, takes_recipe

FrameworkFlag = Annotated[
    str,
    typer.Option("--framework", help="Whose run is predicted: finetui, trl, trl-liger, unsloth, axolotl, torchtune."),
]
ExactFlag = Annotated[
    bool,
    typer.Option("--exact", help="Follow one step through the real model code on fake tensors; takes seconds, not ms."),
]


@takes_recipe()
def plan(
    recipe: Recipe, framework: FrameworkFlag = "finetui", exact: ExactFlag = False, as_json: JsonFlag = False
) -> None:
    """Memory, speed, time and cost of a fine-tune, before anything is downloaded."""
    if exact:
        from ...engine.exact.answer import exact_plan

        result = exact_plan(recipe, framework=framework)
    else:
        result = plan_for(recipe, framework=framework)
    if as_json:
        print(result.to_json())
        return
    from ..plan_view import print_plan

    print_plan(result)
