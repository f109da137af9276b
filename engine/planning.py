"""From a recipe to its plan: reads the model's config, looks at the data and the machine, and asks the planner.

Nothing is downloaded but a ``config.json``, and not even that for a folder or a model known in ``presets/``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..planner.architecture import Architecture
from ..planner.errors import UserError
from ..planner.hardware import Node, node_for
from ..planner.hub import find_config
from ..planner.plan import Plan, Workload
from ..planner.recipe import Recipe
from ..planner.solver import make_plan
from ..planner.state import state_dir

if TYPE_CHECKING:
    from ..planner.calibration import Finished
    from ..planner.terms import Term


def plan_for(recipe: Recipe, *, framework: str = "finetui", node: Node | None = None) -> Plan:
    """Resolve a recipe for the hardware that it names, or for this machine.

    Args:
        recipe: what the user asks for.
        framework: whose run is predicted.
        node: the hardware, when the caller has it already.

    Raises:
        UserError: the model, the data or the hardware of the recipe is not to be had.
    """
    if recipe.stages:
        from ..planner.stages import expand, together

        steps = expand(recipe)
        plans = [plan_for(step.recipe, framework=framework, node=node) if step.recipe else None for step in steps]
        return together(steps, plans)
    architecture, workload = _architecture_of(recipe), workload_of(recipe)
    node = node or node_for(recipe.hardware)
    return make_plan(recipe, architecture, node, workload, framework=framework, finished=finished_runs())


def explain(recipe: Recipe, *, framework: str = "finetui") -> tuple[Plan, dict[str, Term]]:
    """A recipe's plan, and every term of it as a formula with its numbers in it; of several stages, that which needs
    most memory.

    Raises:
        UserError: as :func:`plan_for`.
    """
    from ..planner.terms import explain_terms

    if recipe.stages:
        from ..planner.stages import expand

        trained = [step.recipe for step in expand(recipe) if step.recipe is not None]
        plans = [plan_for(step, framework=framework) for step in trained]
        most = max(range(len(plans)), key=lambda number: (not plans[number].fits, plans[number].memory.device_gib))
        recipe = trained[most]
    architecture, workload, node = _architecture_of(recipe), workload_of(recipe), node_for(recipe.hardware)
    return explain_terms(recipe, architecture, node, workload, framework=framework, finished=finished_runs())


def _architecture_of(recipe: Recipe) -> Architecture:
    name, config, origin = find_config(recipe.model)
    architecture = Architecture.from_config(config, name)
    if not architecture.exact and origin in ("hub", "folder"):
        architecture = _counted(architecture, recipe.model)
    return architecture


def _counted(architecture: Architecture, model: str) -> Architecture:
    """An architecture that was read by its shapes, with what the headers of its weights say beside."""
    from ..planner.weights import stored_weights

    try:
        stored = stored_weights(model)
    except UserError:
        return architecture
    if stored is None:
        return architecture
    counts = f"{architecture.parameters:,} parameters; its files hold {stored.parameters:,} values"
    return replace(architecture, note=f"{architecture.note} ({counts})")


def finished_runs() -> Sequence[Finished]:
    """What this user's finished runs measured: they correct plans for the same GPU, family and size."""
    if not (state_dir() / "calibration.jsonl").is_file():
        return ()
    from ..planner.calibration import history

    return history(state_dir())


def workload_of(recipe: Recipe) -> Workload | None:
    """How much there is to train on, as far as files tell; None without data, or with data only on the Hub."""
    if not recipe.data:
        return None
    from .data.preview import survey  # its readers are a tenth of the time that a plan without data takes

    found = survey(recipe)
    if found.train_rows is None or found.tokens is None:
        return None
    return Workload(
        examples=found.train_rows,
        tokens=found.tokens,
        longest=found.max_tokens or 0,
        eval_examples=found.eval_rows or 0,
        basis="estimated",
    )
