"""``finetui plan``: what a fine-tune will need, take and cost, with the terms and the reasons."""

from __future__ import annotations

from typing import Annotated

import typer

from ...engine.planning import plan_for
from ...planner.errors import RecipeError
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
ExplainFlag = Annotated[
    str | None,
    typer.Option(
        "--explain",
        metavar="TERM",
        help="A term's formula with its numbers: weights, speed, cost …, memory, step, all.",
    ),
]


@takes_recipe()
def plan(
    recipe: Recipe,
    framework: FrameworkFlag = "finetui",
    exact: ExactFlag = False,
    explain: ExplainFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Memory, speed, time and cost, before anything is downloaded."""
    if explain is not None:
        if exact:
            raise RecipeError("--explain has no effect on an exact plan, which no formula makes", do="Leave out one.")
        _explain(recipe, framework, explain, as_json=as_json)
        return
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


def _explain(recipe: Recipe, framework: str, name: str, *, as_json: bool) -> None:
    from ...engine.planning import explain
    from ..term_view import chosen, print_terms, terms_tree

    _, terms = explain(recipe, framework=framework)
    found = chosen(terms, name)
    if as_json:
        import json

        print(json.dumps({"terms": terms_tree(found)}, indent=2, ensure_ascii=False))
        return
    print_terms(found)
