"""OfferDetails: one offer in words, and the changes to the plan that are worth a look there."""

from __future__ import annotations

from collections.abc import Sequence

from .. import format  # noqa: A004
from ..offers import Alternative, OfferRow, money, over_limit
from ..plan_view import verdict
from .lines import Line, Lines, wrapped

#: The keys that apply an alternative, in order.
APPLY_KEYS = "abc"
_ROLES = {"✔": "good", "!": "warn", "✘": "bad"}


class OfferDetails(Lines):
    """The offer under the cursor: verdict, price, source, and what else could be done on that machine."""

    def __init__(self) -> None:
        super().__init__()
        self._row: OfferRow | None = None
        self._others: Sequence[Alternative] = ()
        self._nothing = ""

    def show(self, row: OfferRow | None, others: Sequence[Alternative] = (), nothing: str = "") -> None:
        """Draw an offer; without one, ``nothing`` says why."""
        self._row, self._others, self._nothing = row, others, nothing
        self.refresh(layout=True)
        self.redraw()

    def draw(self, width: int, height: int) -> list[Line]:
        """See :class:`Lines`."""
        row = self._row
        if row is None:
            return wrapped(self._nothing, width, "dim")
        plan, memory = row.plan, row.plan.memory
        glyph, words = verdict(plan)
        lines: list[Line] = [
            [
                (f"{glyph} {words}  ", _ROLES[glyph]),
                (format.gib_of(memory.device_gib, plan.hardware.memory_gib), "bold"),
                (f"  {format.bare_gib(memory.low_gib)} to {format.bare_gib(memory.high_gib)}, by {plan.basis}", "dim"),
            ]
        ]
        r = plan.resolved
        kept = "no" if r.checkpointing == "none" else r.checkpointing
        setting = f"micro batch {r.micro_batch}, {kept} checkpointing, {r.optimizer}"
        lines.append([("plan     ", "dim"), (setting, "")])
        if row.local:
            lines.append([("price    ", "dim"), ("this machine: nothing to rent", "")])
        else:
            if over := over_limit(row):
                lines += wrapped(f"! {over}", width, "warn")
            dated = f"of {row.as_of}" if row.as_of not in ("", "unknown") else "undated"
            old = [("  old: look again", "warn")] if row.stale else []
            price = money(row, row.usd_per_h) + ("" if row.quota else "/h")
            dated = dated.replace("of ", "as of ") if row.quota else dated
            lines.append([("price    ", "dim"), (f"{price} {dated}", ""), *old])
            if row.quota:
                lines.append([("quota    ", "dim"), (row.quota, "")])
            lines += wrapped(f"source   {row.source}", width, "dim", indent=" " * 9)
        for key, other in zip(APPLY_KEYS, self._others, strict=False):
            figures = f"{format.rate(other.plan.speed.tokens_per_s)} tok/s, {format.gib(other.plan.memory.device_gib)}"
            lines.append([(f"{key}  ", "key"), (f"{other.change}  ", ""), (figures, "dim")])
        return lines
