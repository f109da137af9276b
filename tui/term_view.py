"""A term of a plan in words: its formula, its parts with their numbers, and what they come to."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..planner.errors import RecipeError
from .console import Console
from .format import bare_gib, duration, gib, memory_unit, usd

if TYPE_CHECKING:
    from ..planner.terms import Term

#: Names that a user may give for all terms of one kind.
KINDS = ("all", "memory", "step")


def amount(term: Term, value: float | None = None) -> str:
    """A term's amount, or that of a part of it, with its unit."""
    value = term.amount if value is None else value
    if term.unit == "GiB":
        exact = gib(abs(value)) if abs(value) < 0.1 else f"{bare_gib(abs(value), 2)} {memory_unit()}"
        return exact if value >= 0 else f"−{exact}"
    if term.unit == "USD":
        return usd(value)
    if abs(value) < 0.0995:
        return f"{value * 1000:.3g} ms"
    return duration(value) if value >= 0 else f"−{duration(-value)}"


def rows(term: Term) -> list[tuple[str, str, str]]:
    """What, how and how much of each part, largest first, and the sum where there are several."""
    parts = sorted(term.parts, key=lambda part: -part.amount)
    found = [(part.what, part.sum, amount(term, part.amount)) for part in parts]
    return [*found, ("together", "", amount(term))] if len(found) > 1 else found


def chosen(terms: Mapping[str, Term], name: str) -> list[Term]:
    """The terms that a name stands for: one, those of ``memory`` or of a ``step``, or ``all``.

    Raises:
        RecipeError: there is no such term.
    """
    if name in KINDS:
        wanted = {"memory": ("memory",), "step": ("speed",)}.get(name, ("memory", "speed", "time", "cost"))
        return [term for term in terms.values() if term.kind in wanted]
    if name in terms:
        return [terms[name]]
    near = difflib.get_close_matches(name, [*terms, *KINDS], n=1, cutoff=0.5)
    do = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join([*terms, *KINDS])}."
    raise RecipeError(f"a plan has no term {name!r}", where="--explain", do=do)


def print_terms(terms: list[Term], console: Console | None = None) -> None:
    """Write terms to stdout (or another console)."""
    console = console or Console(highlight=False)
    for number, term in enumerate(terms):
        if number:
            console.print()
        console.print(f"{term.name}: {amount(term)}", style="bold")
        console.print(f"  {term.formula}")
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 4))
        table.add_column()
        table.add_column(style="dim")
        table.add_column(justify="right", no_wrap=True)
        for row in rows(term):
            table.add_row(*row)
        if term.parts:
            console.print(table)
        if term.source:
            console.print(f"  source: {term.source}", style="dim")


def terms_tree(terms: list[Term]) -> list[dict[str, Any]]:
    """Terms as JSON holds them; memory in GiB, time in seconds."""
    import dataclasses

    return [dataclasses.asdict(term) for term in terms]
