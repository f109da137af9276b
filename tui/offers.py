"""Offers for one plan: each machine for rent with what the run would need, take and cost there, and which are best."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from ..planner.errors import FinetuiError
from ..planner.plan import Plan
from . import format  # noqa: A004
from .form import Tree, get, put
from .plan_view import verdict

#: What a table of offers can be sorted by, each with the figure that is smaller for the better offer.
SORTS: dict[str, Callable[[OfferRow], float]] = {
    "$ run": lambda row: row.usd,
    "time": lambda row: row.plan.time_s,
    "$/h": lambda row: row.usd_per_h,
    "memory": lambda row: row.plan.memory.device_gib / row.plan.hardware.memory_gib,
}


@dataclass(frozen=True)
class OfferRow:
    """One machine. ``best`` marks those that no other beats in both time and money; ``over`` names the limit that the
    run breaks there (``hours``, ``cost_usd``, ``quota``); ``quota`` says how much of a free machine there is."""

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
    over: str = ""
    quota: str = ""

    @property
    def key(self) -> str:
        """What tells this row from the others."""
        return f"{self.provider}|{self.gpu}|{self.count}|{self.usd_per_h}|{self.source}"

    @property
    def local(self) -> bool:
        """Whether it is this machine."""
        return self.plan.hardware.local

    @property
    def unproven(self) -> bool:
        """Whether it is lent for one session at a time, and how long the run takes is not known before its data is."""
        return bool(self.quota) and not self.over and self.plan.workload.basis == "assumed"


def with_frontier(rows: Sequence[OfferRow]) -> list[OfferRow]:
    """The rows with ``best`` set on those that fit, surely keep to every limit, and that nothing for rent beats in both
    time and money."""
    cheapest = float("inf")
    best = set()
    rented = [row for row in rows if row.plan.fits and not row.local and not row.over and not row.unproven]
    for row in sorted(rented, key=lambda row: (row.plan.time_s, row.usd)):
        if row.usd < cheapest:
            best.add(row.key)
            cheapest = row.usd
    return [replace(row, best=row.key in best) for row in rows]


def arranged(rows: Iterable[OfferRow], *, sort: str, everything: bool, words: str = "") -> list[OfferRow]:
    """The rows to show, best first; those that break a limit come after all that do not, behind those that may, and
    those that do not fit last, and only with ``everything``.

    ``words`` are looked for in provider and GPU; every one has to be there.
    """
    wanted = words.lower().split()
    shown = [
        row
        for row in rows
        if (everything or row.plan.fits) and all(word in f"{row.provider} {row.gpu}".lower() for word in wanted)
    ]
    return sorted(
        shown,
        key=lambda row: (not row.plan.fits, bool(row.over), row.unproven, SORTS[sort](row), row.plan.time_s, row.key),
    )


def money(row: OfferRow, usd: float) -> str:
    """A price of this offer: ``free`` where it is lent for nothing within a quota."""
    return "free" if row.quota else format.usd(usd)


def over_limit(row: OfferRow) -> str:
    """That the run breaks a limit on this machine, or may, in words; empty where it keeps to all."""
    if row.unproven:
        return "how long the run takes is not known before its data is: a free session may end first"
    if not row.over:
        return ""
    if row.over == "cost_usd":
        return f"the run costs {format.usd(row.usd)}, more than limits.cost_usd allows"
    allowed = "one free session" if row.over == "quota" else "limits.hours allows"
    return f"the run takes {format.duration(row.plan.time_s)}, longer than {allowed}"


def price_age(as_of: str, now: float) -> str:
    """How old a price is, in days: ``9 d``; ``?`` where it has no date."""
    try:
        since = datetime.fromisoformat(f"{as_of}-01" if len(as_of) == 7 else as_of).replace(tzinfo=UTC)
    except ValueError:
        return "?"
    return f"{max(int((now - since.timestamp()) // 86400), 0)} d"


@dataclass(frozen=True)
class Figure:
    """One line of a comparison: a figure of each offer, and which of them is best (none where nothing is)."""

    label: str
    values: tuple[str, ...]
    best: frozenset[int] = frozenset()


def compared(rows: Sequence[OfferRow], now: float) -> list[Figure]:
    """Offers side by side: what differs between them, figures first, then how the run would go on each."""

    def figure(label: str, of: Callable[[OfferRow], float | None], text: Callable[[float], str]) -> Figure:
        found = [of(row) for row in rows]
        least = min((value for value in found if value is not None), default=None)
        best = frozenset(n for n, value in enumerate(found) if value is not None and value == least)
        free = [bool(row.quota) and label.startswith("$") for row in rows]
        shown = tuple(
            "–" if value is None else "free" if nothing else text(value)
            for value, nothing in zip(found, free, strict=True)
        )
        return Figure(label, shown, best if len(best) < len(rows) else frozenset())

    def fitting(of: Callable[[OfferRow], float]) -> Callable[[OfferRow], float | None]:
        return lambda row: of(row) if row.plan.fits else None

    lines = [
        Figure("provider", tuple(row.provider for row in rows)),
        Figure("fit", tuple(" ".join(verdict(row.plan)) for row in rows)),
        figure("memory", lambda row: row.plan.memory.device_gib / row.plan.hardware.memory_gib, "{:.0%}".format),
        Figure("  of", tuple(format.gib(row.plan.hardware.memory_gib) for row in rows)),
        figure("tokens/s", fitting(lambda row: -row.plan.speed.tokens_per_s), lambda value: format.rate(-value)),
        figure("time", fitting(lambda row: row.plan.time_s), format.duration),
        figure("$/h", lambda row: row.usd_per_h, format.usd),
        figure("$ run", fitting(lambda row: row.usd), format.usd),
        *([Figure("free", tuple(row.quota or "–" for row in rows))] if any(row.quota for row in rows) else []),
        Figure("price age", tuple("now" if row.local else price_age(row.as_of, now) for row in rows)),
    ]
    for label, of in (
        ("micro batch", lambda plan: str(plan.resolved.micro_batch)),
        ("checkpointing", lambda plan: plan.resolved.checkpointing),
        ("optimizer", lambda plan: plan.resolved.optimizer),
        ("precision", lambda plan: plan.resolved.precision),
    ):
        values = tuple(of(row.plan) for row in rows)
        lines += [Figure(label, values)] if len(set(values)) > 1 else []
    return lines


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
