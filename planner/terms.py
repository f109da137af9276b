"""Where each figure of a plan comes from: its formula, with this plan's numbers in it, part by part.

The figures are the planner's own: the parts are made of what :mod:`.memory`, :mod:`.speed` and :mod:`.cost` computed,
and add up to the plan's terms. What finished runs taught is a part of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from .architecture import Architecture
from .cost import Overhead
from .hardware import GIB, Node
from .memory_terms import memory_parts
from .plan import Plan, Workload
from .speed_terms import speed_parts

if TYPE_CHECKING:
    from .calibration import Finished
    from .recipe import Recipe

Unit = Literal["GiB", "s", "USD"]
#: What is left over of a term without being named, as a share of it and in its unit.
_ROUNDING, _LEAST = 0.002, 0.001


@dataclass(frozen=True)
class Part:
    """One summand: what it is, how it is reckoned, and how much it comes to in the unit of its term."""

    what: str
    sum: str
    amount: float


@dataclass(frozen=True)
class Term:
    """One figure of a plan. ``parts`` add up to ``amount``; ``source`` says where the formula was read or measured."""

    name: str
    kind: Literal["memory", "speed", "time", "cost"]
    unit: Unit
    amount: float
    formula: str
    parts: tuple[Part, ...]
    source: str = ""


def explain_terms(
    recipe: Recipe,
    architecture: Architecture,
    node: Node,
    workload: Workload | None = None,
    *,
    framework: str = "finetui",
    finished: Iterable[Finished] = (),
) -> tuple[Plan, dict[str, Term]]:
    """A plan, and each term of its memory and speed, its time and its cost explained, by name.

    ``optimizer`` is the memory of its states; the seconds of its step are ``optimizer step``.

    Args: as of :func:`.solver.make_plan`, which raises what this raises.
    """
    from .solver import Solver

    solver = Solver.of(recipe, architecture, node, workload, framework, finished)
    best, _ = solver.search()
    plan = solver.plan(None)
    found: dict[str, Term] = {}
    gpu, stack = solver.node.gpu, solver.stack
    for name, (formula, source, parts) in memory_parts(architecture, best.settings, stack, gpu).items():
        amount = plan.memory.terms[name]
        pieces = [Part(what, how, size / GIB) for what, how, size in parts]
        found[name] = Term(name, "memory", "GiB", amount, formula, _closed(pieces, amount, plan), source)
    now, useful, span = solver.rows_of(best.settings)
    reckoned = speed_parts(architecture, now, stack, gpu, useful=useful, mean_length=span)
    for name, (formula, source, parts) in reckoned.items():
        amount = plan.speed.terms.get(name, 0.0)
        title = "optimizer step" if name == "optimizer" else name
        pieces = [Part(what, how, seconds) for what, how, seconds in parts]
        found[title] = Term(title, "speed", "s", amount, formula, _closed(pieces, amount, plan), source)
    found["speed"] = _step(plan)
    teacher = best.settings.beside.teacher
    models = [architecture] if teacher is None else [architecture, teacher.architecture]
    downloaded = 2.0 * sum(model.parameters for model in models)
    found["time"] = _time(plan, downloaded, solver.beside(best, plan.resolved))
    found["cost"] = _cost(plan)
    return plan, found


def _closed(parts: list[Part], amount: float, plan: Plan) -> tuple[Part, ...]:
    """The parts, and what they leave over: what finished runs taught, or what no part names."""
    left = amount - sum(part.amount for part in parts)
    kept = [part for part in parts if abs(part.amount) > 1e-9]
    if abs(left) <= max(_ROUNDING * abs(amount), _LEAST):
        return tuple(kept)
    taught = plan.basis == "calibrated"
    return (*kept, Part("what finished runs of this kind measured beside the formula" if taught else "other", "", left))


def _step(plan: Plan) -> Term:
    speed, resolved = plan.speed, plan.resolved
    useful = speed.tokens_per_s * speed.step_s
    parts = [Part(name if name != "optimizer" else "optimizer step", f"{seconds / speed.step_s:.0%} of a step", seconds)
             for name, seconds in sorted(speed.terms.items(), key=lambda item: -item[1]) if seconds > 0]  # fmt: skip
    formula = (
        f"tokens/s = {useful:,.0f} tokens of a step ({resolved.batch_size} sequences, padding not counted) "
        f"÷ {speed.step_s:.3g} s = {speed.tokens_per_s:,.0f}"
    )
    return Term("speed", "speed", "s", speed.step_s, formula, _closed(parts, speed.step_s, plan))


def _time(plan: Plan, downloaded: float, beside: Overhead) -> Term:
    resolved, speed = plan.resolved, plan.speed
    rented = "" if plan.hardware.local else ", and getting a rented machine"
    held_out = f"{plan.workload.eval_examples:,} held-out rows each time, at a third of a training pass"
    parts = [
        Part("training", f"{resolved.steps:,} steps × {speed.step_s:.3g} s", resolved.steps * speed.step_s),
        Part("start", f"imports, loading the weights{rented}", beside.start_s),
        Part("download", f"{downloaded / 1e9:,.1f} GB of weights from the Hub", beside.download_s),
        Part("evaluation", held_out, beside.evaluation_s),
        Part("reference", "log-probabilities of the frozen reference, once for each row", beside.reference_s),
        Part("checkpoints", f"every {resolved.checkpoint_every:,} steps, and at the end", beside.checkpoint_s),
    ]
    formula = "steps × time of a step + what stands around them"
    return Term("time", "time", "s", plan.time_s, formula, _closed(parts, plan.time_s, plan))


def _cost(plan: Plan) -> Term:
    cost = plan.cost
    where = f"{cost.provider}{f', price of {cost.as_of}' if cost.as_of else ''}" if cost.usd_per_h else "no price"
    parts = (Part("rent", f"{plan.time_s / 3600:.3g} h × ${cost.usd_per_h:.2f}/h", cost.usd),) if cost.usd else ()
    return Term("cost", "cost", "USD", cost.usd, "time × price of an hour", parts, where)


def scaled(term: Term, factor: float) -> Term:
    """A term in another unit."""
    parts = tuple(replace(part, amount=part.amount * factor) for part in term.parts)
    return replace(term, amount=term.amount * factor, parts=parts)
