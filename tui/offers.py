"""Offers for one plan: each machine for rent with what the run would need, take and cost there, and which are best."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from ..planner.errors import FinetuiError
from ..planner.plan import Plan
from .form import Tree, get, put

#: What a table of offers can be sorted by, each with the figure that is smaller for the better offer.
SORTS: dict[str, Callable[[OfferRow], float]] = {
    "$ run": lambda row: row.usd,
    "time": lambda row: row.plan.time_s,
    "$/h": lambda row: row.usd_per_h,
    "memory": lambda row: row.plan.memory.device_gib / row.plan.hardware.memory_gib,
}


@dataclass(frozen=True)
class OfferRow:
    """One machine. ``best`` marks those that no other beats in both time and money."""

    provider: str
    gpu: str
    count: int
    plan: Plan
    usd_per_h: float
    usd: float
    as_of: str = ""
    stale: bool = False
    source: str = ""
    best: bool = False

    @property
    def key(self) -> str:
        """What tells this row from the others."""
        return f"{self.provider}|{self.gpu}|{self.count}|{self.usd_per_h}|{self.source}"

    @property
    def local(self) -> bool:
        """Whether it is this machine."""
        return self.plan.hardware.local


def with_frontier(rows: Sequence[OfferRow]) -> list[OfferRow]:
    """The rows with ``best`` set on those that fit and that nothing for rent beats in both time and money."""
    cheapest = float("inf")
    best = set()
    rented = [row for row in rows if row.plan.fits and not row.local]
    for row in sorted(rented, key=lambda row: (row.plan.time_s, row.usd)):
        if row.usd < cheapest:
            best.add(row.key)
            cheapest = row.usd
    return [replace(row, best=row.key in best) for row in rows]


def arranged(rows: Iterable[OfferRow], *, sort: str, everything: bool, words: str = "") -> list[OfferRow]:
    """The rows to show, best first; those that do not fit come last, and only with ``everything``.

    ``words`` are looked for in provider and GPU; every one has to be there.
    """
    wanted = words.lower().split()
    shown = [
        row
        for row in rows
        if (everything or row.plan.fits) and all(word in f"{row.provider} {row.gpu}".lower() for word in wanted)
    ]
    return sorted(shown, key=lambda row: (not row.plan.fits, SORTS[sort](row), row.plan.time_s, row.key))


@dataclass(frozen=True)
class Alternative:
    """One field of the form with another value, on the same machine, and the plan that this makes."""

    key: str
    value: str
    plan: Plan

    @property
    def change(self) -> str:
        """The change as a recipe says it."""
        return f"{self.key}: {self.value}"


_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)


def alternatives(draft: Tree, row: OfferRow, plan_of: Callable[[Tree], Plan]) -> list[Alternative]:
    """Up to three changes worth a look on this machine.

    Where the plan does not fit: what fits, the smallest change first. Where it does: what is at least a tenth faster,
    what trains more weights, and a longer sequence.

    Args:
        plan_of: plans a draft; a :class:`FinetuiError` rules that draft out.
    """
    found = []
    for key, value in _changes(draft, row.plan):
        try:
            plan = plan_of(on_machine(put(draft, key, value), row))
        except FinetuiError:
            continue
        if plan.fits and (not row.plan.fits or _better(key, plan, row.plan)):
            found.append(Alternative(key, value, plan))
    if row.plan.fits:
        found.sort(key=lambda other: -other.plan.speed.tokens_per_s)
    return found[:3]


def on_machine(draft: Tree, row: OfferRow) -> Tree:
    """The draft, planned for the row's machine."""
    if row.local:
        return draft
    return put(put(draft, "hardware.gpu", row.gpu), "hardware.gpus", str(row.count))


def _changes(draft: Tree, plan: Plan) -> Iterable[tuple[str, str]]:
    if get(draft, "hardware.checkpointing") not in ("auto", "full"):
        yield "hardware.checkpointing", "auto"
    if get(draft, "optimizer.name") == "adamw":
        yield "optimizer.name", "auto"
    tuning, length = get(draft, "tuning.type"), plan.resolved.sequence_length
    if plan.fits:
        yield from (("tuning.type", other) for other in ("full", "lora", "qlora") if other != tuning)
        yield from (("sequence_length", str(n)) for n in _LENGTHS if length < n <= 2 * length)
    else:
        yield from (("sequence_length", str(n)) for n in reversed(_LENGTHS) if n < length)
        yield from (("tuning.type", other) for other in ("lora", "qlora") if other != tuning)


def _better(key: str, plan: Plan, than: Plan) -> bool:
    if key == "sequence_length":
        return True
    return plan.speed.tokens_per_s > 1.1 * than.speed.tokens_per_s or plan.model.trainable > than.model.trainable
