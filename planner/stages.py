"""The stages of a recipe: one workflow in one file, such as SFT, then DPO, then merge, evaluate and export.

Each stage inherits the recipe and says what is different. A stage that trains begins with the model that the one
before it made: with its adapter merged into the weights, or, with ``tuning: {start_from: previous}``, with that adapter
going on. The other stages act on what was trained last.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .errors import RecipeError
from .plan import Disk, Plan, StagePlan

if TYPE_CHECKING:
    from .recipe import Recipe

Do = Literal["train", "merge", "evaluate", "export"]
#: The value of ``tuning.start_from`` that stands for the adapter of the stage before.
PREVIOUS = "previous"
#: Keys of a recipe that belong to the whole workflow, or that a stage gets from the one before it.
_NOT_IN_A_STAGE = {"stages", "model", "track"}
#: What an evaluation may change: the rows.
_OF_ROWS = {"data", "evaluation", "method"}
#: Methods whose rows have one loss that any model can be held against.
_SCORED = {"sft", "pretrain", "distill"}


class Stage(BaseModel):
    """One stage: what to do, and the keys of the recipe that differ in it."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = Field("", max_length=40, pattern=r"^[A-Za-z0-9_-]*$")
    """What its run is called; the method, or what it does, unless set."""
    do: Do = "train"
    """``train`` with the keys that differ; ``merge`` an adapter into its base; ``evaluate`` on held-out rows, those of
    the recipe or of the stage's own ``data``; ``export`` what was made."""
    to: Literal["adapter", "merged", "gguf", "ollama", "vllm"] = "merged"
    """export: the form."""
    path: str = ""
    """export: the folder; in the run's own directory unless set."""

    @property
    def changes(self) -> dict[str, Any]:
        """The keys of the recipe that differ."""
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _possible(self) -> Self:
        useless = set(self.changes) - (_OF_ROWS if self.do == "evaluate" else set())
        if self.do != "train" and useless:
            named = ", ".join(sorted(useless))
            raise ValueError(f"{named} has no effect on a stage that does not train||Remove it, or do: train.")
        if self.do != "export" and {"to", "path"} & self.model_fields_set:
            raise ValueError("to and path are for do: export||Remove them.")
        out = sorted(_NOT_IN_A_STAGE & set(self.changes))
        if out:
            raise ValueError(f"{out[0]} can't differ from stage to stage||Set it for the whole recipe.")
        return self


@dataclass(frozen=True)
class Step:
    """One stage with its name; if it trains, its whole recipe, and if it evaluates, the one of the rows to score."""

    name: str
    stage: Stage
    recipe: Recipe | None = None
    rows: Recipe | None = None

    @property
    def continues(self) -> bool:
        """Whether the adapter of the stage before goes on, instead of a new one on what that one made."""
        return self.recipe is not None and self.recipe.tuning.start_from == PREVIOUS


def expand(recipe: Recipe) -> list[Step]:
    """Each stage with everything that it inherits.

    Raises:
        RecipeError: a stage's keys are wrong, or it has nothing to act on; ``where`` names the stage.
    """
    base = recipe.to_dict()
    base.pop("stages", None)
    # What happens after the run happens once: a machine that is shut down after a stage carries out no other.
    alone = {**base, "limits": {key: value for key, value in base.get("limits", {}).items() if key != "at_end"}}
    steps: list[Step] = []
    for number, stage in enumerate(recipe.stages, 1):
        name = _unique(
            stage.name or str(stage.changes.get("method", recipe.method if stage.do == "train" else stage.do)), steps
        )
        where = f"stages.{number - 1} ({name})"
        if stage.do != "train":
            if not any(step.recipe for step in steps):
                do = "Put a stage that trains before it."
                raise RecipeError(f"there is nothing to {stage.do} yet", where=where, do=do)
            rows = _rows(recipe, merged(base, stage.changes), steps, where) if stage.do == "evaluate" else None
            steps.append(Step(name, stage, rows=rows))
            continue
        whole = type(recipe).build(merged(alone, stage.changes), source=where)
        step = Step(name, stage, whole)
        _check_start(step, [s.recipe for s in steps if s.recipe], number)
        steps.append(step)
    if not any(step.recipe for step in steps):
        raise RecipeError("no stage trains", where="stages", do="Add one, such as {method: sft}.")
    return steps


def _rows(recipe: Recipe, tree: dict[str, Any], steps: list[Step], where: str) -> Recipe | None:
    """The recipe whose held-out rows a stage scores: its own data, the workflow's, or that of the last sft stage."""
    written = [step.recipe for step in steps if step.recipe and step.recipe.method in _SCORED and step.recipe.data]
    if tree.get("data") and tree.get("method", "sft") in _SCORED:
        return type(recipe).build(tree, source=where)
    if tree.get("data"):
        return type(recipe).build({**tree, "method": "sft"}, source=where)
    if written:
        return written[-1]
    if not any(step.recipe.data for step in steps if step.recipe):  # planned before there is any
        return None
    do = "Give the stage data, in a format of sft."
    raise RecipeError("there are no rows to evaluate on", where=where, do=do)


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A recipe with what differs: sections key by key, all else as a whole; a tuning of another type starts anew."""
    result = dict(base)
    for key, value in changes.items():
        before = result.get(key)
        anew = key == "tuning" and (isinstance(value, str) or (isinstance(value, dict) and "type" in value))
        if isinstance(before, dict) and isinstance(value, dict) and not anew:
            result[key] = {**before, **value}
        else:
            result[key] = value
    return result


def _unique(name: str, steps: list[Step]) -> str:
    taken = {step.name for step in steps}
    return next(n for n in (name, *(f"{name}-{i}" for i in range(2, len(taken) + 3))) if n not in taken)


def _check_start(step: Step, before: list[Recipe], number: int) -> None:
    if not step.continues:
        return
    where = f"stages.{number - 1} ({step.name}): tuning.start_from"
    if not before:
        raise RecipeError("there is no stage before this one", where=where, do="Give the folder of an adapter.")
    last, this = before[-1].tuning, step.recipe.tuning if step.recipe else None
    assert this is not None
    if (last.type, last.rank, last.targets, last.use_dora) != (this.type, this.rank, this.targets, this.use_dora):
        what = f"the adapter of the stage before is of another form ({last.type}, rank {last.rank})"
        raise RecipeError(what, where=where, do="Leave start_from out: a new adapter is put on the merged model then.")


def row(step: Step, plan: Plan | None) -> StagePlan:
    """What a plan's table of stages shows of one."""
    if plan is None:
        return StagePlan(step.name, step.stage.do)
    return StagePlan(
        name=step.name,
        do="train",
        method=plan.resolved.method,
        tuning=plan.resolved.tuning,
        trainable=plan.model.trainable,
        steps=plan.resolved.steps,
        fits=plan.fits,
        device_gib=plan.memory.device_gib,
        tokens_per_s=plan.speed.tokens_per_s,
        time_s=plan.time_s,
        usd=plan.cost.usd,
    )


def together(steps: list[Step], plans: list[Plan | None]) -> Plan:
    """One plan for all stages: the memory of the one that needs most, the time and the price of all.

    Args:
        plans: one for each stage that trains, None for the others.
    """
    made = [(step.name, plan) for step, plan in zip(steps, plans, strict=True) if plan is not None]
    _, largest = max(made, key=lambda named: (not named[1].fits, named[1].memory.device_gib))
    total = sum(plan.time_s for _, plan in made)
    warnings = list(dict.fromkeys(f"{name}: {warning}" for name, plan in made for warning in plan.warnings))
    return dataclasses.replace(
        largest,
        fits=all(plan.fits for _, plan in made),
        time_s=total,
        cost=dataclasses.replace(largest.cost, usd=sum(plan.cost.usd for _, plan in made)),
        warnings=warnings,
        disk=Disk(
            *(sum(figures) for figures in zip(*(dataclasses.astuple(plan.disk) for _, plan in made), strict=True))
        ),
        stages=[row(step, plan) for step, plan in zip(steps, plans, strict=True)],
    )


def _disk(each: list[Disk]) -> Disk:
    """Each stage is a run of its own, whose checkpoints and result stay."""
    return Disk(
        max(disk.checkpoint_gib for disk in each),
        sum(disk.checkpoints_gib for disk in each),
        sum(disk.output_gib for disk in each),
    )
