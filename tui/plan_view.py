"""A plan as plain text: verdict, memory by term, speed, time, cost, and why."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from ..planner.plan import Plan, StagePlan
from .console import Console
from .format import count, duration, gib, rate, sentence, setting, usd

_BAR = 32
#: What the figures of a plan rest on, in words.
BASES = {
    "formula": "formula: counted and computed; no run like it has finished here yet",
    "calibrated": "calibrated: the formula, corrected by runs that have finished here",
    "measured": "measured: the formula, with the speeds that finetui bench found on this machine",
    "exact": "exact: one step followed through the real model code",
}


def verdict(plan: Plan) -> tuple[str, str]:
    """Glyph and words, never colour alone: ``("✔", "fits")``."""
    if not plan.fits:
        return "✘", "does not fit"
    if plan.memory.high_gib > plan.hardware.memory_gib:
        return "!", "fits, but tightly"
    return "✔", "fits"


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Write a plan to stdout (or another console)."""
    console = console or Console(highlight=False)
    memory, speed, hardware, r = plan.memory, plan.speed, plan.hardware, plan.resolved
    glyph, words = verdict(plan)
    where = hardware.gpu if hardware.count == 1 else f"{hardware.count} × {hardware.gpu}"
    style = "bold green" if glyph == "✔" else "bold yellow" if glyph == "!" else "bold red"
    share = memory.device_gib / hardware.memory_gib if hardware.memory_gib else 0.0
    interval = f"{share:.0%}; {gib(memory.low_gib)} to {gib(memory.high_gib)}"
    head = Text(f"{glyph} {words}", style=style)
    head.append(f" on {where}: {gib(memory.device_gib)} of {gib(hardware.memory_gib)} ({interval})", style="default")
    console.print(head)
    if plan.stages:
        _print_stages(plan, console)
    adapter = f" r={r.rank}" if r.rank else ""
    largest = _largest(plan)
    named = f" in stage {largest.name}" if largest else ""
    console.print(
        f"  {plan.model.name}{named}: {count(plan.model.parameters)} parameters, {count(plan.model.trainable)} trained "
        f"({r.method}, {r.tuning}{adapter})"
    )
    if not plan.fits:  # what would help comes before the figures of what can't be
        _print_warnings(plan, console)
    console.print()
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    table.add_column(justify="left")
    table.add_column(justify="left")
    table.add_column(justify="right")
    scale = max([*memory.terms.values(), 1e-9])
    for name, value in memory.terms.items():
        table.add_row(name, "█" * round(_BAR * value / scale), gib(value))
    console.print(table)
    lower = f"; to lower it: {memory.lever}" if memory.lever and plan.fits else ""
    console.print(f"  the peak is in the {memory.moment} moment of a step{lower}")
    console.print()
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    between = f" ({rate(speed.low_tokens_per_s)} to {rate(speed.high_tokens_per_s)})" if speed.low_tokens_per_s else ""
    facts.add_row("speed", f"{rate(speed.tokens_per_s)} tokens/s{between}, {duration(speed.step_s)} a step, "
                           f"{speed.mfu:.0%} of peak FLOP/s (MFU)")  # fmt: skip
    time_s, in_all = (largest.time_s, " in all") if largest else (plan.time_s, "")
    facts.add_row("time", f"{duration(time_s)} for {r.steps:,} steps of {r.batch_size} sequences "
                          f"({count(plan.workload.tokens)} tokens per epoch, {plan.workload.basis})")  # fmt: skip
    if plan.cost.usd_per_h:
        dated = f"price of {plan.cost.as_of}" if plan.cost.as_of != "unknown" else "undated price"
        as_of = f", {dated}" if plan.cost.as_of else ""
        facts.add_row(
            "cost", f"{usd(plan.cost.usd)}{in_all} at {usd(plan.cost.usd_per_h)}/h ({plan.cost.provider}{as_of})"
        )
    facts.add_row("basis", BASES.get(plan.basis, plan.basis))
    console.print(facts)
    if plan.reasons:
        console.print()
        why = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
        why.add_column(style="bold", no_wrap=True)
        why.add_column(no_wrap=True)
        why.add_column(style="dim")
        for reason in plan.reasons:
            why.add_row(reason.setting, setting(reason.value), sentence(reason.why))
        console.print(why)
    if plan.fits:
        _print_warnings(plan, console)


def _print_warnings(plan: Plan, console: Console) -> None:
    for warning in plan.warnings:
        console.print(Text(sentence(f"! {warning}"), style="yellow"))


def _print_stages(plan: Plan, console: Console) -> None:
    """One line for each stage, and all together."""
    table = Table(box=None, padding=(0, 2, 0, 2))
    columns = ["stage", "method", "tuning", "memory", "steps", "time", *(["cost"] if plan.cost.usd else [])]
    for heading in columns:
        table.add_column(heading, justify="left" if heading in ("stage", "method", "tuning") else "right", no_wrap=True)
    for stage in plan.stages:
        table.add_row(*_stage_cells(stage)[: len(columns)])
    together = ["all", "", "", "", "", duration(plan.time_s), usd(plan.cost.usd)]
    table.add_row(*together[: len(columns)], style="bold")
    console.print()
    console.print(table)
    console.print()


def _stage_cells(stage: StagePlan) -> list[str]:
    if stage.do != "train":
        return [stage.name, stage.do if stage.name != stage.do else ""]
    memory = gib(stage.device_gib) + ("" if stage.fits else " ✘")
    priced = usd(stage.usd) if stage.usd else ""
    return [stage.name, stage.method, stage.tuning, memory, f"{stage.steps:,}", duration(stage.time_s), priced]


def _largest(plan: Plan) -> StagePlan | None:
    """The stage whose memory, speed and settings are shown below the table; None where there is only one."""
    trained = [stage for stage in plan.stages if stage.do == "train"]
    if len(trained) < 2:
        return None
    return max(trained, key=lambda stage: (not stage.fits, stage.device_gib))
